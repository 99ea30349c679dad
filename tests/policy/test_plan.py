"""A plan keeps exactly what it should, protected tokens first."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_sgl.api import Prompt, Selection, Span
from vlcache_sgl.policy.plan import PolicyFault, make_plan

LAYERS, HEADS = 3, 2


def prompt(length: int, start: int = 0, vision: tuple[Span, ...] = ()) -> Prompt:
    return Prompt(length, start, vision, num_layers=LAYERS, num_heads=4, num_kv_heads=HEADS, head_dim=8)


SELECTIONS = st.builds(
    Selection,
    sink=st.integers(0, 6),
    recent=st.one_of(st.floats(0, 0.99), st.integers(1, 20).map(float)),
    protect=st.sampled_from(["none", "text"]),
    heads=st.sampled_from(["shared", "split"]),
    reduce=st.sampled_from(["mean", "max"]),
    span=st.sampled_from([1, 1, 4, 20]),
)


@st.composite
def problems(draw):
    length = draw(st.integers(1, 60))
    start = draw(st.integers(0, length - 1))
    begin = draw(st.integers(0, length))
    end = draw(st.integers(begin, length))
    given_prompt = prompt(length, start, (Span(begin, end),) if end > begin else ())
    owned = given_prompt.owned
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Few distinct values, so that ties are common.
    scores = torch.randint(-3, 4, (LAYERS, HEADS, owned), generator=generator).float() / 4
    counts = torch.tensor([draw(st.integers(0, owned)) for _ in range(LAYERS)])
    return scores, counts, given_prompt, draw(SELECTIONS)


def reference(scores, counts, given_prompt, selection):
    """The documented order, one token at a time."""
    owned, start = given_prompt.owned, given_prompt.start
    vision = given_prompt.is_vision().tolist()
    groups = scores
    if selection.heads == "shared":
        groups = scores.mean(1, keepdim=True) if selection.reduce == "mean" else scores.amax(1, keepdim=True)
    keep = torch.zeros(groups.shape, dtype=torch.bool)
    for layer in range(LAYERS):
        count = int(counts[layer])
        sinks = [p for p in range(owned) if start + p < selection.sink][:count]
        window = selection.recent if selection.recent >= 1 else math.floor(selection.recent * count + 1e-9)
        window = max(int(window), 1 if selection.recent > 0 else 0)
        recent = [p for p in reversed(range(owned)) if p not in sinks][: min(window, count - len(sinks))]
        for group in range(groups.shape[1]):
            value = groups[layer, group].tolist()
            runs = {
                p: [q for q in range(owned) if (start + q) // selection.span == (start + p) // selection.span]
                for p in range(owned)
            }
            mean = {p: round(sum(value[q] for q in runs[p]) / len(runs[p]), 5) for p in range(owned)}
            rest = [p for p in range(owned) if p not in sinks and p not in recent]
            rest.sort(key=lambda p: (not (selection.protect == "text" and not vision[p]), -mean[p], p))
            for p in [*sinks, *recent, *rest][:count]:
                keep[layer, group, p] = True
    return keep


@settings(max_examples=300, deadline=None)
@given(problems())
def test_counts_are_exact_and_order_is_the_documented_one(problem):
    scores, counts, given_prompt, selection = problem
    plan = make_plan(list(scores), counts, given_prompt, selection)
    groups = 1 if selection.heads == "shared" else HEADS
    assert plan.keep.shape == (LAYERS, groups, given_prompt.owned)
    assert plan.keep.dtype == torch.bool
    assert torch.equal(plan.keep.sum(-1), plan.counts)
    assert torch.equal(plan.counts, counts[:, None].expand(-1, groups))
    assert plan.total == int(counts.sum())
    if selection.span == 1:
        assert torch.equal(plan.keep, reference(scores, counts, given_prompt, selection))
    else:
        # Means of thirds are not exact: only distinct scores have one order.  See the next test.
        assert torch.equal(plan.keep, make_plan(scores.unbind(), counts, given_prompt, selection).keep)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_runs_with_distinct_means(problem):
    scores, counts, given_prompt, selection = problem
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(int(counts.sum())))
    plan = make_plan(list(scores + noise), counts, given_prompt, selection)
    assert torch.equal(plan.keep, reference(scores + noise, counts, given_prompt, selection))


@settings(max_examples=50, deadline=None)
@given(problems())
def test_a_larger_budget_only_adds(problem):
    scores, counts, given_prompt, selection = problem
    if 0 < selection.recent < 1:
        return  # the window grows with the budget and may displace a scored token
    less = make_plan(list(scores), counts // 2, given_prompt, selection)
    more = make_plan(list(scores), counts, given_prompt, selection)
    if selection.recent == 0 or int(counts.min()) // 2 >= selection.sink + selection.recent:
        assert not bool((less.keep & ~more.keep).any())


def test_heads_may_keep_different_numbers_of_tokens():
    """Every head keeps its own best; the total counts a layer as the mean of its heads."""
    counts = torch.tensor([[2, 5], [0, 10], [3, 3]])[:LAYERS]
    scores = [torch.stack([torch.arange(10.0), -torch.arange(10.0)])] * LAYERS
    plan = make_plan(scores, counts, prompt(10), Selection(heads="split", recent=1))
    assert torch.equal(plan.keep.sum(-1), plan.counts)
    assert torch.equal(plan.counts, counts)
    assert plan.differs_by_head
    assert (kept(plan, 0, 0), kept(plan, 0, 1)) == ([8, 9], [0, 1, 2, 3, 9])
    assert kept(plan, 1, 0) == []
    assert plan.total == int(counts.sum()) / 2
    assert plan.tokens_per_layer == [3.5, 5.0, 3.0][:LAYERS]
    with pytest.raises(PolicyFault, match=r"shape \(3, 2\), expected \(3,\)"):
        make_plan(scores, counts, prompt(10), Selection())


def kept(plan, layer=0, group=0):
    return plan.keep[layer, group].nonzero().flatten().tolist()


def equal_counts(count):
    return torch.full((LAYERS,), count, dtype=torch.int64)


def rising(length):
    return [torch.arange(length, dtype=torch.float32).expand(HEADS, -1)] * LAYERS


def test_ties_go_to_the_lower_position():
    plan = make_plan([torch.zeros(HEADS, 10)] * LAYERS, equal_counts(4), prompt(10), Selection())
    assert kept(plan) == [0, 1, 2, 3]


def test_minus_zero_ties_with_zero():
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0]).expand(HEADS, -1)
    assert kept(make_plan([scores] * LAYERS, equal_counts(2), prompt(4), Selection(heads="split"))) == [0, 1]


def test_negative_and_tiny_scores_are_ordered():
    scores = torch.tensor([-5.0, -1e-30, 1e-38, 3e-39, -2.0]).expand(HEADS, -1)
    assert kept(make_plan([scores] * LAYERS, equal_counts(3), prompt(5), Selection())) == [1, 2, 3]


def test_sinks_are_those_of_the_prompt_not_of_the_owned_part():
    selection = Selection(sink=4)
    assert kept(make_plan(rising(10), equal_counts(5), prompt(10), selection)) == [0, 1, 2, 3, 9]
    assert kept(make_plan(rising(7), equal_counts(3), prompt(10, start=3), selection)) == [0, 5, 6]
    assert kept(make_plan(rising(5), equal_counts(3), prompt(10, start=5), selection)) == [2, 3, 4]


def test_a_window_that_does_not_fit_shrinks_from_its_old_end():
    falling = [-scores for scores in rising(10)]
    assert kept(make_plan(falling, equal_counts(4), prompt(10), Selection(sink=1, recent=8))) == [0, 7, 8, 9]


def test_recent_share_is_of_the_layers_own_budget():
    falling = [-scores for scores in rising(100)]
    counts = torch.tensor([50, 10, 3])
    plan = make_plan(falling, counts, prompt(100), Selection(recent=0.1))
    assert kept(plan, 0) == [*range(45), 95, 96, 97, 98, 99]
    assert kept(plan, 1) == [*range(9), 99]
    assert kept(plan, 2) == [0, 1, 99]


def test_protected_text_goes_before_better_vision_tokens():
    given_prompt = prompt(10, vision=(Span(6, 10),))
    assert kept(make_plan(rising(10), equal_counts(7), given_prompt, Selection(protect="text"))) == [
        0,
        1,
        2,
        3,
        4,
        5,
        9,
    ]
    assert kept(make_plan(rising(10), equal_counts(2), given_prompt, Selection(protect="text"))) == [4, 5]


def test_runs_stay_whole_and_the_last_gives_its_lower_part():
    scores = torch.tensor([0, 9, 0, 0, 5, 5, 5, 5, 1, 1.0]).expand(HEADS, -1)
    selection = Selection(span=4)
    assert kept(make_plan([scores] * LAYERS, equal_counts(4), prompt(10), selection)) == [4, 5, 6, 7]
    assert kept(make_plan([scores] * LAYERS, equal_counts(6), prompt(10), selection)) == [0, 1, 4, 5, 6, 7]


def test_split_heads_keep_their_own():
    scores = torch.stack([torch.arange(6.0), -torch.arange(6.0)])
    plan = make_plan([scores] * LAYERS, equal_counts(2), prompt(6), Selection(heads="split"))
    assert (kept(plan, group=0), kept(plan, group=1)) == ([4, 5], [0, 1])


def test_shared_heads_are_reduced():
    scores = torch.tensor([[0.0, 4.0, 3.0], [3.5, -4.0, 0.0]])
    assert kept(make_plan([scores] * LAYERS, equal_counts(1), prompt(3), Selection(reduce="max"))) == [1]
    assert kept(make_plan([scores] * LAYERS, equal_counts(1), prompt(3), Selection(reduce="mean"))) == [0]


def test_nothing_owned():
    plan = make_plan([torch.zeros(HEADS, 0)] * LAYERS, equal_counts(0), prompt(5, start=5), Selection(sink=2))
    assert plan.keep.shape == (LAYERS, 1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"scores": [torch.full((HEADS, 8), math.nan)] * LAYERS}, "layer 0 contain NaN", id="nan"),
        pytest.param({"scores": [torch.full((HEADS, 8), math.inf)] * LAYERS}, "contain NaN or infinity", id="inf"),
        pytest.param({"scores": [torch.zeros(HEADS, 7)] * LAYERS}, r"shape \(2, 7\), expected \(2, 8\)", id="owned"),
        pytest.param({"scores": [torch.zeros(1, 8)] * LAYERS}, r"shape \(1, 8\)", id="heads"),
        pytest.param({"scores": [torch.zeros(HEADS, 8)]}, "scores for 1 layers, expected 3", id="layers"),
        pytest.param({"scores": [torch.zeros(HEADS, 8).long()] * LAYERS}, "torch.int64, expected a float", id="int"),
        pytest.param({"scores": [None] * LAYERS}, "are a NoneType", id="none"),
        pytest.param({"counts": torch.tensor([1, 2, 9])}, r"\[0, 8\], got \[1, 2, 9\]", id="too-many"),
        pytest.param({"counts": torch.tensor([1, 2, -1])}, r"\[0, 8\]", id="negative"),
        pytest.param({"counts": torch.tensor([1, 2])}, r"shape \(2,\), expected \(3,\)", id="counts-shape"),
        pytest.param({"counts": torch.ones(3)}, "torch.float32, expected int64", id="counts-float"),
        pytest.param({"counts": [1, 2, 3]}, "are a list", id="counts-list"),
    ],
)
def test_faults_say_what_is_wrong(change, message):
    arguments = {"scores": rising(8), "counts": equal_counts(2), **change}
    with pytest.raises(PolicyFault, match=message):
        make_plan(arguments["scores"], arguments["counts"], prompt(8), Selection())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sink": -1}, "sink"),
        ({"recent": -0.1}, "recent"),
        ({"recent": 1.5}, "recent"),
        ({"span": 0}, "span"),
        ({"floor": 1.1}, "floor"),
        ({"protect": "all"}, "none, text"),
        ({"heads": "own"}, "shared, split"),
        ({"reduce": "sum"}, "mean, max"),
    ],
    ids=str,
)
def test_selection_checks_its_ranges(change, message):
    with pytest.raises(ValueError, match=message):
        Selection(**change)


@pytest.mark.gpu
def test_cuda_gives_the_same_plan():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(LAYERS, HEADS, 500, generator=generator)
    counts = torch.tensor([50, 0, 499])
    for selection in (Selection(), Selection(sink=4, recent=0.1, protect="text", span=7, heads="split")):
        given_prompt = prompt(510, 10, (Span(20, 400),))
        on_cpu = make_plan(list(scores), counts, given_prompt, selection)
        on_gpu = make_plan(list(scores.cuda()), counts.cuda(), given_prompt, selection)
        assert torch.equal(on_cpu.keep, on_gpu.keep.cpu())
