"""Positions: parity with transformers' rotary embeddings, and what each scheme promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.models.attention import attention
from shared.models.positions import (
    LearnedPositions,
    RotaryEmbedding,
    alibi_bias,
    alibi_slopes,
    apply_rotary,
    sinusoidal,
)


def test_sinusoidal_is_the_papers_formula():
    table = sinusoidal(50, 8)
    for t in (0, 1, 49):
        for i in range(4):
            angle = t / 10_000 ** (2 * i / 8)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_a_shift_of_sinusoidal_positions_is_a_rotation_of_each_pair():
    table = sinusoidal(40, 8)
    frequency = 10_000.0 ** -(torch.arange(4) / 4)
    sine, cosine = table[:20, ::2], table[:20, 1::2]
    s, c = (7 * frequency).sin(), (7 * frequency).cos()
    torch.testing.assert_close(sine * c + cosine * s, table[7:27, ::2])
    torch.testing.assert_close(cosine * c - sine * s, table[7:27, 1::2])


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match="even width, not 7"):
        sinusoidal(10, 7)
    with pytest.raises(ValueError, match="even head width, not 7"):
        RotaryEmbedding(7, 10)


def test_learned_positions_are_rows_of_a_table():
    table = LearnedPositions(10, 4)
    positions = torch.tensor([[3, 4], [0, 9]])
    assert torch.equal(table(positions), table.weight[positions])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotary_equals_transformers(family):
    if family == "llama":
        from transformers.models.llama import modeling_llama as theirs
        from transformers.models.llama.configuration_llama import LlamaConfig as Config

        rotary_class = theirs.LlamaRotaryEmbedding
    else:
        from transformers.models.qwen3 import modeling_qwen3 as theirs
        from transformers.models.qwen3.configuration_qwen3 import Qwen3Config as Config

        rotary_class = theirs.Qwen3RotaryEmbedding
    theta, D = 50_000.0, 16
    config = Config(
        hidden_size=4 * D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=D,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    x = torch.randn(2, 4, 9, D, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11, 12, 500]])
    cos, sin = rotary_class(config)(x, positions)
    expected, _ = theirs.apply_rotary_pos_emb(x, x, cos, sin)
    ours = RotaryEmbedding(D, 512, theta)(positions)
    got = apply_rotary(x, *(table[:, None] for table in ours))
    torch.testing.assert_close(
        got, expected, rtol=1e-5, atol=5e-5
    )  # their angles at 500 carry float32's error
    upstream = torch.randn_like(x)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, upstream)[0] for y in (got, expected)), rtol=1e-5, atol=1e-4
    )
    with torch.no_grad():
        torch.testing.assert_close(apply_rotary(x, *(table[:, None] for table in ours)), got)


@given(i=st.integers(0, 60), j=st.integers(0, 60), shift=st.integers(0, 60))
def test_rotated_dot_products_depend_on_distance_alone(i, j, shift):
    rotary = RotaryEmbedding(8, 128)
    q, k = torch.linspace(-1, 2, 8), torch.linspace(1, -3, 8)

    def score(a, b):
        return apply_rotary(q, *rotary(torch.tensor(a))) @ apply_rotary(k, *rotary(torch.tensor(b)))

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift), rtol=0, atol=1e-5)


def test_rotation_keeps_lengths_and_position_zero_as_it_is():
    x = torch.randn(3, 16, 8)
    turned = apply_rotary(x, *RotaryEmbedding(8, 16)(slice(0, 16)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1], x[:, 1], atol=0.1)


def test_rotation_keeps_the_dtype():
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert apply_rotary(x, *RotaryEmbedding(8, 4)(slice(0, 4))).dtype == torch.bfloat16


def test_alibi_slopes_are_the_papers_for_powers_of_two():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([2.0 ** (-i / 2) for i in range(1, 17)]))


def test_alibi_slopes_for_twelve_heads_take_every_other_slope_of_sixteen():
    expected = [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected))


@pytest.mark.parametrize("heads", [1, 3, 6, 8, 12, 25])
def test_alibi_slopes_equal_those_of_transformers_bloom(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # (heads, 1, 2): slope · position
    torch.testing.assert_close(alibi_slopes(heads), bloom[:, 0, 1])


def test_the_short_alibi_bias_acts_like_the_papers_full_one():
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    slopes = alibi_slopes(4)
    distance = torch.arange(6) - torch.arange(6)[:, None]  # j − i
    full = slopes[:, None, None] * distance
    torch.testing.assert_close(
        attention(q, k, v, causal=True, bias=alibi_bias(slopes, 6)),
        attention(q, k, v, causal=True, bias=full),
    )
    assert not torch.allclose(
        attention(q, k, v, causal=True), attention(q, k, v, causal=True, bias=full), atol=1e-2
    )


def test_the_alibi_bias_of_a_model_in_bfloat16_still_tells_every_distance_apart():
    bias = alibi_bias(alibi_slopes(4).bfloat16(), 600)
    torch.testing.assert_close(bias, alibi_bias(alibi_slopes(4), 600))
