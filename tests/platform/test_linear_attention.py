"""Linear attention in plain torch: transformers' numbers, and SGLang's pool of states changed in place."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_5 import modeling_qwen3_5 as reference

from vlcache_sgl.platform import delta_rule
from vlcache_sgl.platform import linear_attention as served

KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM, WIDTH = 2, 6, 16, 24, 4


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, atol=2e-6, rtol=1e-5)


def inputs(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random `q, k, v, g, beta` of one request."""
    random = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    return {
        "q": rand(tokens, KEY_HEADS, KEY_DIM),
        "k": rand(tokens, KEY_HEADS, KEY_DIM),
        "v": rand(tokens, HEADS, VALUE_DIM),
        "g": -rand(tokens, HEADS).abs(),
        "beta": rand(tokens, HEADS).sigmoid(),
    }


def state(seed: int = 9) -> torch.Tensor:
    return torch.randn(HEADS, VALUE_DIM, KEY_DIM, generator=torch.Generator().manual_seed(seed))


def transformers_rule(rule: str, initial: torch.Tensor, **given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and last state; there a state is `[key_dim, value_dim]` and key heads are repeated by the caller."""
    q, k = (given[name].repeat_interleave(HEADS // KEY_HEADS, 1)[None] for name in "qk")
    out, last = getattr(reference, rule)(
        q,
        k,
        given["v"][None],
        g=given["g"][None],
        beta=given["beta"][None],
        initial_state=initial.mT[None].contiguous(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out[0], last[0].mT


@pytest.mark.parametrize("rule", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_a_prompt_is_computed_as_in_transformers(tokens: int, rule: str) -> None:
    given = inputs(tokens)
    out, last, before = delta_rule.run_sequence(**given, state=state())
    expected, expected_last = transformers_rule(rule, state(), **given)
    assert close(out, expected)
    assert close(last, expected_last)
    assert before.shape == (-(-tokens // delta_rule.CHUNK), HEADS, VALUE_DIM, KEY_DIM)


def test_states_between_chunks_are_those_of_shorter_prompts() -> None:
    given = inputs(200)
    _, _, before = delta_rule.run_sequence(**given, state=state())
    for number in range(4):
        shorter = {name: value[: number * delta_rule.CHUNK] for name, value in given.items()}
        expected = delta_rule.run_sequence(**shorter, state=state())[1] if number else state()
        assert close(before[number], expected)


def test_steps_continue_a_prompt() -> None:
    """Two requests at once, token by token, against the whole at once."""
    both = [inputs(20, seed) for seed in (1, 2)]
    stacked = {name: torch.stack([given[name] for given in both]) for name in both[0]}
    states = torch.stack([state(3), state(4)])
    outputs = []
    for token in range(20):
        out, states = delta_rule.step(**{name: value[:, token] for name, value in stacked.items()}, state=states)
        outputs.append(out)
    for number, seed in enumerate((3, 4)):
        expected, last, _ = delta_rule.run_sequence(**both[number], state=state(seed))
        assert close(torch.stack(outputs)[:, number], expected)
        assert close(states[number], last)


def test_gates_are_those_of_transformers() -> None:
    random = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, 7, HEADS, generator=random)
    a_log, dt_bias = torch.randn(2, HEADS, generator=random)
    g, beta = delta_rule.gates(a_log, a, b, dt_bias)
    # The two lines of Qwen3_5GatedDeltaNet.forward.
    assert close(g[0], -a_log.exp() * functional.softplus(a + dt_bias))
    assert close(beta[0], b.sigmoid())


def test_a_convolution_in_parts_is_that_of_the_whole() -> None:
    """Two requests in a pool of states: one new, in a slot that somebody left, and one that goes on."""
    channels = 10
    random = torch.Generator().manual_seed(6)
    weight = torch.randn(channels, WIDTH, generator=random)
    whole = [torch.randn(channels, tokens, generator=random) for tokens in (9, 12)]
    pool = torch.randn(5, channels, WIDTH - 1, generator=random)
    pool[4] = whole[1][:, 2:5]  # the last inputs before token 5
    untouched = pool[[0, 1, 3]].clone()
    out = served.convolve_prompts(
        torch.cat([whole[0], whole[1][:, 5:]], dim=1),
        weight,
        None,
        conv_states=pool,
        query_start_loc=torch.tensor([0, 9, 16]),
        cache_indices=torch.tensor([2, 4]),
        has_initial_state=torch.tensor([False, True]),
    )
    expected = [
        functional.silu(functional.conv1d(functional.pad(x, (3, 0)), weight[:, None], groups=channels)) for x in whole
    ]
    assert close(out[:, :9], expected[0])
    assert close(out[:, 9:], expected[1][:, 5:])
    assert torch.equal(pool[2], whole[0][:, -3:])
    assert torch.equal(pool[4], whole[1][:, -3:])
    assert torch.equal(pool[[0, 1, 3]], untouched)

    step = torch.randn(2, channels, generator=random)
    out = served.convolve_step(step, pool, weight, None, "silu", conv_state_indices=torch.tensor([4, 2]))
    for number, x in enumerate((whole[1], whole[0])):
        longer = torch.cat([x, step[number][:, None]], dim=1)
        last = functional.silu((longer[:, -WIDTH:] * weight).sum(1))
        assert close(out[number], last)


def test_the_kernel_changes_the_slots_of_its_requests() -> None:
    """A prompt of 70 tokens, none, and one of 3: outputs in order, and the states before each chunk."""
    lengths, slots = (70, 0, 3), (3, 1, 2)
    parts = [inputs(length, seed) for seed, length in enumerate(lengths)]
    pool = torch.stack([state(seed) for seed in range(4)])
    before = pool.clone()
    together = {name: torch.cat([part[name] for part in parts])[None] for name in parts[0]}
    out, _, states = served.TorchGDNKernel().extend(
        **together,
        ssm_states=pool,
        cache_indices=torch.tensor(slots, dtype=torch.int32),
        query_start_loc=torch.tensor([0, 70, 70, 73]),
    )
    assert states.shape[:2] == (1, 3)  # two chunks and one
    first, last, _ = delta_rule.run_sequence(**parts[0], state=before[3])
    assert torch.equal(out[0, :70], first)
    assert torch.equal(pool[3], last)
    assert torch.equal(states[0, 2], before[2])
    assert torch.equal(pool[[0, 1]], before[[0, 1]])


def test_tracked_states_are_copies() -> None:
    conv, ssm = torch.randn(2, 6, 4, 3), torch.randn(2, 6, 2, 5, 5)
    expected = conv.clone(), ssm.clone()
    for states in expected:
        states[:, 5] = states[:, 1]
    source, target = torch.tensor([1, 2, 3]), torch.tensor([5, 4, 0])
    served.track_states_of_all_layers(conv, ssm, source, torch.tensor([True, False, False]), target, 3)
    assert torch.equal(conv, expected[0])
    assert torch.equal(ssm, expected[1])


def test_projections_are_split_in_sglang_s_order() -> None:
    """q, k, v and z behind each other, then b and a."""
    widths = (KEY_HEADS * KEY_DIM, KEY_HEADS * KEY_DIM, HEADS * VALUE_DIM, HEADS * VALUE_DIM)
    q, k, v, z = (torch.randn(5, width) for width in widths)
    b, a = torch.randn(2, 5, HEADS)
    qkv, gate, strength, decay = served.split_projections(
        torch.cat([q, k, v, z], 1), torch.cat([b, a], 1), KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM
    )
    assert torch.equal(qkv, torch.cat([q, k, v], 1))
    assert torch.equal(gate, z.view(5, HEADS, VALUE_DIM))
    assert torch.equal(strength, b)
    assert torch.equal(decay, a)


def test_the_gated_norm_is_that_of_transformers() -> None:
    norm = reference.Qwen3_5RMSNormGated(VALUE_DIM, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_()
    x, z = torch.randn(2, 11, VALUE_DIM)
    out = served.norm_gated(
        x=x,
        weight=norm.weight,
        bias=None,
        z=z,
        eps=1e-6,
        group_size=None,
        norm_before_gate=True,
        is_rms_norm=True,
        activation="silu",
    )
    assert close(out, norm(x, z))
    with pytest.raises(NotImplementedError):
        served.norm_gated(
            x=x,
            weight=norm.weight,
            bias=norm.weight,
            z=z,
            eps=1e-6,
            group_size=None,
            norm_before_gate=True,
            is_rms_norm=True,
            activation="silu",
        )


def test_the_output_gate() -> None:
    x, gate = torch.randn(4, 12), torch.randn(4, 3, 4)
    expected = x * gate.reshape(4, 12).sigmoid()
    assert close(served.gate_output(x.clone(), gate), expected)
    assert served.gate_output(x, gate, inplace=True) is x
    assert close(x, expected)


def test_the_gate_of_a_shared_expert_is_that_of_transformers() -> None:
    """Its block of experts, the routed ones of which say nothing."""
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

    sizes = {"hidden_size": 12, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
    block = Qwen3_5MoeSparseMoeBlock(Qwen3_5MoeTextConfig(**sizes, num_experts_per_tok=2))
    with torch.no_grad():
        for weights in block.parameters():
            weights.normal_()
        block.experts.down_proj.zero_()
        x = torch.randn(1, 5, 12)
        expected = block(x)
        routed = torch.randn(5, 12)
        output = routed.clone()
        served.add_gated(x[0], block.shared_expert_gate.weight.squeeze(), block.shared_expert(x)[0], output)
    assert close(output - routed, expected[0])
