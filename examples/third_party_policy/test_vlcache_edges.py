"""The tests of a policy package: `pytest`, in this folder, without a server."""

from typing import Any

import pytest
from vlcache_edges import Center, Edges

from vlcache_sgl.api.testing import PROPERTIES, check_policy

POLICIES = (Edges(), Edges(power=2.0), Center())


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_it_keeps_its_contract(policy: Edges | Center, name: Any) -> None:
    check_policy(policy, name)
