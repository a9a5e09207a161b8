"""Solutions of week 1's exercises, and wrong answers that the tests must catch."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights.masked_fill(~mask, 0.0) @ v  # a row of nan, hidden entirely, becomes zeros


def window_mask(T: int, window: int) -> Tensor:
    distance = torch.arange(T)[:, None] - torch.arange(T)  # i − j
    return (distance >= 0) & (distance < window)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, T, H, D) -> (B, T, H·D)


def grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    grouped = q.reshape(B, Hkv, H // Hkv * Tq, D)  # the queries of a group below each other: no key is copied
    return (grouped @ k.transpose(-2, -1)).view(B, H, Tq, Tk)


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    D = x.shape[-1]
    angles = positions[:, None] * base ** (-torch.arange(0, D, 2) / D)  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def online_softmax(pieces: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    top, total, weighted = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for scores, values in pieces:
        new_top = torch.maximum(top, scores.max())
        rescale, weights = (top - new_top).exp(), (scores - new_top).exp()
        total = total * rescale + weights.sum()
        weighted = weighted * rescale + weights @ values
        top = new_top
    return weighted / total


def kv_cache_bytes(
    num_layers: int, num_heads: int, num_kv_heads: int, d_model: int, tokens: int, batch: int, bytes_each: int
) -> int:
    return 2 * num_layers * batch * num_kv_heads * (d_model // num_heads) * tokens * bytes_each


def noam_rate(step: int, d_model: int, warmup_steps: int) -> float:
    s = step + 1
    return d_model**-0.5 * min(s**-0.5, s * warmup_steps**-1.5)


def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float, pad_id: int) -> Tensor:
    surprise = -logits.log_softmax(dim=-1)  # (B, T, V)
    right = surprise.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (B, T)
    loss = (1 - epsilon) * right + epsilon * surprise.mean(dim=-1)
    return loss[targets != pad_id].mean()


def beam_step(
    scores: Tensor, log_probs: Tensor, finished: Tensor, end_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    V = log_probs.shape[1]
    stay = torch.full_like(log_probs, -torch.inf)
    stay[:, end_id] = 0.0
    total = scores[:, None] + torch.where(finished[:, None], stay, log_probs)  # (K, V)
    best = total.flatten().topk(len(scores))
    return best.values, best.indices // V, best.indices % V


# Wrong answers: what one writes on the way to the right one.


def _unscaled(q, k):
    return (q @ k.transpose(-2, -1)).softmax(dim=-1)


def _softmax_over_queries(q, k):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-2)


def _divided_by_d(q, k):
    return (q @ k.transpose(-2, -1) / q.shape[-1]).softmax(dim=-1)


def _masked_after_softmax(q, k, v, mask):
    return (attention_weights(q, k) * mask) @ v


def _mask_upside_down(q, k, v, mask):
    return masked_attention(q, k, v, ~mask)


def _nan_left_in(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


def _even_weights_for_nothing(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -1e9).softmax(dim=-1) @ v


def _window_one_too_wide(T, window):
    return window_mask(T, window + 1)


def _window_both_sides(T, window):
    return (torch.arange(T)[:, None] - torch.arange(T)).abs() < window


def _window_transposed(T, window):
    return window_mask(T, window).T


def _reshaped_at_once(x):
    B, H, T, D = x.shape
    return x.reshape(B, T, H * D)


def _heads_inside(x):
    return x.permute(0, 2, 3, 1).flatten(2)  # (B, T, D, H)


def _repeated(q, k):
    return q @ k.repeat(1, q.shape[1] // k.shape[1], 1, 1).transpose(-2, -1)


def _first_key_head_only(q, k):
    return q @ k[:, :1].transpose(-2, -1)


def _turned_backwards(x, positions, base=10_000.0):
    return rotate(x, -positions, base)


def _neighbours_paired(x, positions, base=10_000.0):
    D = x.shape[-1]
    angles = positions[:, None] * base ** (-torch.arange(0, D, 2) / D)
    first, second = x[..., 0::2], x[..., 1::2]
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.stack(turned, dim=-1).flatten(-2)


def _places_counted_instead(x, positions, base=10_000.0):
    return rotate(x, torch.arange(len(positions)), base)


def _speeds_too_slow(x, positions, base=10_000.0):
    return rotate(x, positions, base**2)  # −4i/D where −2i/D should stand


def _not_rescaled(pieces):
    top, total, weighted = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for scores, values in pieces:
        top = torch.maximum(top, scores.max())
        weights = (scores - top).exp()
        total, weighted = total + weights.sum(), weighted + weights @ values
    return weighted / total


def _without_maximum(pieces):
    total, weighted = torch.tensor(0.0), torch.tensor(0.0)
    for scores, values in pieces:
        total, weighted = total + scores.exp().sum(), weighted + scores.exp() @ values
    return weighted / total


def _average_of_averages(pieces):
    results = [scores.softmax(0) @ values for scores, values in pieces]
    return torch.stack(results).mean(0)


def _query_heads_cached(num_layers, num_heads, num_kv_heads, d_model, tokens, batch, bytes_each):
    return 2 * num_layers * batch * d_model * tokens * bytes_each


def _keys_only(*sizes):
    return kv_cache_bytes(*sizes) // 2


def _model_width_per_head(num_layers, num_heads, num_kv_heads, d_model, tokens, batch, bytes_each):
    return 2 * num_layers * batch * num_kv_heads * d_model * tokens * bytes_each


def _no_warm_up(step, d_model, warmup_steps):
    return d_model**-0.5 * (step + 1) ** -0.5


def _step_zero_is_zero(step, d_model, warmup_steps):
    return d_model**-0.5 * min(max(step, 1) ** -0.5, step * warmup_steps**-1.5)


def _max_for_min(step, d_model, warmup_steps):
    s = step + 1
    return d_model**-0.5 * max(s**-0.5, s * warmup_steps**-1.5)


def _padding_counted(logits, targets, epsilon, pad_id):
    surprise = -logits.log_softmax(dim=-1)
    right = surprise.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return ((1 - epsilon) * right + epsilon * surprise.mean(dim=-1)).mean()


def _divided_by_everything(logits, targets, epsilon, pad_id):
    kept = targets != pad_id
    return smoothed_loss(logits, targets, epsilon, pad_id) * kept.sum() / kept.numel()


def _not_smoothed(logits, targets, epsilon, pad_id):
    return smoothed_loss(logits, targets, 0.0, pad_id)


def _smoothed_by_the_sum(logits, targets, epsilon, pad_id):
    surprise = -logits.log_softmax(dim=-1)
    right = surprise.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    loss = (1 - epsilon) * right + epsilon * surprise.sum(dim=-1)
    return loss[targets != pad_id].mean()


def _greedy_per_beam(scores, log_probs, finished, end_id):
    best = log_probs.max(dim=-1)
    order = (scores + best.values).argsort(descending=True)
    return (scores + best.values)[order], order, best.indices[order]


def _history_forgotten(scores, log_probs, finished, end_id):
    _, beams, tokens = beam_step(torch.zeros_like(scores), log_probs, finished, end_id)
    return scores[beams] + log_probs[beams, tokens], beams, tokens


def _finished_goes_on(scores, log_probs, finished, end_id):
    return beam_step(scores, log_probs, torch.zeros_like(finished), end_id)


def _finished_pays(scores, log_probs, finished, end_id):
    only_end = torch.full_like(log_probs, -torch.inf)
    only_end[:, end_id] = log_probs[:, end_id]
    return beam_step(
        scores, torch.where(finished[:, None], only_end, log_probs), torch.zeros_like(finished), end_id
    )


WRONG_ANSWERS = {
    "attention_weights": [_unscaled, _softmax_over_queries, _divided_by_d],
    "masked_attention": [_masked_after_softmax, _mask_upside_down, _nan_left_in, _even_weights_for_nothing],
    "window_mask": [_window_one_too_wide, _window_both_sides, _window_transposed],
    "merge_heads": [_reshaped_at_once, _heads_inside],
    "grouped_scores": [_repeated, _first_key_head_only],
    "rotate": [_turned_backwards, _neighbours_paired, _places_counted_instead, _speeds_too_slow],
    "online_softmax": [_not_rescaled, _without_maximum, _average_of_averages],
    "kv_cache_bytes": [_query_heads_cached, _keys_only, _model_width_per_head],
    "noam_rate": [_no_warm_up, _step_zero_is_zero, _max_for_min],
    "smoothed_loss": [_padding_counted, _divided_by_everything, _not_smoothed, _smoothed_by_the_sum],
    "beam_step": [_greedy_per_beam, _history_forgotten, _finished_goes_on, _finished_pays],
}
