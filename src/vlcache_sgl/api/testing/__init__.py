"""Try a policy without a server: made-up prompts, everything that a policy may need, and its contract.

::

    prompt = synthetic_prompt(length=300, vision=[(10, 260)])
    policy = resolve("snapkv:window=16")
    plan = policy.decide(*synthetic_views(prompt, policy.needs), prompt, total=120)

    check_policy("snapkv:window=16")  # raises ContractError, in one line

One test per property, with pytest::

    @pytest.mark.parametrize("name", PROPERTIES)
    def test_my_policy(name):
        check_policy("my_policy:power=2", name)
"""

from vlcache_sgl.api.testing.contract import PROPERTIES, ContractError, Property, check_policy
from vlcache_sgl.api.testing.synthetic import (
    Layer,
    PlainRotary,
    attention,
    synthetic_layers,
    synthetic_prompt,
    synthetic_views,
    view_layers,
)

__all__ = [
    "PROPERTIES",
    "ContractError",
    "Layer",
    "PlainRotary",
    "Property",
    "attention",
    "check_policy",
    "synthetic_layers",
    "synthetic_prompt",
    "synthetic_views",
    "view_layers",
]
