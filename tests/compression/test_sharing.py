"""Copies for everybody: what they keep, how they are named and replaced, and what the guard reads."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest
import torch
from sharing_parts import make_sharing

from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.compression.sharing.guard import DecodeReading, GuardReading
from vlcache_sgl.compression.sharing.images import LEVELS, SharedImage, SharedImages, StaleCopy, prefix_digest
from vlcache_sgl.compression.sharing.sharing import Sharing
from vlcache_sgl.compression.sharing.state import SharingState
from vlcache_sgl.config import KVBudget
from vlcache_sgl.policy import PolicyError, resolve
from vlcache_sgl.policy.choice import Choice
from vlcache_sgl.policy.plan import EvictionPlan
from vlcache_sgl.policy.tier import layer_weights, require_agnostic
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.scoring.tensor_parallel import HeadGather

LAYERS, HEADS, KV_HEADS, DIM = 4, 4, 2, 32
VISION = Span(6, 206)
LENGTH = 230
MODEL = Prompt(0, 0, (), LAYERS, HEADS, KV_HEADS, DIM)
PROMPT = Prompt(LENGTH, 0, (VISION,), LAYERS, HEADS, KV_HEADS, DIM)
TOKENS = array("q", range(LENGTH))
ALONE = HeadGather(None, 0, 1)


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"weights": [0.1, 0.1, 1, 0]}))
    return str(path)


def make_job(share: str = "tiered", min_tokens: int = 64, image: SharedImage | None = None) -> SharingState:
    choice = Choice(resolve("vlcache"), KVBudget(fraction=0.1), share)  # type: ignore[arg-type]
    asked = Asked(choice, (VISION,), LENGTH, min_tokens)
    return SharingState(asked, {}, TOKENS, image or SharedImage(1))


def own_plan(kept: list[int]) -> EvictionPlan:
    """The question needs `kept` in every layer."""
    keep = torch.zeros(LAYERS, 1, LENGTH, dtype=torch.bool)
    keep[..., kept] = True
    return EvictionPlan(keep, keep[:, 0].sum(-1))


def keys_values(layer: int) -> torch.Tensor:
    """Keys close to a subspace of six dimensions, as trained ones are."""
    generator = torch.Generator().manual_seed(layer)
    both = torch.randn(LENGTH, 2, KV_HEADS, DIM, generator=generator)
    both[:, 0] = 0.2 * both[:, 0] + both[:, 0, :, :6] @ torch.randn(6, DIM, generator=generator)
    return both


def keys_of(layer: int, which: torch.Tensor) -> torch.Tensor:
    """What the compressor reads of `keys_values`; the latter has all heads in one group."""
    keys = keys_values(layer)[: which.shape[1], 0].transpose(0, 1)
    return keys[which.expand(KV_HEADS, -1)].view(KV_HEADS, -1, DIM)


def copy_of(sharing: Sharing, job: SharingState, needed: list[int]) -> torch.Tensor:
    """`[L, n]` bool."""
    plan = sharing.copy_plan(job, PROMPT, own_plan(needed), keys_values, ALONE)
    assert torch.equal(plan.counts, plan.keep.sum(-1))
    return plan.keep[:, 0]


def test_a_copy_keeps_its_share_of_the_picture_and_all_text() -> None:
    keep = copy_of(make_sharing(MODEL, share="tiered", share_budget=0.25), make_job(), [50, 60])
    assert int(keep[:, VISION.begin : VISION.end].sum()) == round(0.25 * len(VISION) * LAYERS)
    assert bool(keep[:, : VISION.begin].all())
    assert bool(keep[:, VISION.end :].all()), "a question shorter than --kv-min-tokens stays whole"
    assert bool(keep[:, [50, 60]].all()), "what the question needs comes first"


def test_a_long_question_keeps_what_its_own_policy_keeps() -> None:
    keep = copy_of(make_sharing(MODEL, share="tiered"), make_job(min_tokens=8), [50, 210, 229])
    assert keep[:, VISION.end :].nonzero()[:, 1].unique().tolist() == [4, 23]


def test_a_profile_decides_which_layers_hold_the_picture(profile: str) -> None:
    sharing = make_sharing(MODEL, share="tiered", share_budget=0.3, profile=profile)
    keep = copy_of(sharing, make_job(), [50])[:, VISION.begin : VISION.end]
    assert keep.sum(-1).tolist() == [20, 20, 200, 0]
    assert sharing.weights == pytest.approx((20 / 240, 20 / 240, 200 / 240, 0))


def test_the_copy_before_comes_after_the_present_need() -> None:
    sharing, job = make_sharing(MODEL, share="tiered", share_budget=0.05), make_job()
    job.inherited = torch.zeros(LAYERS, VISION.end, dtype=torch.bool)
    job.inherited[:, 100:108] = True
    needed = list(range(20, 26))
    keep = copy_of(sharing, job, needed)
    assert bool(keep[:, needed].all())
    assert int(keep[0, 100:108].sum()) == 10 - len(needed)
    assert int(keep[0, VISION.begin : VISION.end].sum()) == 10


def test_the_choice_of_a_copy_is_the_scorers_where_nobody_needs_anything() -> None:
    sharing = make_sharing(MODEL, share="tiered", share_scorer="knorm")
    keep = copy_of(sharing, make_job(), [])
    norms = keys_values(1)[VISION.begin : VISION.end, 0].norm(dim=-1).mean(1)
    smallest = norms.argsort()[: int(keep[1, VISION.begin : VISION.end].sum())]
    assert sorted(smallest.tolist()) == keep[1, VISION.begin : VISION.end].nonzero().flatten().tolist()


def test_policy_sharing_is_left_alone_until_a_question_trips() -> None:
    sharing, job = make_sharing(MODEL, guard="enforce"), make_job("policy")
    own = own_plan([50])
    assert sharing.copy_plan(job, PROMPT, own, keys_values, ALONE) is own
    assert job.image is not None
    job.image.tripped, job.image.leader, job.generation = 1, object(), 1
    assert sharing.copy_plan(job, PROMPT, own, keys_values, ALONE) is not own
    assert job.image.level == 1


def test_an_image_settles() -> None:
    images, image = SharedImages(), SharedImage(1)
    budgets = []
    for _ in range(LEVELS + 1):
        budgets.append(image.budget(0.2))
        image.tripped = 1
        images.learn(image)
    assert budgets == [0.2, 0.2, 0.4, 1.0]
    assert image.settled
    images.learn(image)
    assert (image.level, images.settled) == (LEVELS, 1)


def test_a_storm_settles_it_at_once() -> None:
    image = SharedImage(1, tripped=8)
    SharedImages().learn(image)
    assert image.budget(0.1) == 1.0


def test_names_of_generations() -> None:
    images = SharedImages()
    one = images.find(TOKENS, 206, ("key", None))
    assert images.find(array("q", [*range(206), 7, 8]), 206, ("key", None)) is one
    assert images.find(TOKENS, 206, ("other", None)) is not one
    assert images.find(array("q", [9, *range(1, 206)]), 206, ("key", None)) is not one
    assert one.namespace(0) == "", "other pictures share the text before"
    assert len({one.namespace(1), one.namespace(2), images.find(TOKENS, 206, ("other", None)).namespace(1)}) == 3


def test_a_replaced_copy_takes_its_sketches_with_it() -> None:
    images = SharedImages()
    sharing = make_sharing(MODEL, images, guard="observe")
    image = images.find(TOKENS, 206, ())
    image.tripped, image.leader = 3, object()
    job = make_job("policy", image=image)
    keep = own_plan([1, 2, 3]).keep
    for job.generation in (0, 1):
        sharing.remember(job, PROMPT, keep, keys_of)
    assert len(image.sketches) == 2
    copy = StaleCopy(TOKENS[:206], VISION, "key", None)
    images.replaced(image, copy)
    assert (image.generation, image.tripped, image.leader, image.stale) == (1, 0, None, [copy])
    assert [sketch.generation for sketch in image.sketches.values()] == [1]
    assert images.with_stale() == [image]
    image.stale.clear()
    assert images.with_stale() == []


def test_sketches_are_bounded() -> None:
    images = SharedImages()
    sharing = make_sharing(MODEL, images, guard="observe")
    for number in range(40):
        job = make_job("policy", image=images.find(array("q", [number, *range(1, 230)]), 206, ()))
        sharing.remember(job, PROMPT, own_plan([1]).keep, keys_of)
        assert images.sketch_bytes <= 0.03 * 2**20
    assert 1 < sum(bool(image.sketches) for image in images) < 40
    images.clear()
    assert images.sketch_bytes == 0


def guarded(sharing: Sharing, kept: list[int]) -> GuardReading:
    """The reading of a second question about a picture of which a first one kept `kept`."""
    job = make_job("policy")
    sharing.remember(job, PROMPT, own_plan(kept).keep, keys_of)
    sharing.watch(job, VISION.end)
    assert job.guard is not None
    return job.guard


def true_missing(kept: list[int], queries: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
    """Mean over rows and heads, in float64; the rows see the kept tokens and nothing of their own."""
    keys = keys_values(layer)[: VISION.end, 0].double().repeat_interleave(HEADS // KV_HEADS, 1)
    p = (torch.einsum("rhd,nhd->rhn", queries.double(), keys) * scale).softmax(-1)
    return 1 - p[..., kept].sum(-1).mean()


def test_the_guard_reads_what_is_missing(profile: str) -> None:
    scale = DIM**-0.5
    queries = torch.randn(LAYERS, 9, HEADS, DIM, generator=torch.Generator().manual_seed(9)) * 2
    kept = list(range(0, VISION.end, 4))
    for settings in ({}, {"profile": profile}):
        sharing = make_sharing(MODEL, guard="observe", **settings)
        guard = guarded(sharing, kept)
        assert guard.rows(VISION.end, 24) == slice(20, 24)
        assert guard.rows(100, 128) == slice(126, 128)
        assert guard.rows(VISION.end, 2) == slice(2, 2)
        for layer in range(LAYERS):
            keys = keys_values(layer)[kept, 0].repeat_interleave(HEADS // KV_HEADS, 1)
            lse = (torch.einsum("rhd,nhd->rhn", queries[layer], keys) * scale).logsumexp(-1)
            for part in (slice(0, 5), slice(5, 9)):
                guard.observe(layer, queries[layer, part], lse[part], scale)
        guard.close(ALONE.mean, torch.device("cpu"))
        want = sum(w * float(true_missing(kept, queries[i], i, scale)) for i, w in enumerate(sharing.weights))
        assert guard.missing == pytest.approx(want, abs=0.1)


def test_a_guard_that_failed_reads_nothing() -> None:
    guard = guarded(make_sharing(MODEL, guard="observe"), [1, 2])
    assert not guard.closed
    guard.failure = RuntimeError("out of memory")
    guard.close(ALONE.mean, torch.device("cpu"))
    assert guard.closed
    assert guard.missing != guard.missing


def test_no_guard_where_nothing_is_known_or_nothing_was_evicted() -> None:
    sharing = make_sharing(MODEL, guard="observe")
    job = make_job("policy")
    sharing.watch(job, VISION.end)
    assert job.guard is None
    sharing.remember(job, PROMPT, own_plan(list(range(LENGTH))).keep, keys_of)
    sharing.watch(job, VISION.end)
    assert job.guard is None
    sharing.remember(job, PROMPT, own_plan([1]).keep, keys_of)
    sharing.watch(job, VISION.begin + 3)
    assert job.guard is None, "the hit ends inside the picture"
    job.generation = 1
    sharing.watch(job, VISION.end)
    assert job.guard is None, "another generation's sketch"


def test_heads_with_cells_of_their_own_are_sketched_apart() -> None:
    sharing = make_sharing(MODEL, guard="observe")
    keep = torch.rand(LAYERS, KV_HEADS, LENGTH, generator=torch.Generator().manual_seed(1)).argsort(-1) < 40
    job = make_job("policy")
    keep[..., VISION.end :] = True
    counts = keep[..., : VISION.end].sum(-1)
    keep[..., : VISION.end] = torch.arange(VISION.end) < counts.amin()  # equally many, as with heads=split
    sharing.remember(job, PROMPT, keep, keys_of)
    assert job.image is not None
    (sketch,) = job.image.sketches.values()
    assert [layers for layers, _ in sketch.groups] == [(0, 1, 2, 3)]
    assert sketch.groups[0][1].codes.shape[0] == LAYERS * KV_HEADS


@pytest.mark.parametrize("scorer", ["vlcache", "snapkv", "h2o", "expected_attention"])
def test_what_looks_at_the_question_makes_no_copies(scorer: str) -> None:
    with pytest.raises(PolicyError, match="scorer"):
        require_agnostic(resolve(f"scorer={scorer},allocator=uniform"))


def test_layers_alike_without_a_profile() -> None:
    assert layer_weights(resolve("scorer=keydiff,allocator=uniform"), MODEL, 0.2) == (0.25,) * 4


def test_digests_tell_prefixes_apart() -> None:
    assert prefix_digest(TOKENS, 10) == prefix_digest(array("q", range(11)), 10)
    assert len({prefix_digest(TOKENS, 10), prefix_digest(TOKENS, 11), prefix_digest(TOKENS, 10, b"1")}) == 3


def test_first_decode_steps_are_read() -> None:
    scale = DIM**-0.5
    sharing = make_sharing(MODEL, guard="observe")
    job = make_job("policy")
    kept = list(range(0, VISION.end, 4))
    sharing.remember(job, PROMPT, own_plan(kept).keep, keys_of)
    sharing.watch(job, VISION.end)
    guard = job.decode_guard
    assert guard is not None
    assert [guard.wants(LENGTH + step) for step in (0, 1, 2, 3)] == [False, True, True, False]
    queries = torch.randn(2, LAYERS, HEADS, DIM, generator=torch.Generator().manual_seed(9)) * 2
    blank = torch.zeros(2, KV_HEADS, DIM)  # the steps' own, of hardly any weight
    for step in (0, 1):
        assert not guard.complete
        for layer in range(LAYERS):
            guard.observe(layer, queries[step, layer], scale)
        guard.end_step(lambda layer: torch.cat([keys_values(layer)[kept, 0], blank]), ALONE.mean)
    want = [
        sum(float(true_missing(kept, queries[step, layer, None], layer, scale)) / LAYERS for layer in range(LAYERS))
        for step in (0, 1)
    ]
    assert guard.complete
    assert guard.missing == pytest.approx(sum(want) / 2, abs=0.1)


def test_a_decode_step_does_not_see_the_next_one() -> None:
    reading = DecodeReading((), (1.0,), LENGTH)
    steps = [torch.ones(HEADS, DIM), torch.ones(HEADS, DIM)]
    keys = torch.zeros(3, KV_HEADS, DIM)
    keys[2] = 10  # the second step's own
    queries, lse = reading._rows(steps, keys)
    assert queries.shape == (2, HEADS, DIM)
    torch.testing.assert_close(lse[0], torch.full((HEADS,), 2.0).log())
    torch.testing.assert_close(lse[1], torch.full((HEADS,), 10.0 * DIM))


def test_decode_steps_that_cannot_be_read_are_not_known() -> None:
    sharing = make_sharing(MODEL, guard="observe")
    job = make_job("policy")
    sharing.remember(job, PROMPT, own_plan([1]).keep, keys_of)
    sharing.watch(job, VISION.end)
    guard = job.decode_guard
    assert guard is not None

    def lost(layer: int) -> torch.Tensor:
        raise IndexError(layer)

    for _ in range(2):
        guard.observe(0, torch.randn(HEADS, DIM), 1.0)
        guard.end_step(lost, ALONE.mean)
    assert isinstance(guard.failure, IndexError)
    assert guard.complete
    assert guard.missing is None
