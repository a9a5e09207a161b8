"""The parts of a transformer layer: normalisation, feed-forward network, and the block that joins them.

Legend: B batch, T time, C width of the model, F width of the hidden layer.

| choice             | source                                                         |
|--------------------|----------------------------------------------------------------|
| post-norm          | Vaswani et al. 2017, §3.1: norm(x + sublayer(x))               |
| pre-norm           | Radford et al. 2019 (GPT-2), §2.3; Xiong et al. 2020           |
| ReLU               | Vaswani et al. 2017, eq. 2                                     |
| GELU               | Hendrycks & Gimpel 2016; GPT-2 uses their tanh approximation   |
| SwiGLU             | Shazeer 2020, eq. 6                                            |
| ReLU²              | So et al. 2021 (Primer), "Squared ReLU"                        |
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shared.models.attention import MultiHeadAttention
from shared.models.normalization import LayerNorm, RMSNorm, rms_norm

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "NORMS",
    "Block",
    "LayerNorm",
    "RMSNorm",
    "make_norm",
    "rms_norm",
    "squared_relu",
]

NORMS = ("layernorm", "rmsnorm")


def make_norm(kind: str, d_model: int, eps: float, *, bias: bool = True, affine: bool = True) -> nn.Module:
    """The norm called `kind`: "layernorm" (`bias` or not) or "rmsnorm" (`affine` or not)."""
    if kind == "layernorm":
        return LayerNorm(d_model, eps, bias=bias)
    if kind == "rmsnorm":
        return RMSNorm(d_model, eps, affine=affine)
    raise ValueError(f"norm {kind!r} is none of {', '.join(NORMS)}")


class _SquaredReLU(torch.autograd.Function):
    """Keeps only relu(x); its gradient is 2·relu(x), where autograd would keep and visit two tensors."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2.0)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021, "Squared ReLU"), any shape."""
    return _SquaredReLU.apply(x) if torch.is_grad_enabled() else x.relu().square_()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "gelu_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": squared_relu,
    "swiglu": F.silu,  # applied to the gate
}


class MLP(nn.Module):
    """down(activation(up(x))); with "swiglu", down(silu(gate(x)) · up(x)). Shape (B, T, C) -> (B, T, C).

    Args:
        d_model: C.
        d_ff: F. SwiGLU has three matrices where the others have two: 8/3·C costs what 4·C costs there.
        activation: a key of `ACTIVATIONS`.
        bias: with bias vectors.
        dropout: on the output.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "gelu_tanh",
        *,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
        self.gated = activation == "swiglu"
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(d_model, 2 * d_ff if self.gated else d_ff, bias=bias)  # gate and up in one matmul
        self.down = nn.Linear(d_ff, d_model, bias=bias)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)  # (B, T, F) each
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        out = self.down(hidden)
        return F.dropout(out, self.dropout, self.training) if self.dropout else out


class Block(nn.Module):
    """Self-attention, cross-attention if there is a memory, feed-forward: each with a residual and a norm.

    Args:
        attention: the self-attention.
        mlp: the feed-forward network.
        norms: one a sublayer, in order of use.
        cross_attention: for a decoder that looks at an encoder's output.
        pre_norm: x + f(norm(x)); otherwise norm(x + f(x)), as in the paper of 2017.
        dropout: on what each attention adds to the residual stream (the MLP brings its own).
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        mlp: MLP,
        norms: list[nn.Module],
        *,
        cross_attention: MultiHeadAttention | None = None,
        pre_norm: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.attention, self.cross_attention, self.mlp = attention, cross_attention, mlp
        self.norms = nn.ModuleList(norms)
        self.pre_norm = pre_norm
        self.dropout = dropout

    def forward(
        self, x: Tensor, *, memory: tuple | None = None, memory_mask: Tensor | None = None, **attend
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        Args:
            x: the residual stream.
            memory: keys and values for the cross-attention, from `cross_attention.keys_values`.
            memory_mask: bool, broadcastable to (B, H, T, S): which of the S positions of the memory may be
                seen.
            attend: what the self-attention takes: causal, window, mask, bias, rotary, cache, layer.
        """
        norms = iter(self.norms)
        x = self._add(x, next(norms), self.attention, **attend)
        if self.cross_attention is not None:
            x = self._add(x, next(norms), self.cross_attention, keys_values=memory, mask=memory_mask)
        return self._add(x, next(norms), self.mlp)

    def _add(self, x: Tensor, norm: nn.Module, sublayer: nn.Module, **inputs) -> Tensor:
        out = sublayer(norm(x) if self.pre_norm else x, **inputs)
        if self.dropout and self.training and sublayer is not self.mlp:
            out = F.dropout(out, self.dropout)
        return x + out if self.pre_norm else norm(x + out)
