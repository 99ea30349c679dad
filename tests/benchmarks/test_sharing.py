"""Experiments of sharing: what the scores and readings of `copies` are made of, and what is counted of records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vlcache_sgl.evaluation.tasks.receipts import make_picture
from vlcache_sgl.policy.tier import copy_total

ROOT = Path(__file__).parents[2]
SEED = 61_000


@pytest.fixture(scope="module")
def experiment() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        from benchmarks.sharing import copies

        yield copies


@pytest.fixture(scope="module")
def model(experiment: ModuleType) -> Any:
    return experiment.Recorder()


@pytest.fixture(scope="module")
def looked(experiment: ModuleType, model: Any) -> Any:
    return experiment.Looked(model, SEED)


def test_keys_without_their_rotation_are_what_the_model_projects(experiment: ModuleType, model: Any) -> None:
    layers = model._model.model.language_model.layers
    projected: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda _, __, out: projected.append(out[0])) for layer in layers
    ]
    model.look_at(make_picture(SEED, 24, 24))
    for hook in hooks:
        hook.remove()
    assert len(projected) == model.layers
    for seen, expected in zip(model.seen, projected, strict=True):
        keys = seen.keys[0].transpose(0, 1)
        found = model.rotary.rotate(keys, model.positions, inverse=True)
        torch.testing.assert_close(found.transpose(0, 1).flatten(1), expected, atol=1e-4, rtol=0)
        assert not torch.allclose(found, keys, atol=1.0)


def test_a_copy_has_all_text_and_as_much_of_the_picture_as_its_budget_says(experiment: ModuleType, looked: Any) -> None:
    kept: dict[float, list[torch.Tensor]] = {}
    for copy in experiment.copies():
        if copy.scorer is None:  # what the first question's own policy keeps
            continue
        keep = looked.keep(copy, copy.share_policy())
        assert keep[:, : looked.prompt.vision[0].begin].all(), copy.name
        assert int(keep.sum()) == copy_total(looked.prompt, copy.budget), copy.name
        if not copy.profile:
            kept.setdefault(copy.budget, []).append(keep)
    for chosen in kept.values():
        assert len({keep.numpy().tobytes() for keep in chosen}) == len(chosen)  # each score chooses by itself


def test_a_question_scores_alike_alone_and_beside_a_longer_one(experiment: ModuleType, model: Any, looked: Any) -> None:
    short, long = "red K?", "Which code is printed after the purple letter K?"
    for reduce in (experiment.over_rows, experiment.any_row, experiment.last_rows):
        alone = [experiment.looked_at(model, [text], reduce) for text in (short, long)]
        both = experiment.looked_at(model, [short, long], reduce)
        assert both.rows == sum(told.rows for told in alone)
        for layer, scores in enumerate(both.scores):
            assert scores.shape == (looked.prompt.num_kv_heads, looked.prompt.length)
            torch.testing.assert_close(scores, torch.maximum(*(told.scores[layer] for told in alone)))


def test_guesses_are_other_labels_for_other_pictures(experiment: ModuleType, looked: Any) -> None:
    first, again, second = (experiment.guesses(seed) for seed in (SEED, SEED, SEED + 1))
    assert first == again != second
    assert len(set(first.values())) == len(first) == 32
    assert all(colour in text and letter in text for (colour, letter), text in first.items())
    labels = [(question.record.colour, question.record.letter) for question in looked.questions]
    assert looked.guessed == [label in first for label in labels]


def test_decode_readings_are_those_of_the_rows_behind_the_prompt(
    experiment: ModuleType, model: Any, looked: Any
) -> None:
    """As if the answer's first tokens were the end of a longer prompt."""
    copy = experiment.copies()[0]
    keep, policy = looked.keep(copy, copy.share_policy()), copy.share_policy()
    weights = experiment.layer_weights(policy, looked.prompt, copy.budget)
    question = looked.questions[1]
    prompt, answer = model.tokens(question.text), model.answer_tokens(question)

    def read(rows: list[int], length: int) -> dict[str, float]:
        model.ask([rows], keep[None])
        found = experiment.readings(model, looked, keep, weights, [length])
        return {name: values[0] for name, values in found.items()}

    whole = read([*prompt, *answer[:-1]], len(prompt))
    steps = [[*prompt, *answer[:count]] for count in (0, 1, 2)]
    last = [read(rows, len(rows))["1"] for rows in steps[1:]]
    assert whole["decode"] == pytest.approx(sum(last) / 2, abs=2e-5)
    before = read(steps[0], len(prompt))
    assert {name: value for name, value in whole.items() if name != "decode"} == pytest.approx(
        {name: value for name, value in before.items() if name != "decode"}, abs=2e-5
    )
    assert 0 < whole["decode"] < 1


@pytest.fixture
def sharing() -> ModuleType:
    from benchmarks.sharing import main

    return main


@pytest.fixture
def counting() -> ModuleType:
    from benchmarks.sharing import results

    return results


def again(found: Any) -> Any:
    """As it is after a file."""
    return json.loads(json.dumps(found))


def test_summaries_are_those_of_their_records(sharing: ModuleType) -> None:
    results = sharing.committed()
    for name in set(results) - set(sharing.OFFLINE):
        assert results[name]["summary"] == again(sharing.summarise(results[name]["records"])), name


def test_results_without_a_server_are_those_of_their_records(sharing: ModuleType, counting: ModuleType) -> None:
    results = sharing.committed()
    sketch, copies = results["sketch"], results["copies"]
    assert sketch["summary"] == again(sharing.sketch.summarise(sketch["records"], sketch["sizes"]))
    assert sketch["rows"] == sharing.sketch.summarise_rows(sketch["records"])
    assert copies["summary"] == again(counting.summarise_copies(copies["records"]))


def test_a_threshold_is_chosen_between_right_and_wrong(counting: ModuleType) -> None:
    items = [(0.05, False), (0.10, False), (0.30, True), (0.60, True)]
    chosen = counting.choose(items)
    assert counting.rates(items, chosen) == (0, 2, 0, 2)
    assert 0.15 < chosen < 0.25  # not at the edge of what was seen
    assert counting.area(items) == 1.0
    assert counting.rates([*items, (0.5, False), (0.2, True)], 0.25) == (1, 3, 1, 3)


def test_sharing_goes_on_where_it_stopped(sharing: ModuleType, tmp_path: Path) -> None:
    arms = (sharing.FULL, sharing.POLICY)
    experiment = sharing.Experiment(arms, ((1, 24), (2, 24)))
    records = sharing.Records(tmp_path / "x.jsonl")
    # The arms take turns in being first.
    names = [(arm.name, seed) for arm, seed, _ in records.missing(experiment)]
    assert names == [("full cache", 1), ("policy", 1), ("policy", 2), ("full cache", 2)]
    records.add({"arm": "policy", "seed": 1, "side": 24})
    with records.path.open("a") as file:
        file.write('\n{"arm": "policy", "se')  # killed while writing
    again = sharing.Records(records.path)
    assert [(arm.name, seed) for arm, seed, _ in again.missing(experiment)] == [names[0], *names[2:]]
    again.add({"arm": "full cache", "seed": 1, "side": 24})
    assert len(sharing.Records(records.path).found) == 2
