"""Offline layer weights from a file."""

import json

import pytest

from vlcache_sgl.api import LayerView
from vlcache_sgl.api.testing import synthetic_prompt
from vlcache_sgl.policy import resolve


def counts(settings: str) -> list[int]:
    prompt = synthetic_prompt(80, num_layers=3)
    views = [LayerView(index) for index in range(3)]
    return resolve(f"scorer=random,allocator=table,{settings}").decide(views, views, prompt, 60).counts.tolist()


def test_table(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps([1, 2, 7]))
    assert counts(f"file={path}") == [6, 12, 42]
    assert counts(f"file={path},most=1.5") == [10, 20, 30]
    assert counts(f"file={path},floor=0.5") == [10, 11, 39]


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


def test_table_needs_a_file_and_takes_none_from_requests(tmp_path):
    with pytest.raises(ValueError, match="file=PATH is required"):
        resolve("scorer=random,allocator=table")
    with pytest.raises(ValueError, match="can only be set by --kv-policy"):
        resolve(f"scorer=random,allocator=table,file={tmp_path}", from_request=True)
