"""Attention, every variant of it behind one function, computed in three ways that agree.

Legend: B batch, Tq queries, Tk keys, H query heads, Hkv key/value heads (Hkv divides H), D width of one head,
C width of the model.

| variant              | how to ask for it               | source                                        |
|----------------------|---------------------------------|-----------------------------------------------|
| scaled dot-product   | `attention(q, k, v)`            | Vaswani et al. 2017, §3.2.1, eq. 1            |
| masked               | `causal=True`, `mask=…`         | Vaswani et al. 2017, §3.2.3                   |
| multi-head           | `MultiHeadAttention`            | Vaswani et al. 2017, §3.2.2                   |
| multi-query, grouped | fewer heads in `k` and `v`      | Shazeer 2019; Ainslie et al. 2023             |
| sliding window       | `window=…`                      | Beltagy et al. 2020, §3.1; Jiang et al. 2023  |
| biased (ALiBi)       | `bias=…`                        | Press et al. 2022, §3                         |
| tiled                | `implementation="tiled"`        | Milakov & Gimelshein 2018; Dao 2023, alg. 1–2 |

Departure from all of them: a query that may attend to nothing gets zeros, where the formula says 0/0.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shared.models.normalization import rms_norm
from shared.models.positions import apply_rotary

IMPLEMENTATIONS = ("plain", "sdpa", "tiled", "auto")
TILE = 128  # queries and keys of one tile: 64 kB of float32 scores a head, which stay in a core's cache


def attention_mask(
    num_queries: int, num_keys: int, *, causal: bool = False, window: int | None = None, device=None
) -> Tensor:
    """Which keys each query may attend to: (Tq, Tk) bool, True = may attend.

    The queries are the last Tq of the Tk positions. `causal` hides later keys; `window` leaves the keys at
    distance 0 … `window` − 1 (to both sides, unless `causal`).
    """
    return _visible(range(num_queries), range(num_keys), num_keys - num_queries, causal, window, device)


def _visible(queries: range, keys: range, offset: int, causal: bool, window: int | None, device) -> Tensor:
    rows = torch.arange(queries.start + offset, queries.stop + offset, device=device)[:, None]
    ahead = torch.arange(keys.start, keys.stop, device=device) - rows  # (Tq, Tk): j − i
    upper = 0 if causal else (window - 1 if window is not None else None)
    allowed = ahead <= upper if upper is not None else torch.ones_like(ahead, dtype=torch.bool)
    return allowed & (ahead > -window) if window is not None else allowed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    implementation: str = "sdpa",
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q·kᵀ·scale + bias)·v over the allowed keys (Vaswani et al. 2017, eq. 1).

    Args:
        q: (B, H, Tq, D). The queries are the last Tq of the Tk positions: with a cache, q holds the new ones
            only.
        k, v: (B, Hkv, Tk, D); query head h uses key head h // (H / Hkv). H = Hkv is multi-head attention,
            Hkv = 1 multi-query, in between grouped-query.
        causal: no query sees a later position.
        window: a query sees positions at distance less than this; None for all.
        mask: bool, broadcastable to (B, H, Tq, Tk), True = may attend; applied on top of `causal` and
            `window`.
        bias: finite numbers added to the scores, broadcastable to (B, H, Tq, Tk).
        scale: what the dot products are multiplied by; None for 1/√D.
        dropout: probability of dropping a weight (plain and sdpa).
        implementation: "plain" writes the weights out, O(Tq·Tk) memory; "sdpa" is PyTorch's kernel; "tiled"
            keeps one tile of scores at a time, O(Tq + Tk) memory, backward too; "auto" takes plain or sdpa by
            size.
        return_weights: also return the weights, before dropout (plain only).

    Returns:
        (B, H, Tq, D), and the weights (B, H, Tq, Tk) if asked for. A query without any allowed key gives
        zeros.

    Raises:
        ValueError: shapes, window or implementation make no sense, or the implementation cannot do what is
            asked.
    """
    _check(q, k, v, window, implementation, dropout, return_weights)
    Tq, Tk = q.shape[2], k.shape[2]
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    if Tq == 1:  # the last position sees every key, so decoding needs no mask
        causal = False
        if window is not None and window < Tk:
            k, v, mask, bias = _last_keys(window, k, v, mask, bias)
        window = None
    if implementation == "tiled":
        return _Tiled.apply(q, k, v, mask, bias, causal, window, scale)
    if implementation == "plain" or (implementation == "auto" and _plain_is_faster(q, k, dropout)):
        return _plain(q, k, v, causal, window, mask, bias, scale, dropout, return_weights)
    return _sdpa(q, k, v, causal, window, mask, bias, scale, dropout)


def _check(q, k, v, window, implementation, dropout, return_weights) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; the smallest, 1, lets a position see itself")
    if return_weights and implementation != "plain":
        raise ValueError("only implementation='plain' has the weights to return")
    if dropout and implementation == "tiled":
        raise ValueError("implementation='tiled' has no dropout; use 'plain' or 'sdpa'")


def _last_keys(count: int, k, v, mask, bias):
    """The last `count` keys, without copying; masks and biases that are the same for all keys stay."""
    cut = [None if m is None or m.shape[-1] == 1 else m[..., -count:] for m in (mask, bias)]
    mask, bias = (old if new is None else new for old, new in zip((mask, bias), cut, strict=True))
    return k[:, :, -count:], v[:, :, -count:], mask, bias


def _plain_is_faster(q: Tensor, k: Tensor, dropout: float) -> bool:
    """Measured on a CPU, forward and backward: in bf16 PyTorch's kernel takes four times as long as matmul,
    softmax, matmul at 64 keys and twice as long at 256; in fp32 it is behind up to about 100 keys, and with
    dropout always, because it then writes the weights out too.
    """
    if q.device.type != "cpu":
        return False
    Tq, Tk = q.shape[2], k.shape[2]
    if q.dtype == torch.float32:
        return Tq > 1 and (Tk <= 96 or dropout > 0.0)
    return Tq == 1 or Tk <= 512


def _allowed(
    Tq: int, Tk: int, causal: bool, window: int | None, mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """`causal`, `window` and `mask` as one mask, or None if every query sees every key."""
    if not causal and window is None:
        return mask
    positions = attention_mask(Tq, Tk, causal=causal, window=window, device=device)
    return positions if mask is None else positions & mask


def _plain(q, k, v, causal, window, mask, bias, scale, dropout, return_weights):
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    # The queries of a group stand under each other, so that its shared keys are multiplied once, not copied.
    q, keys = q.reshape(B * Hkv, -1, D), k.reshape(B * Hkv, Tk, D).transpose(1, 2)
    visible = _allowed(Tq, Tk, causal, window, mask, q.device)
    may_be_blind = mask is not None or (causal and Tq > Tk) or (window is not None and Tq - Tk >= window)
    if visible is not None and bias is None and not may_be_blind:
        hidden = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
        hidden = hidden if Hkv == H else hidden.repeat(H // Hkv, 1)
        scores = torch.baddbmm(hidden, q, keys, alpha=scale)  # scale and mask on the way
    else:
        scores = torch.bmm(q * scale, keys)  # (B·Hkv, H/Hkv·Tq, Tk)
    scores = scores.view(B, H, Tq, Tk)
    if bias is not None:
        scores = scores + bias
    if visible is not None and (bias is not None or may_be_blind):
        # The lowest finite number, not −∞: where all keys are hidden, softmax and its gradient stay numbers.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if may_be_blind:
        weights = weights * visible  # zeros for a query that sees nothing; elsewhere these are zeros already
    kept = (F.dropout(weights, dropout) if dropout else weights).to(v.dtype)  # a bias may have widened them
    out = torch.bmm(kept.view(B * Hkv, -1, Tk), v.reshape(B * Hkv, Tk, -1)).view(B, H, Tq, -1)
    return (out, weights) if return_weights else out


def _sdpa(q, k, v, causal, window, mask, bias, scale, dropout):
    options = {"dropout_p": dropout, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if causal and window is None and mask is None and bias is None and q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    allowed = _allowed(q.shape[2], k.shape[2], causal, window, mask, q.device)
    blind = None
    if q.device.type != "cpu" and (
        mask is not None or q.shape[2] > k.shape[2]
    ):  # the CPU kernel gives 0 for 0/0
        blind = ~allowed.any(-1, keepdim=True)  # no key at all: let it see anything, then take that away
        allowed = allowed | blind
    if bias is not None:
        allowed = _kernel_bias(bias, allowed, q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, **options)
    return out if blind is None else out.masked_fill(blind, 0.0)


def _kernel_bias(bias: Tensor, allowed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Bias and mask in the one tensor, of the queries' dtype, that PyTorch's kernel takes."""
    full = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
    if torch.promote_types(dtype, bias.dtype) != dtype:
        # In bfloat16 500 and 501 are the same number. Softmax does not see what is added to all keys of a
        # query, so each query's largest bias becomes 0, and what is rounded is small where weights are large.
        largest = full.detach().amax(-1, keepdim=True)
        full = full - largest.clamp_min(torch.finfo(full.dtype).min)
    return full.to(dtype)


class _Tiled(torch.autograd.Function):
    """Attention that never holds more than one tile of scores (Dao 2023, algorithms 1 and 2).

    Forward keeps, for each query, the largest score so far m, the sum of exp(score − m) and the weighted
    values; a larger score rescales them. Backward computes each tile of weights again from log Σ exp, one
    number a query.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, bias, causal, window, scale):
        ctx.rule = (causal, window, scale)
        with torch.autocast(q.device.type, enabled=False):
            out, log_sum = _tiled_forward(q, k, v, mask, bias, ctx.rule)
        ctx.save_for_backward(q, k, v, mask, bias, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        with torch.autocast(gradient.device.type, enabled=False):
            dq, dk, dv, dbias = _tiled_backward(
                gradient, *ctx.saved_tensors, ctx.rule, ctx.needs_input_grad[4]
            )
        return dq, dk, dv, None, dbias, None, None, None


def _tiles(Tq: int, Tk: int, causal: bool, window: int | None) -> Iterator[tuple[range, list[range]]]:
    """Blocks of queries, each with the blocks of keys that any of them may see."""
    offset = Tk - Tq
    for start in range(0, Tq, TILE):
        rows = range(start, min(start + TILE, Tq))
        first, last = rows.start + offset, rows.stop - 1 + offset
        low = 0 if window is None else max(0, first - window + 1)
        high = last + 1 if causal else (Tk if window is None else last + window)
        high = min(Tk, high)
        yield rows, [range(j, min(j + TILE, high)) for j in range(low, high, TILE)]


def _tile(x: Tensor, rows: range, columns: range) -> Tensor:
    """The part of a mask or bias that lies on a tile; dimensions of size 1 stay."""
    if x.ndim > 1 and x.shape[-2] != 1:
        x = x[..., rows.start : rows.stop, :]
    return x if x.shape[-1] == 1 else x[..., columns.start : columns.stop]


def _tile_scores(q, k, mask, bias, rows: range, columns: range, offset: int, rule) -> Tensor:
    """Scores of one tile, −∞ where the query may not look: q (B, H, rows, D), k (B, H, columns, D)."""
    causal, window, scale = rule
    scores = (q @ k.transpose(-2, -1)) * scale  # (B, H, rows, columns)
    if bias is not None:
        scores += _tile(bias, rows, columns)
    hidden_by_causal = causal and columns[-1] > rows.start + offset
    outside = window is not None and (
        columns.start < rows[-1] + offset - window + 1 or columns[-1] >= rows.start + offset + window
    )
    if hidden_by_causal or outside:
        allowed = _visible(rows, columns, offset, causal, window, q.device)
        scores.masked_fill_(~allowed, -torch.inf)
    if mask is not None:
        scores.masked_fill_(~_tile(mask, rows, columns), -torch.inf)
    return scores


def _rows(x: Tensor, rows: range, groups: int = 1) -> Tensor:
    """Some positions of (B, H, T, D) in at least float32, each head repeated `groups` times."""
    part = x[:, :, rows.start : rows.stop].to(torch.promote_types(x.dtype, torch.float32))
    return part.repeat_interleave(groups, dim=1) if groups > 1 else part


def _tiled_forward(q, k, v, mask, bias, rule):
    B, H, Tq, _ = q.shape
    Tk, groups = k.shape[2], H // k.shape[1]
    out = q.new_zeros(B, H, Tq, v.shape[3])
    log_sum = torch.full((B, H, Tq, 1), torch.inf, dtype=_rows(q, range(0)).dtype, device=q.device)
    for rows, blocks in _tiles(Tq, Tk, rule[0], rule[1]):
        queries = _rows(q, rows)
        top = queries.new_full((B, H, len(rows), 1), -torch.inf)
        total, values = torch.zeros_like(top), queries.new_zeros(B, H, len(rows), v.shape[3])
        for columns in blocks:
            keys = _rows(k, columns, groups)
            scores = _tile_scores(queries, keys, mask, bias, rows, columns, Tk - Tq, rule)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            shift = new_top.masked_fill(new_top == -torch.inf, 0.0)  # nothing seen yet: exp(−∞ − 0) = 0
            weights = scores.sub_(shift).exp_()
            rescale = (top - shift).exp_()
            total = total.mul_(rescale).add_(weights.sum(-1, keepdim=True))
            values = values.mul_(rescale).add_(weights @ _rows(v, columns, groups))
            top = new_top
        part = slice(rows.start, rows.stop)
        seen = total > 0
        out[:, :, part] = values / total.masked_fill(~seen, 1.0)
        log_sum[:, :, part] = (top + total.log()).masked_fill_(~seen, torch.inf)  # +∞: every weight is 0
    return out, log_sum


def _tiled_backward(gradient, q, k, v, mask, bias, out, log_sum, rule, bias_needs_gradient):
    H, Tq = q.shape[1:3]
    Hkv, Tk = k.shape[1:3]
    dq, dk, dv = (torch.zeros_like(x, dtype=log_sum.dtype) for x in (q, k, v))
    dbias = torch.zeros_like(bias, dtype=log_sum.dtype) if bias_needs_gradient else None
    for rows, blocks in _tiles(Tq, Tk, rule[0], rule[1]):
        part = slice(rows.start, rows.stop)
        queries, upstream = _rows(q, rows), _rows(gradient, rows)
        inner = (upstream * _rows(out, rows)).sum(-1, keepdim=True)  # Σ_j weight_j · ∂weight_j
        for columns in blocks:
            keys, values = _rows(k, columns, H // Hkv), _rows(v, columns, H // Hkv)
            scores = _tile_scores(queries, keys, mask, bias, rows, columns, Tk - Tq, rule)
            weights = scores.sub_(log_sum[:, :, part]).exp_()
            dscores = (upstream @ values.transpose(-2, -1)).sub_(inner).mul_(weights)
            if dbias is not None:
                tile = _tile(dbias, rows, columns)
                tile += dscores.sum_to_size(tile.shape)
            dscores *= rule[2]
            span = slice(columns.start, columns.stop)
            dq[:, :, part] += dscores @ keys
            for total, new in (
                (dk, dscores.transpose(-2, -1) @ queries),
                (dv, weights.transpose(-2, -1) @ upstream),
            ):
                total[:, :, span] += new.unflatten(1, (Hkv, -1)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None if dbias is None else dbias.to(bias.dtype)


def _for_heads(table: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Cosines or sines (…, T, D) as (…, T, heads or 1, D), written out per head if that makes longer rows."""
    table = table.to(dtype).unsqueeze(-2)
    if table.ndim == 3 and table.shape[0] > 1:
        return table.expand(-1, heads, -1).contiguous()  # (T, heads, D)
    return table


class MultiHeadAttention(nn.Module):
    """concat(head_1 … head_H)·W_out, head_h = attention(x·W_q, x·W_k, x·W_v) (Vaswani et al. 2017, §3.2.2).

    The three projections are one matrix, `qkv`, with the rows of all queries first, then keys, then values.

    Args:
        d_model: C; a head is C / H wide.
        num_heads: H.
        num_kv_heads: Hkv, a divisor of H; None for H. 1 is multi-query attention.
        bias: bias vectors in the projections.
        dropout: on the attention weights, while training.
        qk_norm: RMSNorm over each head of queries and keys, before rotation (Henry et al. 2020; Qwen3).
        qk_norm_affine: with a trained weight (D,) for queries and one for keys.
        norm_eps: ε of these norms.
        implementation: see `attention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
        qk_norm_affine: bool = True,
        norm_eps: float = 1e-6,
        implementation: str = "sdpa",
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if d_model % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"width {d_model}, {num_heads} heads and {num_kv_heads} key heads do not divide evenly"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = d_model // num_heads
        self.qkv = nn.Linear(d_model, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)
        self.qk_norm, self.norm_eps = qk_norm, norm_eps
        if qk_norm and qk_norm_affine:
            self.q_norm = nn.Parameter(torch.ones(self.head_dim))
            self.k_norm = nn.Parameter(torch.ones(self.head_dim))
        self.dropout = dropout
        self.implementation = implementation

    def forward(
        self,
        x: Tensor,
        *,
        keys_values: tuple[Tensor, Tensor] | None = None,
        causal: bool = False,
        window: int | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache=None,
        layer: int = 0,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, T, C) -> (B, T, C), and the weights (B, H, T, Tk) if asked for.

        Args:
            x: what the queries come from; keys and values too, unless `keys_values` is given.
            keys_values: (B, Hkv, Tk, D) each, from `keys_values()`: cross-attention.
            causal, window, mask, bias: see `attention`.
            rotary: cos and sin for the positions of `x`, each (T, D) or (B, T, D).
            cache: has `update(layer, k, v)`, which keeps the new keys and values (B, Hkv, T, D) and returns
                all.
            layer: the cache's name for this layer.
            return_weights: compute with the plain implementation and return the weights too.
        """
        B, T, C = x.shape
        if keys_values is None:
            q, k, v = self._project(x, rotary)
            if cache is not None:
                k, v = cache.update(layer, k, v)
        else:
            q, (k, v) = self._queries(x), keys_values
        result = attention(
            q, k, v, causal=causal, window=window, mask=mask, bias=bias,
            dropout=self.dropout if self.training else 0.0,
            implementation="plain" if return_weights else self.implementation,
            return_weights=return_weights,
        )  # fmt: skip
        out, weights = result if return_weights else (result, None)
        out = self.out(out.transpose(1, 2).reshape(B, T, C))
        return (out, weights) if return_weights else out

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence (B, S, C): (B, Hkv, S, D) each, for all later queries."""
        rows = self.num_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[rows:]
        kv = F.linear(memory, self.qkv.weight[rows:], bias).unflatten(-1, (-1, self.head_dim))
        k, v = kv.split(self.num_kv_heads, dim=2)  # (B, S, Hkv, D) each
        if self.qk_norm:
            k = self._normalise(k, 0, self.num_kv_heads)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _queries(self, x: Tensor) -> Tensor:
        rows = self.num_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[:rows]
        q = F.linear(x, self.qkv.weight[:rows], bias).unflatten(-1, (self.num_heads, self.head_dim))
        return (self._normalise(q, self.num_heads, 0) if self.qk_norm else q).transpose(1, 2)

    def _project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same sequence, (B, H or Hkv, T, D)."""
        B, T, _ = x.shape
        H, Hkv = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x).view(B, T, H + 2 * Hkv, self.head_dim)
        if rotary is None and not self.qk_norm:
            q, k, v = qkv.transpose(1, 2).split((H, Hkv, Hkv), dim=1)
            return q, k, v
        qk, v = qkv.split((H + Hkv, Hkv), dim=2)  # queries and keys are treated alike: one pass for both
        if self.qk_norm:
            qk = self._normalise(qk, H, Hkv)
        if rotary is not None:
            qk = apply_rotary(qk, *(_for_heads(table, H + Hkv, qk.dtype) for table in rotary))
        q, k = qk.transpose(1, 2).split((H, Hkv), dim=1)
        return q, k, v.transpose(1, 2)

    def _normalise(self, heads: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """RMSNorm of (B, T, `num_queries` + `num_keys`, D), the queries first."""
        heads = rms_norm(heads, None, self.norm_eps)
        if not hasattr(self, "q_norm"):
            return heads
        weight = torch.cat((self.q_norm.expand(num_queries, -1), self.k_norm.expand(num_keys, -1)))
        return heads * weight.to(heads.dtype)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the weights of every `MultiHeadAttention` in `model` that runs inside the block.

    Yields a dictionary that fills as the model runs: the module's name -> its last weights (B, H, Tq, Tk).
    """
    recorded: dict[str, Tensor] = {}

    def ask(_, args, options):
        return args, options | {"return_weights": True}

    def keep(name: str):
        def hook(_, inputs, result):
            out, recorded[name] = result[0], result[1].detach()
            return out

        return hook

    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, MultiHeadAttention):
            hooks += [
                layer.register_forward_pre_hook(ask, with_kwargs=True),
                layer.register_forward_hook(keep(name)),
            ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
