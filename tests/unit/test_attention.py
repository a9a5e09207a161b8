"""Attention: parity with PyTorch for every mask kind, and the properties that make it attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.evaluation.memory import peak_bytes
from shared.models import attention as module
from shared.models.attention import MultiHeadAttention, attention, attention_mask, record_attention
from shared.models.positions import RotaryEmbedding, alibi_bias, alibi_slopes

THREE = ("plain", "sdpa", "tiled")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_qkv(B=2, H=4, Hkv=4, Tq=7, Tk=7, D=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def output_and_gradients(function, inputs):
    out = function(*inputs)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def assert_same(ours, theirs, tolerance=CLOSE):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def written_out(q, k, v, allowed=None, bias=None):
    """Equation 1, one query at a time."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    if allowed is None:
        allowed = torch.ones_like(scores, dtype=torch.bool)
    powers = scores.exp() * allowed
    total = powers.sum(-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bhid", powers / total.where(total > 0, 1.0), v)


MASKS = {
    "nothing hidden": {},
    "causal": {"causal": True},
    "sliding window": {"causal": True, "window": 3},
    "window to both sides": {"window": 2},
    "padding": {"mask": torch.arange(7) < torch.tensor([7, 4])[:, None, None, None]},
    "padding and causal": {
        "causal": True,
        "mask": torch.arange(7) < torch.tensor([7, 4])[:, None, None, None],
    },
    "any mask": {"mask": torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.7},
    "bias": {"bias": torch.randn(4, 7, 7, generator=torch.Generator().manual_seed(2))},
    "ALiBi": {"causal": True, "bias": alibi_bias(alibi_slopes(4), 7)},
}


def as_one_bias(options):
    """What PyTorch takes for one of `MASKS`: numbers to add to the scores, (2, 4, 7, 7)."""
    hidden = ~attention_mask(7, 7, causal=options.get("causal", False), window=options.get("window"))
    full = options.get("bias", torch.zeros(())).expand(2, 4, 7, 7).masked_fill(hidden, -torch.inf)
    return full.masked_fill(~options["mask"], -torch.inf) if "mask" in options else full


@pytest.mark.parametrize("implementation", THREE)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_equals_pytorchs_for_every_mask_and_number_of_key_heads(kind, kv_heads, implementation):
    options = MASKS[kind]
    inputs = random_qkv(Hkv=kv_heads)
    full = as_one_bias(options)

    def theirs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=full, enable_gqa=True)

    def ours(q, k, v):
        return attention(q, k, v, implementation=implementation, **options)

    assert_same(output_and_gradients(ours, inputs), output_and_gradients(theirs, inputs))


def test_the_mask_shows_a_causal_window():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert attention_mask(4, 4, causal=True, window=2).int().tolist() == expected
    assert attention_mask(2, 4, causal=True).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert attention_mask(3, 3, window=2).int().tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]


@st.composite
def attention_problems(draw):
    groups, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    B, Tq, Tk = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 14))
    H, seed = groups * kv_heads, draw(st.integers(0, 2**16))
    inputs = random_qkv(B, H, kv_heads, Tq, Tk, 4, torch.float64, seed)
    generator = torch.Generator().manual_seed(seed)
    window = draw(st.none() | st.integers(1, 6))
    mask_shape = draw(st.sampled_from([None, (B, 1, 1, Tk), (Tq, Tk), (B, H, Tq, Tk), (1, H, Tq, 1)]))
    bias_shape = draw(st.sampled_from([None, (H, 1, Tk), (Tq, Tk), (B, H, Tq, Tk), (1, H, Tq, 1)]))
    mask = None if mask_shape is None else torch.rand(mask_shape, generator=generator) < 0.6
    bias = None if bias_shape is None else torch.randn(bias_shape, generator=generator, dtype=torch.float64)
    return inputs, {"causal": draw(st.booleans()), "window": window, "mask": mask, "bias": bias}


@given(attention_problems())
@settings(max_examples=80, deadline=None)
def test_all_implementations_agree_with_the_formula_written_out(problem):
    inputs, options = problem
    Tq, Tk = inputs[0].shape[2], inputs[1].shape[2]
    allowed = attention_mask(Tq, Tk, causal=options["causal"], window=options["window"])
    if options["mask"] is not None:
        allowed = allowed & options["mask"]
    expected = output_and_gradients(lambda q, k, v: written_out(q, k, v, allowed, options["bias"]), inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", 4)
        for implementation in (*THREE, "auto"):
            ours = output_and_gradients(
                lambda q, k, v, name=implementation: attention(q, k, v, implementation=name, **options),
                inputs,
            )
            assert_same(ours, expected, {"rtol": 1e-9, "atol": 1e-9})


@pytest.mark.parametrize("implementation", THREE)
def test_a_query_that_may_see_nothing_gives_zeros_and_finite_gradients(implementation):
    inputs = random_qkv()
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[3] = False
    out, *gradients = output_and_gradients(
        lambda q, k, v: attention(q, k, v, mask=mask, implementation=implementation), inputs
    )
    assert (out[:, :, 3] == 0).all()
    assert (out[:, :, 4] != 0).all()
    assert (gradients[0][:, :, 3] == 0).all()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("implementation", THREE)
def test_more_queries_than_keys_leave_the_first_queries_without_keys(implementation):
    q, k, v = random_qkv(Tq=5, Tk=3)
    out = attention(q, k, v, causal=True, implementation=implementation)
    assert (out[:, :, :2] == 0).all()
    torch.testing.assert_close(out[:, :, 2], v[:, :, 0], **CLOSE)


@pytest.mark.parametrize("implementation", THREE)
@given(position=st.integers(0, 10), window=st.none() | st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_the_future_does_not_change_the_past(implementation, position, window):
    q, k, v = (x.detach() for x in random_qkv(Tq=12, Tk=12))
    before = attention(q, k, v, causal=True, window=window, implementation=implementation)
    k, v = k.clone(), v.clone()
    k[:, :, position + 1 :] = 9.0
    v[:, :, position + 1 :] = -9.0
    after = attention(q, k, v, causal=True, window=window, implementation=implementation)
    torch.testing.assert_close(before[:, :, : position + 1], after[:, :, : position + 1], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, :, position + 1 :], after[:, :, position + 1 :], atol=0.1)


@pytest.mark.parametrize("implementation", THREE)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"bias": alibi_bias(alibi_slopes(4), 9)}])
def test_the_last_queries_alone_give_what_they_give_among_all(implementation, options):
    q, k, v = (x.detach() for x in random_qkv(Hkv=2, Tq=9, Tk=9))
    everything = attention(q, k, v, causal=True, implementation=implementation, **options)
    for count in (1, 2, 5):
        some = attention(q[:, :, -count:], k, v, causal=True, implementation=implementation, **options)
        torch.testing.assert_close(some, everything[:, :, -count:], **CLOSE)


def test_weights_are_returned_and_sum_to_one():
    q, k, v = random_qkv(Hkv=2)
    out, weights = attention(q, k, v, causal=True, implementation="plain", return_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out, **CLOSE)


def test_dropout_drops_weights_and_keeps_their_mean():
    q, k, v = (x.detach() for x in random_qkv(B=400, Tq=2, Tk=2))
    whole = attention(q, k, v, implementation="plain")
    torch.manual_seed(0)
    for implementation in ("plain", "sdpa"):
        dropped = attention(q, k, v, dropout=0.5, implementation=implementation)
        nothing_left = (dropped == 0).all(-1).float().mean().item()
        assert nothing_left == pytest.approx(0.25, abs=0.03)  # both of two weights dropped
        assert (dropped - whole).mean().abs() < 0.02


def test_the_bias_gets_the_same_gradient_in_every_implementation():
    q, k, v = random_qkv(dtype=torch.float64)
    for shape in ((4, 7, 7), (4, 1, 7), (7, 7)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        gradients = [
            torch.autograd.grad(
                attention(q, k, v, bias=bias, causal=True, implementation=n).square().sum(), bias
            )[0]
            for n in THREE
        ]
        assert gradients[0].abs().max() > 0.01
        torch.testing.assert_close(gradients[0], gradients[1])
        torch.testing.assert_close(gradients[0], gradients[2])


def test_tiled_gradients_pass_the_numerical_check(monkeypatch):
    monkeypatch.setattr(module, "TILE", 2)
    inputs = random_qkv(B=1, H=2, Hkv=1, Tq=5, Tk=5, D=2, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, causal=True, window=3, mask=mask, implementation="tiled"), inputs
    )


def test_tiled_in_bfloat16_is_as_close_to_exact_as_pytorchs_kernel():
    exact_inputs = random_qkv(Tq=300, Tk=300, dtype=torch.float64)
    low = [x.detach().bfloat16() for x in exact_inputs]
    exact = attention(*(x.double() for x in low), causal=True, implementation="plain")
    error = {n: (attention(*low, causal=True, implementation=n) - exact).abs().max().item() for n in THREE}
    assert error["tiled"] <= 1.1 * error["sdpa"]
    assert error["tiled"] < 0.02


@pytest.mark.parametrize("implementation", THREE)
def test_a_large_bias_keeps_its_steps_in_bfloat16(implementation):
    """ALiBi's short form reaches −slope · T, where bfloat16 is coarser than the step between two keys."""
    low = [x.detach().bfloat16() for x in random_qkv(Tq=600, Tk=600)]
    bias = alibi_bias(alibi_slopes(4), 600)
    exact = attention(*(x.double() for x in low), causal=True, bias=bias.double(), implementation="plain")
    out = attention(*low, causal=True, bias=bias, implementation=implementation)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.02  # with the bias itself in bfloat16: 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "flash"}, "none of plain"),
        ({"window": 0}, "window is 0"),
        ({"implementation": "sdpa", "return_weights": True}, "only implementation='plain'"),
        ({"implementation": "tiled", "dropout": 0.1}, "no dropout"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*random_qkv(), **options)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cannot share 3 key heads"):
        attention(*random_qkv(Hkv=3))
    q, k, _ = random_qkv()
    with pytest.raises(ValueError, match="do not fit together"):
        attention(q, k, k[:, :, 1:])


def test_tiled_memory_grows_with_t_where_plain_memory_grows_with_its_square():
    def peak(T, implementation):
        q, k, v = (torch.ones(1, 1, T, 8, requires_grad=True) for _ in range(3))
        return peak_bytes(
            lambda: attention(q, k, v, causal=True, implementation=implementation).sum().backward()
        )

    growth = {name: peak(2048, name) / peak(1024, name) for name in ("plain", "tiled")}
    assert growth["plain"] > 3.8
    assert growth["tiled"] < 2.2


class TestMultiHeadAttention:
    def pair(self, **options):
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        ours = MultiHeadAttention(16, 4)
        nn.init.normal_(theirs.in_proj_bias)
        with torch.no_grad():
            ours.qkv.weight.copy_(theirs.in_proj_weight)
            ours.qkv.bias.copy_(theirs.in_proj_bias)
            ours.out.load_state_dict(theirs.out_proj.state_dict())
        return ours, theirs

    @pytest.mark.parametrize("kind", MASKS)
    def test_it_equals_pytorchs_multihead_attention_outputs_weights_and_gradients(self, kind):
        ours, theirs = self.pair()
        x, options = torch.randn(2, 7, 16, requires_grad=True), MASKS[kind]
        their_mask = as_one_bias(options).reshape(8, 7, 7)
        expected, expected_weights = theirs(x, x, x, attn_mask=their_mask, average_attn_weights=False)
        out, weights = ours(x, return_weights=True, **options)
        torch.testing.assert_close(out, expected, **CLOSE)
        torch.testing.assert_close(weights, expected_weights, **CLOSE)
        torch.testing.assert_close(ours(x, **options), expected, **CLOSE)
        wanted = torch.autograd.grad(
            expected.square().sum(), [x, theirs.in_proj_weight, theirs.out_proj.weight]
        )
        got = torch.autograd.grad(out.square().sum(), [x, ours.qkv.weight, ours.out.weight])
        assert_same(got, wanted, {"rtol": 1e-4, "atol": 1e-5})

    def test_it_equals_pytorchs_with_its_own_words_for_causal_and_padding(self):
        ours, theirs = self.pair()
        x, padding = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([6, 3, 5])[:, None]
        later = torch.ones(6, 6, dtype=torch.bool).triu(1)
        for words, options in (
            ({"attn_mask": later, "is_causal": True}, {"causal": True}),
            ({"key_padding_mask": padding}, {"mask": ~padding[:, None, None]}),
        ):
            torch.testing.assert_close(ours(x, **options), theirs(x, x, x, **words)[0], **CLOSE)

    def test_cross_attention_equals_pytorchs(self):
        ours, theirs = self.pair()
        x, memory = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
        expected, _ = theirs(x, memory, memory)
        torch.testing.assert_close(ours(x, keys_values=ours.keys_values(memory)), expected, **CLOSE)

    def test_grouped_heads_equal_full_heads_with_the_keys_repeated(self):
        torch.manual_seed(0)
        grouped, full = MultiHeadAttention(16, 4, 2), MultiHeadAttention(16, 4)
        with torch.no_grad():
            for ours, theirs in ((full.qkv.weight, grouped.qkv.weight), (full.qkv.bias, grouped.qkv.bias)):
                q, k, v = theirs.unflatten(0, (8, 4)).split((4, 2, 2))
                ours.copy_(torch.cat((q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))).flatten(0, 1))
            full.out.load_state_dict(grouped.out.state_dict())
        x = torch.randn(2, 5, 16)
        torch.testing.assert_close(grouped(x, causal=True), full(x, causal=True), **CLOSE)

    @pytest.mark.parametrize("affine", [True, False])
    def test_qk_norm_makes_attention_blind_to_the_size_of_its_input(self, affine):
        torch.manual_seed(0)
        layer = MultiHeadAttention(16, 4, 2, bias=False, qk_norm=True, qk_norm_affine=affine)
        x = torch.randn(2, 5, 16)
        torch.testing.assert_close(layer(3 * x), 3 * layer(x), rtol=1e-4, atol=1e-5)
        without = MultiHeadAttention(16, 4, 2, bias=False)
        assert not torch.allclose(without(3 * x), 3 * without(x), rtol=1e-2, atol=1e-2)
        cross = layer(x, keys_values=layer.keys_values(x))
        torch.testing.assert_close(cross, layer(x), **CLOSE)

    def test_rotation_leaves_only_distances(self):
        torch.manual_seed(0)
        layer, rotary = MultiHeadAttention(16, 4), RotaryEmbedding(4, 64)
        x = torch.randn(2, 5, 16)
        at_zero = layer(x, causal=True, rotary=rotary(slice(0, 5)))
        torch.testing.assert_close(layer(x, causal=True, rotary=rotary(slice(40, 45))), at_zero, **CLOSE)
        assert not torch.allclose(layer(x, causal=True), at_zero, atol=1e-3)

    def test_dropout_is_off_in_evaluation(self):
        torch.manual_seed(0)
        layer = MultiHeadAttention(16, 4, dropout=0.5)
        x = torch.randn(2, 5, 16)
        assert not torch.equal(layer(x), layer(x))
        assert torch.equal(layer.eval()(x), layer(x))

    def test_heads_that_do_not_divide_the_width_are_refused(self):
        with pytest.raises(ValueError, match="do not divide evenly"):
            MultiHeadAttention(16, 3)


def test_recorded_weights_are_those_the_model_used():
    torch.manual_seed(0)
    model = nn.Sequential(MultiHeadAttention(16, 4), MultiHeadAttention(16, 2))
    x = torch.randn(2, 5, 16)
    expected = model(x)
    with record_attention(model) as weights:
        torch.testing.assert_close(model(x), expected, **CLOSE)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {"0": (2, 4, 5, 5), "1": (2, 2, 5, 5)}
    torch.testing.assert_close(weights["0"], model[0](x, return_weights=True)[1])
    assert isinstance(model(x), torch.Tensor)
    assert len(weights) == 2
