"""The bundled models: the generator draws what it says, the checkpoints are stock, the card tells what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlcache_sgl.evaluation.tasks import receipts

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models" / "tinyvlm"
CHECKPOINTS = ("grounded", "ungrounded")
STOCK_FILES = {
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
SIZE_LIMIT = 20 * 2**20
UNSEEN_SEED = 900_000
"""Pictures that neither training nor the results files have used."""


@cache
def results(name: str) -> dict[str, Any]:
    return json.loads((MODELS / "results" / f"{name}.json").read_text())


@cache
def probe(name: str) -> Any:
    from models.tinyvlm.probe import Probe

    return Probe(MODELS / name)


# -- the generator -----------------------------------------------------------------------------------------------------


def test_same_seed_same_picture() -> None:
    first, second = (receipts.make_receipt(7, 6, 11) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert first.questions == second.questions
    assert receipts.make_receipt(8, 6, 11).image.tobytes() != first.image.tobytes()


def test_fewer_questions_are_the_first_of_more() -> None:
    few, many = (receipts.make_receipt(7, 8, 16, num_questions=n) for n in (2, 6))
    assert few.questions == many.questions[:2]
    assert few.image.tobytes() == many.image.tobytes()


@pytest.mark.parametrize(("rows", "cols"), [(1, 6), (10, 11), (24, 24)], ids=lambda side: str(side))
def test_answers_are_drawn_where_the_cells_say(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the image back through the glyph numbers that were drawn into its cells."""
    drawn: list[int] = []
    draw = receipts.draw_cell
    monkeypatch.setattr(receipts, "draw_cell", lambda rng, glyph: (drawn.append(glyph), draw(rng, glyph))[1])
    picture = receipts.make_receipt(3, rows, cols)
    assert len(drawn) == picture.num_image_tokens == rows * cols
    assert picture.image.size == (cols * receipts.CELL, rows * receipts.CELL)
    for question in picture.questions:
        label, *code = (drawn[cell] for cell in question.cells)
        letter, colour = divmod(label - receipts.FIRST_LABEL, len(receipts.COLOURS))
        assert (receipts.LETTERS[letter], receipts.COLOUR_NAMES[colour]) == (
            question.record.letter,
            question.record.colour,
        )
        assert "".join(receipts.CODE_CHARACTERS[c] for c in code) == question.answer
        assert drawn.count(label) == 1, "a label asked for occurs once"
        assert question.record.colour in question.text
        assert question.record.letter in question.text


def test_ink_lies_in_the_record_and_not_in_blank_cells() -> None:
    picture = receipts.make_receipt(3, 16, 16, fill=1.0)
    pixels = np.asarray(picture.image)
    for cell in picture.questions[0].cells:
        y, x = (receipts.CELL * i for i in divmod(cell, picture.cols))
        assert pixels[y : y + receipts.CELL, x : x + receipts.CELL].min() < 120
    assert receipts.draw_cell(np.random.default_rng(0), receipts.BLANK).min() > 200


def test_a_grid_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="a record needs 5 cells in a row, the grid has 3 x 4"):
        receipts.make_receipt(0, 3, 4)


# -- the checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_stock(name: str) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    assert {path.name for path in (MODELS / name).iterdir()} == STOCK_FILES
    config = json.loads((MODELS / name / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert "auto_map" not in config, "no code of its own"
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODELS / name, output_loading_info=True)
    assert not any(info.values()), info


def test_checkpoints_are_small() -> None:
    size = sum(path.stat().st_size for name in CHECKPOINTS for path in (MODELS / name).iterdir())
    assert size <= SIZE_LIMIT


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_results_are_of_these_weights(name: str) -> None:
    from models.tinyvlm.evaluate import digest

    assert results(name)["weights_sha256"] == digest(MODELS / name)
    assert name in results(name)["command"]


@pytest.mark.parametrize(("grid", "pictures"), [("16x16", 6), ("32x32", 4)])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_exact_match_is_what_the_results_say(name: str, grid: str, pictures: int) -> None:
    """A new sample must not be a 1-in-1000 event under the interval that the results file gives."""
    from models.tinyvlm.evaluate import exact_match

    seen = exact_match(probe(name), grid, pictures, first_seed=UNSEEN_SEED)
    low, high = next(row["interval"] for row in results(name)["exact_match"] if row["grid"] == grid)
    n, k = seen["n"], seen["count"]
    assert _binomial_at_most(k, n, low) > 1e-3, f"{k} of {n} right, the results file says at least {low}"
    assert _binomial_at_most(n - k, n, 1 - high) > 1e-3, f"{k} of {n} right, the results file says at most {high}"


def _binomial_at_most(k: int, n: int, p: float) -> float:
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def test_full_cache_is_one_of_the_kept_sets() -> None:
    """Keeping everything changes nothing, keeping no image token does: the probe's masks act."""
    import torch

    from models.tinyvlm import caches

    picture = receipts.make_receipt(UNSEEN_SEED, 10, 11)
    question = picture.questions[0]
    prompt = probe("grounded").prefill(picture, question)
    assert prompt.image.stop - prompt.image.start == picture.num_image_tokens
    everything = torch.ones(len(prompt.layers), prompt.tokens, dtype=torch.bool)
    kept = torch.stack([everything, caches.text_only(prompt)])
    assert probe("grounded").same_answers(prompt, kept) == [True, False]
    assert prompt.right == probe("grounded").right(picture, question)


def test_budgets_are_exact() -> None:
    """Every policy but the published clip keeps exactly its budget."""
    import torch

    from models.tinyvlm import caches

    picture = receipts.make_receipt(UNSEEN_SEED, 10, 11)
    prompt = probe("grounded").prefill(picture, picture.questions[0])
    for policy in caches.POLICIES:
        kept = policy.keep(prompt, 0.2, torch.Generator().manual_seed(0))
        if policy.allocator != "paper":
            assert int(kept.sum()) == round(0.2 * prompt.tokens * len(prompt.layers)), policy


def test_post_vision_foresees_decoding_better_than_accumulated() -> None:
    """The paper's figure 3 on the grounded model: in the results file, and on an image that it has not seen."""
    import torch

    from models.tinyvlm import caches

    for entry in results("grounded")["compressed"]:
        rates = {name: np.mean(rate["mass"]) for name, rate in entry["hit_rate"].items()}
        assert rates["post-vision"] > rates["accumulated"] > 0
    picture = receipts.make_receipt(UNSEEN_SEED, 16, 16, num_questions=2)
    generator = torch.Generator().manual_seed(0)
    for question in picture.questions:
        prompt = probe("grounded").prefill(picture, question)
        seen = {s: caches.hit_rate(prompt, s, 0.1, generator) for s in ("post-vision", "accumulated", "random")}
        for kind in ("tokens", "mass"):
            post_vision, accumulated = (np.mean(getattr(seen[s], kind)) for s in ("post-vision", "accumulated"))
            assert post_vision > accumulated, kind
        assert np.mean(seen["post-vision"].mass) > np.mean(seen["random"].mass)


# -- the card ----------------------------------------------------------------------------------------------------------


def test_card_tables_are_generated() -> None:
    from models.tinyvlm import card

    text = card.CARD.read_text()
    assert card.rendered(text) == text, "run python -m models.tinyvlm.card"


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_forward_is_the_stock_forward() -> None:
    """Same weights, same tokens: the packed bf16 forward chooses what the stock float32 one does."""
    import torch

    torch.manual_seed(0)

    from models.tinyvlm import batches, checkpoint, network

    model, tokenizer = checkpoint.load(MODELS / "grounded")
    vocabulary = batches.Vocabulary(tokenizer)
    training = network.TrainableVLM(model, vocabulary, compiled=False)
    bank = batches.draw_bank(1, seed=3)
    batch = batches.draw_batch(
        np.random.default_rng(0), vocabulary, images=1, shape=(4, 12), questions=3, template=1, fill=(0.5, 1.0)
    )
    with torch.no_grad():
        packed, observed = training.forward(batch, training.embed_images(batch, bank, 1), observe=2)
        pixels = bank[batch.glyphs[0], 0].reshape(-1, 3, 1, batches.PATCH, batches.PATCH).expand(-1, -1, 2, -1, -1)
        image = torch.full((batch.rows * batch.cols,), model.config.image_token_id)
        for question in range(3):
            ids = torch.cat([vocabulary.prefix, image, batch.text[0, question]])[None]
            stock = model(
                input_ids=ids,
                mm_token_type_ids=(ids == model.config.image_token_id).long(),
                pixel_values=pixels.flatten(1),
                image_grid_thw=torch.tensor([[1, 2 * batch.rows, 2 * batch.cols]]),
            ).logits[0, -batches.ANSWER_TOKENS :]
            # Single logits differ by what bfloat16 rounds away, which depends on the processor; a wrong row, position
            # or mask moves all of them by the spread of the logits, which is above 3.
            assert (packed[0, question] - stock).abs().mean() < 0.15 < stock.std() / 20
            first, second = stock.topk(2).values.unbind(-1)
            clear = first - second > 1
            assert clear.any()
            assert (packed[0, question].argmax(-1) == stock.argmax(-1))[clear].all()
    assert len(observed.layer_densities) == training.layers
    assert all(0 < d < 1 for d in observed.layer_densities)


def test_interrupted_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from models.tinyvlm import train
    from models.tinyvlm.schedule import SCHEDULES, Stage

    stage = Stage("2x6", 2, 2, 4, grounding=0.1, ranking=0.1, density=0.5, compressed=0.5, observed=1)
    schedule = replace(SCHEDULES["grounded"], stages=(stage,))
    monkeypatch.setattr(train, "REPORT_EVERY", 2)
    monkeypatch.setattr(train, "BANK_VARIANTS", 2)

    def start(folder: str) -> Any:
        return train.Run("grounded", schedule, tmp_path / folder, seed=0, compiled=False)

    whole = start("whole")
    whole.train()

    broken = start("broken")
    step, calls = broken._step, iter(range(3))

    def dies_in_its_fourth_step(stage: Stage) -> dict[str, float]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(stage)

    monkeypatch.setattr(broken, "_step", dies_in_its_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = start("broken")
    assert resumed.progress.step == 2
    resumed.train()
    for name, weight in whole.network.model.state_dict().items():
        torch.testing.assert_close(weight, resumed.network.model.state_dict()[name], atol=1e-6, rtol=0, msg=name)
    other = replace(schedule, learning_rate=1.0)
    with pytest.raises(SystemExit, match="begun with another schedule"):
        train.Run("grounded", other, tmp_path / "broken", seed=0, compiled=False)
