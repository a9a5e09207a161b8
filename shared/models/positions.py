"""Where a token stands: four ways to tell a model that knows only sets.

Legend: B batch, T time (positions), H heads, D width of one head, C width of the model.

| scheme     | where it enters            | source                                             |
|------------|----------------------------|----------------------------------------------------|
| sinusoidal | added to the embedding     | Vaswani et al. 2017, §3.5                          |
| learned    | added to the embedding     | Radford et al. 2018 (GPT), §4.1                    |
| RoPE       | rotates queries and keys   | Su et al. 2021, §3.2–3.4                           |
| ALiBi      | added to attention scores  | Press et al. 2022, §3                              |

Departures: sine and cosine of `sinusoidal` alternate as in the paper; RoPE pairs dimension i with i + D/2
(the layout of Llama and Qwen in `transformers`) instead of 2i with 2i + 1: the same rotations in another
order.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def sinusoidal(num_positions: int, d_model: int) -> Tensor:
    """The fixed table of Vaswani et al. 2017, §3.5.

    PE(t, 2i) = sin(t / 10000^(2i/C)) and PE(t, 2i+1) = cos(t / 10000^(2i/C)).

    Returns:
        (T, C) float32.

    Raises:
        ValueError: `d_model` is odd.
    """
    if d_model % 2:
        raise ValueError(f"sinusoidal positions need an even width, not {d_model}")
    angles = _angles(num_positions, d_model, 10_000.0)  # (T, C/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).float()  # (T, C)


def _angles(num_positions: int, width: int, base: float) -> Tensor:
    """t · base^(−2i/width) for every position t and pair i: (T, width/2) float64.

    At position 10,000 float32 leaves three decimals of an angle; the table is made once, so it is made well.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    return torch.outer(torch.arange(num_positions, dtype=torch.float64), base**-exponents)


class LearnedPositions(nn.Embedding):
    """One trained vector a position, for positions 0 … `num_positions` − 1: positions (…, T) -> (…, T, C)."""

    def __init__(self, num_positions: int, d_model: int):
        super().__init__(num_positions, d_model)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding (Su et al. 2021, §3.2.2, eq. 14–15).

    Pair i of a head of width D turns by t·θ^(−2i/D) at position t.

    Args:
        head_dim: D, even.
        num_positions: positions 0 … `num_positions` − 1 can be asked for.
        theta: θ; the longest wavelength is about 2πθ tokens.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, num_positions: int, theta: float = 10_000.0):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {head_dim}")
        angles = _angles(num_positions, head_dim, theta).repeat(1, 2)  # (T, D): i and i + D/2 turn together
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        sign = torch.ones(head_dim, dtype=torch.float64).index_fill_(0, torch.arange(head_dim // 2), -1.0)
        self.register_buffer("sin", (sign * angles.sin()).float(), persistent=False)

    def forward(self, positions: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Positions (…, T), or a slice of them -> cos and sin, each (…, T, D) float32.

        The sines of the first half of each head carry the minus of x_i·cos − x_{i+D/2}·sin.
        """
        return self.cos[positions], self.sin[positions]


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation backwards, so nothing of x needs to be kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return _rotate(gradient, *ctx.saved_tensors, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    # Whole rows at a time: on halves of 16 numbers bfloat16's in-place kernel is four times slower.
    return (x * cos).addcmul_(torch.cat((second, first), dim=-1), sin, value=direction)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its angle (Su et al. 2021, eq. 34, with pairs half a head apart).

    Args:
        x: (…, D) queries or keys, for instance (B, H, T, D).
        cos, sin: from `RotaryEmbedding`, broadcastable to `x`; for (B, H, T, D) pass (T, D).

    Returns:
        The shape and dtype of `x`.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)
    return _rotate(x, cos, sin, 1.0)


def alibi_slopes(num_heads: int) -> Tensor:
    """How fast each head forgets: 2^(−8/H), 2^(−16/H), …, 2^(−8) (Press et al. 2022, §3).

    For H that is no power of two the paper's code takes the slopes of the power of two below, then every
    other slope of the power of two above; so does this.

    Returns:
        (H,) float32.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / below) for h in range(below)]
    slopes += [2.0 ** (-4.0 * (h + 1) / below) for h in range(0, 2 * (num_heads - below), 2)]
    return torch.tensor(slopes)


def alibi_bias(slopes: Tensor, num_keys: int) -> Tensor:
    """What ALiBi adds to the scores: −slope · (distance from the last key) (Press et al. 2022, §3).

    The paper's −slope · (i − j) differs from this by slope · (T − 1 − i), the same for every key j of a query
    i, and softmax does not see what is the same for every key. So (H, 1, T) does the work of (H, T, T), for
    queries at any position, padded or not.

    Args:
        slopes: (H,) from `alibi_slopes`.
        num_keys: T.

    Returns:
        (H, 1, T), in at least float32, to be passed as `bias` to `attention` together with `causal=True`.
    """
    wide = torch.promote_types(slopes.dtype, torch.float32)  # bfloat16 cannot count beyond 256
    distance = torch.arange(1 - num_keys, 1, device=slopes.device, dtype=wide)  # −(T−1) … 0
    return slopes[:, None, None] * distance
