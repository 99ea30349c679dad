"""Broken policies cost a request its compression, never its answer; a broken patch point costs the server its start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from vlcache_sgl.client.server import ServerError

TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
PLUGIN = Path(__file__).parent / "plugins/renamed_target"

BROKEN = {
    "raises": "scorer=raises,allocator=uniform",
    "exits": "scorer=exits,allocator=uniform",
    "says NaN": "scorer=nan,allocator=uniform",
    "scores of the wrong shape": "scorer=too_few,allocator=uniform",
    "keeps too much": "scorer=streaming,allocator=too_much",
    "keeps too little": "scorer=streaming,allocator=too_little",
}


@pytest.mark.parametrize("policy", BROKEN.values(), ids=BROKEN.keys())
def test_broken_policy_keeps_the_full_cache(foreign: Any, picture: Any, policy: str) -> None:
    drawn = picture(8000, 24, 24)
    question = drawn.questions[0].text
    full = foreign.ask(question, drawn.image, custom_params={"kv_budget": 1.0})
    foreign.flush()
    before, seen = foreign.settled(), len(foreign.log)
    answer = foreign.ask(question, drawn.image, custom_params={"kv_policy": policy, "kv_share": "policy"})
    after = foreign.settled()
    assert answer.text == full.text
    assert after["policy_failures"] == before["policy_failures"] + 1
    assert after["requests_compressed"] == before["requests_compressed"]
    assert after["cells_used"] >= answer.prompt_tokens * after["cells_per_token"]
    complaints = [line for line in foreign.log[seen:].splitlines() if policy in line]
    assert len(complaints) == 1, complaints
    # The next request, with a policy that works, is compressed as ever.
    foreign.ask(question, drawn.image)
    assert foreign.settled()["requests_compressed"] == before["requests_compressed"] + 1


def test_broken_policies_leak_nothing(foreign: Any) -> None:
    foreign.flush()
    assert foreign.settled()["cells_used"] == 0
    foreign.assert_alive()


def test_refuses_to_start_without_a_patch_target(servers: Any) -> None:
    """The message says which target is gone."""
    path = os.pathsep.join([str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.raises(ServerError, match="exited with code") as caught:
        servers.get(*TENTH, env={"PYTHONPATH": path})
    assert "KVCacheConfigurator._build_mha_kv_pool does not exist" in str(caught.value)
    assert "Load weight" not in str(caught.value)
