"""Weights of a model: what a file holds, which model it belongs to, what `--kv-weights` means."""

import json
import os
import subprocess
import sys

import pytest

from vlcache_sgl.weights import ModelWeights, cache_file, find_weights, model_key, read_weights

WEIGHTS = ModelWeights((0.5, 0.1), ((0.6, 0.4), (0.0, 0.2)), "key", {"prompts": 3})


def checkpoint(folder, config='{"layers": 2}', tensors=b"abc"):
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(tensors)
    return folder


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "weights.json"
    WEIGHTS.write(path)
    assert read_weights(path) == WEIGHTS
    assert [file.name for file in path.parent.iterdir()] == ["weights.json"]


def test_a_list_is_enough(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[0.5, 1, 0]")
    assert read_weights(path) == ModelWeights((0.5, 1.0, 0.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "Expecting value"),
        ('{"weights": [1]}', "is not a file of `vlcache calibrate`"),
        ("[]", "shares in"),
        ("[0, 0]", "not all 0"),
        ("[1, 2]", "shares in"),
        ('[1, "a"]', "lists of numbers"),
        ("[NaN]", "lists of numbers"),
        ('{"format": 1, "layers": [1, 0], "heads": [[1, 0]]}', "heads must list 2 layers"),
        ('{"format": 1, "layers": [1, 0], "heads": [[1, 0], [1]]}', "equally many KV heads"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "wrong.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused():
    WEIGHTS.check(2, 2)
    with pytest.raises(ValueError, match="has 2 layers, the model has 3"):
        WEIGHTS.check(3, 2)
    with pytest.raises(ValueError, match="has 2 KV heads, the model has 4"):
        WEIGHTS.check(2, 4)


def test_the_digest_is_that_of_the_numbers():
    assert WEIGHTS.digest == ModelWeights(WEIGHTS.layers, WEIGHTS.heads).digest
    assert WEIGHTS.digest != ModelWeights(WEIGHTS.layers).digest


def test_a_model_is_known_by_its_content(tmp_path):
    key = model_key(checkpoint(tmp_path / "a"))
    assert key == model_key(checkpoint(tmp_path / "b"))
    assert key != model_key(checkpoint(tmp_path / "c", config='{"layers": 3}'))
    assert key != model_key(checkpoint(tmp_path / "d", tensors=b"abd"))


def test_tests_and_their_servers_keep_out_of_the_users_cache(tmp_path, monkeypatch):
    """A folder of its own, not `XDG_CACHE_HOME`: other packages keep there what is slow to make again."""
    code = "from vlcache_sgl.weights import cache_file; print(cache_file('key'))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert seen == str(cache_file("key")) == os.path.join(os.environ["VLCACHE_CACHE"], "weights", "key.json")
    monkeypatch.delenv("VLCACHE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file("key") == tmp_path / ".cache/vlcache-sgl/weights/key.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_file("key") == tmp_path / "cache/vlcache-sgl/weights/key.json"


def test_what_the_flag_means(tmp_path, monkeypatch):
    monkeypatch.setenv("VLCACHE_CACHE", str(tmp_path / "cache"))
    folder = checkpoint(tmp_path / "model")
    assert find_weights("auto", str(folder)) is None
    assert find_weights("auto", "nobody/knows-this-model") is None
    WEIGHTS.write(cache_file(model_key(folder)))
    assert find_weights("auto", str(folder)) == WEIGHTS
    assert find_weights("off", str(folder)) is None
    other = tmp_path / "other.json"
    other.write_text(json.dumps([1.0, 0.25]))
    assert find_weights(str(other), str(folder)) == ModelWeights((1.0, 0.25))
