"""Tables in the documentation are those of the committed results, and the results are whole."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import pytest

from vlcache_sgl.evaluation.report import summarise
from vlcache_sgl.evaluation.run import parse_condition
from vlcache_sgl.policy import resolve

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import policies

    return policies


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import fidelity

    return fidelity


def test_the_page_of_fidelity_is_current(fidelity: ModuleType) -> None:
    """After a new result: `python benchmarks/fidelity.py --page`."""
    page = fidelity.PAGE.read_text()
    assert page == fidelity.rendered(page, fidelity.committed())


def policies_of(call: tuple[str, ...]) -> list[str]:
    """The values of `--policy`."""
    rest = call[call.index("--policy") + 1 :]
    return list(takewhile(lambda value: not value.startswith("--"), rest))


def test_every_policy_of_an_experiment_is_there(fidelity: ModuleType) -> None:
    """An experiment is asked again years later: a parameter that has moved would end it halfway."""
    for name, experiment in fidelity.experiments().items():
        for call in experiment.calls:
            for policy in policies_of(call):
                assert resolve(policy).spec == policy, name


def test_the_table_of_sensitivity_has_no_empty_cell(fidelity: ModuleType) -> None:
    """Rows of the committed result are found under the names of today."""
    table = fidelity.sensitivity_table(fidelity.committed()["ablation"])
    assert len(table.splitlines()) == 3 + len(fidelity.SENSITIVITY)
    assert "|  |" not in table


def test_fidelity_results_are_whole(fidelity: ModuleType) -> None:
    """Every condition has answered every sample, no policy failed, and the summary is that of the records."""
    results = fidelity.committed()
    assert "requery" in results
    del results[fidelity.RECALL], results[fidelity.INSPECT]
    for name, result in results.items():
        assert result["summary"] == json.loads(json.dumps(summarise(result["records"]))), name
        for task in {row["task"] for row in result["summary"]}:
            rows = [row for row in result["summary"] if row["task"] == task]
            assert len({row["samples"] for row in rows}) == 1, (name, task)
            assert not sum(row["failed"] for row in rows), (name, task)
        for row in result["summary"]:
            budget = float(parse_condition(row["condition"]).budget)
            assert row["ratio"] == pytest.approx(budget, abs=2e-3) or row["ratio"] < budget, row


def test_recall_is_that_of_its_records(fidelity: ModuleType) -> None:
    """Every picture under every score on both models, as many tokens kept by each, and shares between 0 and 1."""
    result = fidelity.committed()[fidelity.RECALL]
    recall = fidelity.recall
    assert result["summary"] == json.loads(json.dumps(recall.summarise(result["records"])))
    assert len(result["summary"]) == 2 * len(recall.SCORES)
    assert {row["samples"] for row in result["summary"]} == {recall.PICTURES}
    for record in result["records"]:
        assert len(set(record["kept_tokens_per_layer"])) <= 2  # equal but for rounding
        assert all(0 <= share <= 1 for figure in recall.FIGURES for share in record[figure])
        assert record["steps"] > 0


def test_the_page_of_measured_policies_is_current(policies: ModuleType) -> None:
    """After a new result: `python benchmarks/policies.py --page`."""
    page = policies.PAGE.read_text()
    assert page == policies.rendered(page, json.loads(policies.result_path().read_text()))


@pytest.fixture
def capacity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import capacity_report

    return capacity_report


def test_the_page_of_capacity_is_current(capacity: ModuleType) -> None:
    """After a new result: `python benchmarks/run.py capacity --page`."""
    page = capacity.PAGE.read_text()
    assert page == capacity.rendered(page)


def test_figures_of_capacity_are_those_of_their_samples(capacity: ModuleType) -> None:
    paths = capacity.result_paths()
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        assert path.with_suffix(".png").exists()
        assert result["targets"] == capacity.check_targets(result["load"], result["rows"])
        for row in result["rows"]:
            assert row["requests"] == len(row["outcomes"])
            assert row["running_peak"] == max(running for running, _ in row["decode_steps"])
            assert row["right"] == sum(outcome["right"] is True for outcome in row["outcomes"])
            cached, prompt = (sum(o[key] for o in row["outcomes"]) for key in ("cached_tokens", "prompt_tokens"))
            assert row["hit_rate"] == pytest.approx(cached / prompt, abs=1e-4)


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sharing

    return sharing


def test_the_page_of_sharing_is_current(sharing: ModuleType) -> None:
    """After a new result: `python benchmarks/run.py sharing --page`."""
    page = sharing.PAGE.read_text()
    assert page == sharing.rendered(page, sharing.committed())


def test_sharing_results_are_whole(sharing: ModuleType) -> None:
    """Every arm has answered every question, no policy failed, and the summary is that of the records."""
    results = sharing.committed()
    assert {"table", *sharing.OFFLINE} <= set(results)
    for name in set(results) - set(sharing.OFFLINE):
        result, records = results[name], results[name]["records"]
        assert result["summary"] == json.loads(json.dumps(sharing.summarise(records))), name
        asked = {arm: {(r["seed"], r["side"]) for r in records if r["arm"] == arm} for arm in result["arms"]}
        assert len({frozenset(pictures) for pictures in asked.values()}) == 1, name
        assert len(records) == sum(map(len, asked.values())), name
        for record in records:
            assert len(record["questions"]) >= sharing.QUESTIONS
            assert record["policy_failures"] == 0


def test_results_of_sharing_without_a_server_are_whole(sharing: ModuleType) -> None:
    import sharing_results

    results = sharing.committed()
    sketch, copies = results["sketch"], results["copies"]
    again = sharing.sharing_sketch.summarise(sketch["records"], sketch["sizes"])
    assert sketch["summary"] == json.loads(json.dumps(again))
    assert sketch["rows"] == sharing.sharing_sketch.summarise_rows(sketch["records"])
    assert copies["summary"] == json.loads(json.dumps(sharing_results.summarise_copies(copies["records"])))
    assert {row["copy"] for row in copies["summary"]} == {
        sharing_results.FULL,
        *(copy.name for copy in sharing.sharing_copies.copies()),
    }
    assert len({row["pictures"] for row in copies["summary"]}) == 1


def test_a_threshold_is_chosen_between_right_and_wrong(sharing: ModuleType) -> None:
    import sharing_results

    items = [(0.05, False), (0.10, False), (0.30, True), (0.60, True)]
    chosen = sharing_results.choose(items)
    assert sharing_results.rates(items, chosen) == (0, 2, 0, 2)
    assert 0.15 < chosen < 0.25  # not at the edge of what was seen
    assert sharing_results.area(items) == 1.0
    assert sharing_results.rates([*items, (0.5, False), (0.2, True)], 0.25) == (1, 3, 1, 3)


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


def test_books_were_exact_after_every_load(capacity: ModuleType) -> None:
    """Some results are older than the count that follows a load; a new one has it for all of our servers."""
    rows = [
        (path.name, row)
        for path in capacity.result_paths()
        for row in json.loads(path.read_text())["rows"]
        if row.get("books") is not None
    ]
    assert rows
    for name, row in rows:
        assert row["books"] == {"cells_used_after_flush": 0, "problems": []}, (name, row["server"])


def test_the_soak_was_whole_and_passed(capacity: ModuleType) -> None:
    """Twenty minutes at least, under pressure, and every outcome one that should be."""
    import soak

    paths = capacity.soak_paths()
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        samples = [soak.Sample(*sample) for sample in result["samples"]]
        assert result["minutes"] >= soak.MINUTES
        assert samples[-1].seconds >= 60 * soak.MINUTES
        assert result["requests"] == sum(result["outcomes"].values())
        assert not [outcome for outcome in result["outcomes"] if outcome.startswith(soak.FAILED)]
        assert result["problems"] == soak.grown(samples) == []
        assert result["retracted"] > 0
        assert result["kv_policy_at_end"]["cells_used"] == 0


def test_every_policy_that_was_measured_was_served(policies: ModuleType) -> None:
    """The summary is that of the samples; a policy that came later is in it after the next measurement."""
    result = json.loads(policies.result_path().read_text())
    rows = {row["policy"]: row for row in result["summary"]}
    assert policies.FULL in rows
    assert set(rows) == {sample["policy"] for sample in result["samples"]}
    listed = [policies.Contender(name, row["made_of"], row["query_aware"], {}) for name, row in rows.items()]
    assert result["summary"] == json.loads(json.dumps(policies.summarise(result["samples"], listed)))
    for name, row in rows.items():
        assert row["failures"] == 0, name
        assert row["ratio"] <= (1.0 if name == policies.FULL else policies.BUDGET + 0.001), name
    assert len({row["questions"] for row in rows.values()}) == 1


def test_intervals_are_those_of_wilson(policies: ModuleType) -> None:
    """Against the zeros of (share - p)^2 = z^2 p (1 - p) / n, which define the interval."""
    for right, count in ((0, 10), (7, 20), (20, 20)):
        for bound in policies.wilson(right, count):
            share = right / count
            assert (share - bound) ** 2 == pytest.approx(policies.Z**2 * bound * (1 - bound) / count, abs=2e-3)
    assert policies.wilson(0, 10)[0] == 0.0
    assert policies.wilson(20, 20)[1] == 1.0
