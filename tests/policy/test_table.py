"""Offline layer weights, from a file or spelled out."""

import json

import pytest

from vlcache_sgl.api import LayerView
from vlcache_sgl.api.testing import synthetic_prompt
from vlcache_sgl.policy import resolve
from vlcache_sgl.policy.plan import EvictionPlan


def decide(settings: str, total: int, *, vision: tuple[int, int] | None = None, layers: int = 3) -> EvictionPlan:
    prompt = synthetic_prompt(80, [vision] if vision else [], num_layers=layers)
    views = [LayerView(index) for index in range(layers)]
    return resolve(f"scorer=random,allocator=table,{settings}", from_request="file=" not in settings).decide(
        views, views, prompt, total
    )


def counts(settings: str, total: int = 60, **options) -> list[float]:
    return decide(settings, total, **options).tokens_per_layer


def test_table(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps([1, 2, 7]))
    assert counts(f"file={path}") == [6, 12, 42]
    assert counts(f"file={path},most=1.5") == [10, 20, 30]
    assert counts(f"file={path},floor=0.5") == [10, 11, 39]


def test_a_request_may_spell_the_weights_out():
    assert counts("weights=1/2/7") == [6, 12, 42]
    assert counts("weights=1/2/7,floor=0.5") == [10, 11, 39]


@pytest.mark.parametrize("weights", ["1/1/10/0/0/0", "0.1/0.1/1/0/0/0"])
def test_a_profile_at_its_own_share_is_exact(weights):
    """A tenth of two layers, one layer whole, three layers empty: a fifth of everything."""
    assert counts(f"weights={weights}", 96, layers=6) == [8, 8, 80, 0, 0, 0]


def test_a_file_and_its_inline_form_keep_the_same(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"weights": [0.25, 1, 0], "share": 0.4167, "trials": []}))
    for rest in ("floor=0", "basis=vision,protect=text"):
        options = {"vision": (5, 75)}
        assert counts(f"file={path},{rest}", 100, **options) == counts(f"weights=0.25/1/0,{rest}", 100, **options)


def test_shares_of_vision_leave_the_text_alone():
    """10 of 80 tokens are text: they stay in every layer, and so does the weight's share of the other 70."""
    plan = decide("weights=0.1/1/0,basis=vision,protect=text", 239, vision=(5, 75))
    assert plan.tokens_per_layer == [10 + 7, 80, 10]
    text = [*range(5), *range(75, 80)]
    assert bool(plan.keep[:, :, text].all())
    assert plan.keep[2, 0].nonzero().flatten().tolist() == text


def test_shares_of_vision_are_bounded_by_the_budget():
    """107 are wanted, half of it is there: every layer gets about half of what it wants."""
    halved = counts("weights=0.1/1/0,basis=vision,protect=text", 53, vision=(5, 75))
    assert sum(halved) == 53
    assert halved == [8, 40, 5]


def test_shares_of_vision_without_vision_keep_everything():
    assert counts("weights=0.1/1/0,basis=vision", 239) == [80, 80, 79]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, -2]", "list of numbers >= 0"),
        ("[0, 0]", "list of numbers >= 0"),
        ('{"layers": [1]}', "list of numbers >= 0"),
        ("[true, 1]", "list of numbers >= 0"),
        ("[NaN]", "list of numbers >= 0"),
        ("not json", "cannot read layer weights"),
        (None, "cannot read layer weights"),
    ],
)
def test_table_says_what_is_wrong_with_its_file(tmp_path, content, message):
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"allocator table: .*{message}"):
        resolve(f"scorer=random,allocator=table,file={path}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("weights=1/-2", "numbers >= 0 separated by /"),
        ("weights=0/0/0", "not all 0"),
        ("weights=1/x", "numbers >= 0 separated by /"),
        ("weights=1//2", "numbers >= 0 separated by /"),
        ("weights=nan/1", "numbers >= 0 separated by /"),
        ("weights=1/inf", "numbers >= 0 separated by /"),
        ("weights=1/2/7,basis=vision", "shares in .0, 1., got 7"),
        ("weights=1/2,most=0.5", "most must be 0 or at least 1"),
        ("weights=1/2,basis=text", "must be one of budget, vision"),
    ],
)
def test_table_says_what_is_wrong_with_its_settings(settings, message):
    with pytest.raises(ValueError, match=f"allocator table.*{message}"):
        resolve(f"scorer=random,allocator=table,{settings}")


def test_table_needs_weights_for_every_layer():
    for settings in ("weights=1/0.5", "weights=1/0.5,basis=vision"):
        with pytest.raises(ValueError, match=r"weights= has 2 weights, the model has 3 layers"):
            resolve(f"scorer=random,allocator=table,{settings}").require(synthetic_prompt(80, num_layers=3))


def test_table_takes_one_of_file_and_weights_and_no_file_from_requests(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text("[1]")
    for settings in ("", f",file={path},weights=1"):
        with pytest.raises(ValueError, match="give one of file=PATH"):
            resolve(f"scorer=random,allocator=table{settings}")
    with pytest.raises(ValueError, match="can only be set by --kv-policy"):
        resolve(f"scorer=random,allocator=table,file={path}", from_request=True)


def test_the_fingerprint_tells_weights_apart():
    one, two = (resolve(f"scorer=random,allocator=table,weights={w}").fingerprint for w in ("1/2", "1/3"))
    assert one != two
