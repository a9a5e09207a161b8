"""Norms, activations, MLP, block and losses: parity with PyTorch, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.evaluation.memory import peak_bytes
from shared.models.attention import MultiHeadAttention
from shared.models.losses import cross_entropy, linear_cross_entropy
from shared.models.transformer_blocks import (
    ACTIVATIONS,
    MLP,
    Block,
    LayerNorm,
    RMSNorm,
    make_norm,
    rms_norm,
    squared_relu,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def assert_same_gradients(ours, theirs, inputs, tolerance=CLOSE):
    torch.testing.assert_close(ours, theirs, **tolerance)
    upstream = torch.randn_like(theirs)
    got, wanted = (torch.autograd.grad(y, inputs, upstream) for y in (ours, theirs))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@given(
    shape=st.lists(st.integers(1, 5), max_size=3),
    C=st.integers(1, 70),
    size=st.sampled_from([1e-4, 1.0, 1e3]),
    weighted=st.booleans(),
    transposed=st.booleans(),
)
@settings(deadline=None)
def test_rms_norm_equals_pytorchs(shape, C, size, weighted, transposed):
    torch.manual_seed(C)
    x = (size * torch.randn(*shape, C, dtype=torch.float64)).requires_grad_()
    y = x.transpose(0, -2) if transposed and len(shape) > 1 else x
    weight = torch.randn(C, dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = [x, weight] if weighted else [x]
    tolerance = {"rtol": 1e-9, "atol": 1e-9 / size}
    assert_same_gradients(rms_norm(y, weight, 1e-6), F.rms_norm(y, (C,), weight, 1e-6), inputs, tolerance)


def test_rms_norm_equals_pytorchs_in_float32():
    x, weight = torch.randn(4, 9, 33, requires_grad=True), torch.randn(33, requires_grad=True)
    assert_same_gradients(rms_norm(x, weight), F.rms_norm(x, (33,), weight, 1e-6), [x, weight])
    assert_same_gradients(rms_norm(x), F.rms_norm(x, (33,), None, 1e-6), [x])
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (33,), weight, 1e-6))


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_in_bfloat16_stays_within_bfloat16s_rounding(weighted):
    torch.manual_seed(0)
    x = torch.randn(64, 96).bfloat16().requires_grad_()
    weight = torch.rand(96).requires_grad_() if weighted else None
    exact_x = x.detach().double().requires_grad_()
    exact = F.rms_norm(exact_x, (96,), None if weight is None else weight.detach().bfloat16().double(), 1e-6)
    ours = rms_norm(x, weight)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=0.012, atol=1e-3)
    upstream = torch.randn(64, 96).bfloat16()
    ours.backward(upstream)
    exact.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=0.02, atol=0.02)


def test_rms_norm_passes_the_numerical_check():
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(rms_norm, (x.requires_grad_(), weight.requires_grad_()))
    assert torch.autograd.gradcheck(rms_norm, (x,))


def test_layer_norm_has_epsilon_inside_the_root_and_divides_by_c():
    x = 1e-3 * torch.randn(4, 6)  # small enough for ε to matter
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(LayerNorm(6)(x), expected)
    torch.testing.assert_close(LayerNorm(6, bias=False)(x), nn.LayerNorm(6, bias=False)(x))
    assert LayerNorm(6, bias=False).bias is None


def test_norms_are_made_by_name():
    assert isinstance(make_norm("layernorm", 8, 1e-5), LayerNorm)
    assert make_norm("rmsnorm", 8, 1e-5, affine=False).weight is None
    assert isinstance(make_norm("rmsnorm", 8, 1e-5), RMSNorm)
    with pytest.raises(ValueError, match="none of layernorm, rmsnorm"):
        make_norm("batchnorm", 8, 1e-5)


def test_squared_relu_is_relu_squared():
    x = torch.randn(50, requires_grad=True)
    assert_same_gradients(squared_relu(x), F.relu(x) ** 2, [x])
    with torch.no_grad():
        torch.testing.assert_close(squared_relu(x), F.relu(x) ** 2)


@pytest.mark.parametrize("name", ["gelu_tanh", "gelu", "relu", "relu2"])
def test_mlp_is_two_matrices_with_the_activation_between(name):
    from transformers.activations import ACT2FN

    torch.manual_seed(0)
    mlp, x = MLP(6, 10, name), torch.randn(2, 3, 6)
    theirs = ACT2FN[{"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}[name]]
    torch.testing.assert_close(mlp(x), mlp.down(theirs(mlp.up(x))), **CLOSE)


def test_swiglu_equals_the_mlp_of_transformers_llama():
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    theirs = LlamaMLP(LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=2))
    ours, x = MLP(6, 10, "swiglu", bias=False), torch.randn(2, 3, 6)
    with torch.no_grad():
        ours.up.weight.copy_(torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight)))
        ours.down.weight.copy_(theirs.down_proj.weight)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=f"none of {', '.join(ACTIVATIONS)}"):
        MLP(6, 10, "tanh")


@pytest.mark.parametrize("pre_norm", [True, False])
def test_the_norm_stands_where_it_is_asked_for(pre_norm):
    torch.manual_seed(0)
    attention, mlp, norms = MultiHeadAttention(8, 2), MLP(8, 16), [LayerNorm(8), LayerNorm(8)]
    x = torch.randn(2, 3, 8)
    if pre_norm:
        expected = x + attention(norms[0](x), causal=True)
        expected = expected + mlp(norms[1](expected))
    else:
        expected = norms[0](x + attention(x, causal=True))
        expected = norms[1](expected + mlp(expected))
    block = Block(attention, mlp, norms, pre_norm=pre_norm)
    torch.testing.assert_close(block(x, causal=True), expected)


def test_dropout_acts_on_what_each_sublayer_adds_and_only_in_training():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    for attention_dropout, mlp_dropout in ((0.5, 0.0), (0.0, 0.5)):
        block = Block(
            MultiHeadAttention(8, 2),
            MLP(8, 16, dropout=mlp_dropout),
            [LayerNorm(8), LayerNorm(8)],
            dropout=attention_dropout,
        )
        assert not torch.equal(block(x), block(x))
        block.eval()
        assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-100, 3])
def test_cross_entropy_equals_pytorchs_with_and_without_label_smoothing(smoothing, ignored):
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 11, requires_grad=True)
    targets = torch.randint(11, (4, 6))
    targets[1, 2:] = ignored
    ours = cross_entropy(logits, targets, label_smoothing=smoothing, ignore_index=ignored)
    theirs = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing, ignore_index=ignored
    )
    assert_same_gradients(ours, theirs, [logits], {"rtol": 1e-5, "atol": 1e-7})


def test_label_smoothing_is_cross_entropy_against_the_smoothed_distribution():
    logits = torch.randn(5, 7)
    targets = torch.arange(5)
    smoothed = torch.full((5, 7), 0.1 / 7)
    smoothed[torch.arange(5), targets] += 0.9
    expected = -(smoothed * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, targets, label_smoothing=0.1), expected)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
    logits = torch.randn(50, 300).bfloat16().requires_grad_()
    targets = torch.randint(300, (50,))
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets))
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def linear_loss_problem(N=40, C=8, V=50, dtype=torch.float32):
    torch.manual_seed(0)
    x, weight = (
        torch.randn(N, C, dtype=dtype, requires_grad=True),
        torch.randn(V, C, dtype=dtype, requires_grad=True),
    )
    targets = torch.randint(V, (N,))
    targets[3:7] = -100
    return x, weight, targets


@pytest.mark.parametrize("chunk", [50, 333, 1 << 21])
def test_the_loss_in_chunks_equals_the_loss_at_once(chunk, monkeypatch):
    monkeypatch.setattr("shared.models.losses.CHUNK", chunk)
    x, weight, targets = linear_loss_problem()
    theirs = F.cross_entropy(x @ weight.T, targets)
    assert_same_gradients(
        linear_cross_entropy(x, weight, targets), theirs, [x, weight], {"rtol": 1e-5, "atol": 1e-7}
    )
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets), theirs)


def test_the_loss_in_chunks_under_autocast_is_that_of_an_autocast_linear_layer():
    x, weight, targets = linear_loss_problem(N=400, V=300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = linear_cross_entropy(x, weight, targets), cross_entropy(F.linear(x, weight), targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    got, wanted = (torch.autograd.grad(loss, [x, weight]) for loss in (ours, theirs))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()


def test_the_loss_in_chunks_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr("shared.models.losses.CHUNK", 20_000)
    x, weight, targets = linear_loss_problem(N=2000, V=1000)
    all_logits = 4 * 2000 * 1000
    assert peak_bytes(lambda: linear_cross_entropy(x, weight, targets).backward()) < all_logits / 5
    assert peak_bytes(lambda: cross_entropy(x @ weight.T, targets).backward()) > all_logits
