"""What docs/security.md promises about tenants and requests, on a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

TENANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "salts": ({"cache_salt": "a"}, {"cache_salt": "b"}),
    "salt and none": ({"cache_salt": "a"}, {}),
    "keys": ({"extra_key": "a"}, {"extra_key": "b"}),
    "key and none": ({"extra_key": "a"}, {}),
    "key and salt swapped": ({"extra_key": "a", "cache_salt": "b"}, {"extra_key": "b", "cache_salt": "a"}),
}


@pytest.mark.parametrize("tenants", TENANTS.values(), ids=TENANTS.keys())
def test_a_tenants_compressed_prefix_is_unreachable(ours_tenth: Any, picture: Any, tenants: Any) -> None:
    """The same image and question: the owner hits what it has stored, the other computes all of it again."""
    server, (mine, theirs) = ours_tenth, tenants
    drawn = picture(8100)
    question = drawn.questions[0].text
    server.flush()
    before = server.settled()["requests_compressed"]
    first = server.ask(question, drawn.image, **mine)
    assert first.cached_tokens == 0
    stranger = server.ask(question, drawn.image, **theirs)
    assert stranger.cached_tokens == 0
    assert server.settled()["requests_compressed"] == before + 2
    assert server.ask(question, drawn.image, **mine).cached_tokens > 0.9 * first.prompt_tokens
    assert server.ask(question, drawn.image, **theirs).cached_tokens > 0.9 * first.prompt_tokens


def test_a_key_that_imitates_a_policys_namespace(ours_tenth: Any, picture: Any) -> None:
    """Refused: a request without compression would read, or fill, the compressed prefixes of others."""
    server = ours_tenth
    drawn = picture(8110)
    fingerprint = server.kv_state()["fingerprint"]
    for key in (f"|kv:{fingerprint}", f"x|kv:{fingerprint}", "|kv:"):
        for params in ({"kv_budget": 1.0}, {}):
            with pytest.raises(openai.BadRequestError, match="extra_key"):
                server.ask(drawn.questions[0].text, drawn.image, extra_key=key, custom_params=params)
    server.assert_alive()


@pytest.mark.parametrize(
    "policy",
    [
        "scorer=vlcache,allocator=table,file=/etc/passwd",
        "os.system:command=id",
        "scorer=os:system,allocator=uniform",
        "scorer=../../evil,allocator=uniform",
        "vlcache_policies.snapkv",
        "vlcache:" + "sink=1," * 1000,
    ],
)
def test_requests_load_no_code_and_read_no_files(ours_tenth: Any, picture: Any, policy: str) -> None:
    drawn = picture(8120)
    with pytest.raises(openai.BadRequestError) as refused:
        ours_tenth.ask(drawn.questions[0].text, drawn.image, custom_params={"kv_policy": policy})
    assert len(str(refused.value)) < 4000
    assert "root:" not in str(refused.value)
    ours_tenth.assert_alive()


def test_what_the_page_names_exists() -> None:
    page = (Path(__file__).parents[2] / "docs/security.md").read_text()
    for name in ("cache_salt", "extra_key", "--kv-budget-min", "--kv-allow-policies", "kv_report"):
        assert name in page
