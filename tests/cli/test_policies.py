"""`vlcache policies`."""

from dataclasses import replace

import pytest

from vlcache_sgl.api import Needs, Rows
from vlcache_sgl.cli import policies
from vlcache_sgl.cli.main import main
from vlcache_sgl.policy.describe import describe, describe_needs, parameters_of
from vlcache_sgl.policy.manager import registry


def test_lists_every_name_with_its_facts(capsys):
    assert main(["policies"]) == 0
    printed = capsys.readouterr().out
    for item in describe(registry()):
        assert item.name in printed
    for fact in ("snapkv x pyramid", "last 32 rows: column_sum", "window=32", "2410.23317", "vlcache-sgl 0."):
        assert fact in printed


def test_explains_one_with_its_parts(capsys):
    assert main(["policies", "pyramidkv"]) == 0
    printed = capsys.readouterr().out
    assert "made of: snapkv x pyramid" in printed
    assert "https://arxiv.org/abs/2406.02069" in printed
    for text in ("scorer snapkv", "allocator pyramid", "kernel", "avg|max", "How many times less than the average"):
        assert text in printed


def test_says_what_a_prefix_hit_does_and_what_the_variants_are(capsys):
    main(["policies", "h2o"])
    printed = capsys.readouterr().out
    assert "after a prefix hit: only the request's own new rows count" in printed
    assert "variants: mean (mean=true)" in printed


def test_a_name_may_be_several_things(capsys):
    main(["policies", "cake"])
    printed = capsys.readouterr().out
    for kind in ("policy", "scorer", "allocator"):
        assert f"{kind} cake" in printed


def test_the_list_has_the_sentence_of_each(capsys):
    main(["policies"])
    printed = "".join(capsys.readouterr().out.split())
    for entry in (*registry().recipes.values(), *registry().scorers.values(), *registry().allocators.values()):
        assert all(word in printed for word in entry.record.summary.split())


def test_unknown_name_lists_the_choices(capsys):
    assert main(["policies", "snapkw"]) == 2
    error = capsys.readouterr().err
    assert "nothing is called 'snapkw' (did you mean 'snapkv'?); choose from: aircache, cake" in error


def test_broken_plugins_are_told_and_the_rest_is_listed(capsys, monkeypatch):
    broken = replace(registry(), problems=("acme 2 (entry point a = b): cannot be imported: no",))
    monkeypatch.setattr(policies, "registry", lambda: broken)
    assert policies.main([]) == 1
    captured = capsys.readouterr()
    assert "snapkv" in captured.out
    assert "broken plugin: acme 2 (entry point a = b): cannot be imported: no" in captured.err


@pytest.mark.parametrize(
    ("needs", "text"),
    [
        (Needs(), "nothing"),
        (Needs(keys=True, values=True), "keys, values"),
        (Needs(rows=Rows.last(1), column_sum=True), "last row: column_sum"),
        (Needs(rows=Rows.post_vision(50), density=0.01), "post-vision rows (at most 50): density"),
        (Needs(rows=Rows.all(), queries=True, keys=True, rotary=True), "all rows: queries; keys, rotary"),
    ],
)
def test_needs_in_words(needs, text):
    assert describe_needs(needs) == text


def test_every_parameter_with_a_text_has_it_from_the_source():
    factory = registry().scorer("lagkv").record.factory
    first, lag = parameters_of(factory)
    assert (first.name, first.type, first.default) == ("first", "int", "4")
    assert first.text == "Leading tokens of the prompt that always stay."
    assert lag.text == "Tokens of a partition."
