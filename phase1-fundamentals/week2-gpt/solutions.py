"""One answer to each exercise of week 2, and wrong answers that the tests must catch."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def _tally(word, amount, pairs):
    for neighbours in pairwise(word):
        pairs[neighbours] = pairs.get(neighbours, 0) + amount


def _joined(word, pair, new):
    out, i = [], 0
    while i < len(word):
        here = tuple(word[i : i + 2]) == pair
        out.append(new if here else word[i])
        i += 2 if here else 1
    return tuple(out)


def apply_merge(word, count, pair, new, pairs):
    """Take the old word's pairs out, put the new word's in."""
    after = _joined(word, pair, new)
    _tally(word, -count, pairs)
    _tally(after, count, pairs)
    return after


def encode_with_ranks(word: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """Always the earliest merge that is possible, and of its occurrences the leftmost."""
    tokens = [word[i : i + 1] for i in range(len(word))]
    while True:
        candidates = [(ranks[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in ranks]
        if not candidates:
            return tokens
        _, i = min(candidates)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


def split_complete(data: bytes) -> tuple[str, bytes]:
    """Python's incremental decoder keeps back exactly what could still become a character."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(data)
    return text, decoder.getstate()[0]


def causal_self_attention(x: Tensor, w_qkv: Tensor, w_out: Tensor, num_heads: int) -> Tensor:
    """softmax(q·kᵀ/√D + mask)·v in each head, heads side by side, one matrix at the end."""
    B, T, C = x.shape
    q, k, v = (part.view(B, T, num_heads, -1).transpose(1, 2) for part in (x @ w_qkv).split(C, dim=-1))
    scores = q @ k.transpose(-2, -1) / math.sqrt(C // num_heads)  # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(B, T, C) @ w_out


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Position t against token t + 1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)


def gelu_tanh(x: Tensor) -> Tensor:
    """Hendrycks & Gimpel 2016, §2."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def count_gpt2_parameters(vocab_size: int, context_length: int, num_layers: int, d_model: int) -> int:
    """12·C² + 13·C a layer, (V + T)·C of embeddings, 2·C of the last LayerNorm."""
    C = d_model
    attention = C * 3 * C + 3 * C + C * C + C
    mlp = C * 4 * C + 4 * C + 4 * C * C + C
    norms = 2 * (2 * C)
    return (vocab_size + context_length) * C + num_layers * (attention + mlp + norms) + 2 * C


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """A token is out once those before it already have p."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    out = probabilities.cumsum(dim=-1) - probabilities >= p
    out[:, 0] = False
    return logits.masked_fill(out.scatter(1, order, out), -torch.inf)


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Relative to the row's most probable token."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def bits_per_byte(nats_per_token: float, num_tokens: int, text: str) -> float:
    """All nats, as bits, over all bytes."""
    return nats_per_token * num_tokens / math.log(2) / len(text.encode("utf-8"))


def average_gradients(gradients: list[Tensor], num_tokens: list[int]) -> Tensor:
    """Each process counts by its share of the tokens."""
    total = sum(num_tokens)
    return sum(gradient * (tokens / total) for gradient, tokens in zip(gradients, num_tokens, strict=True))


# Wrong answers: mistakes that people make.


def _merge_keeps_old_pairs(word, count, pair, new, pairs):
    after = _joined(word, pair, new)
    pairs.pop(pair, None)  # the pair itself is gone, but its neighbours still count as before
    _tally(after, count, pairs)
    return after


def _merge_counts_words_once(word, count, pair, new, pairs):
    after = _joined(word, pair, new)
    _tally(word, -1, pairs)
    _tally(after, 1, pairs)
    return after


def _merge_first_only(word, count, pair, new, pairs):
    after = word
    for i, neighbours in enumerate(pairwise(word)):
        if neighbours == pair:
            after = (*word[:i], new, *word[i + 2 :])
            break
    _tally(word, -count, pairs)
    _tally(after, count, pairs)
    return after


def _encode_left_to_right(word, ranks):
    tokens = [word[i : i + 1] for i in range(len(word))]
    i = 0
    while i < len(tokens) - 1:
        if (tokens[i], tokens[i + 1]) in ranks:
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
            i = 0
        else:
            i += 1
    return tokens


def _encode_longest_first(word, ranks):
    known = {left + right for left, right in ranks}
    tokens, rest = [], word
    while rest:
        length = next((n for n in range(len(rest), 1, -1) if rest[:n] in known), 1)
        tokens.append(rest[:length])
        rest = rest[length:]
    return tokens


def _encode_last_learnt_first(word, ranks):
    return encode_with_ranks(word, {pair: -rank for pair, rank in ranks.items()})


def _split_replaces_everything(data):
    return data.decode("utf-8", errors="replace"), b""


def _split_waits_for_ever(data):
    for length in range(len(data), -1, -1):
        try:
            return data[:length].decode("utf-8"), data[length:]
        except UnicodeDecodeError:
            continue
    return "", data


def _split_drops_the_tail(data):
    text, _ = split_complete(data)
    return text, b""


def _attention_sees_all(x, w_qkv, w_out, num_heads):
    B, T, C = x.shape
    q, k, v = (part.view(B, T, num_heads, -1).transpose(1, 2) for part in (x @ w_qkv).split(C, dim=-1))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(C // num_heads)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(B, T, C) @ w_out


def _attention_mask_after_softmax(x, w_qkv, w_out, num_heads):
    B, T, C = x.shape
    q, k, v = (part.view(B, T, num_heads, -1).transpose(1, 2) for part in (x @ w_qkv).split(C, dim=-1))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(C // num_heads)).softmax(dim=-1).tril()
    return (weights @ v).transpose(1, 2).reshape(B, T, C) @ w_out


def _attention_heads_not_put_back(x, w_qkv, w_out, num_heads):
    B, T, C = x.shape
    q, k, v = (part.view(B, T, num_heads, -1).transpose(1, 2) for part in (x @ w_qkv).split(C, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(B, T, C) @ w_out


def _attention_scaled_by_width(x, w_qkv, w_out, num_heads):
    B, T, C = x.shape
    q, k, v = (part.view(B, T, num_heads, -1).transpose(1, 2) for part in (x @ w_qkv).split(C, dim=-1))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / math.sqrt(C))
    return out.transpose(1, 2).reshape(B, T, C) @ w_out


def _loss_not_shifted(logits, ids):
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=-100)


def _loss_shifted_backwards(logits, ids):
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten(), ignore_index=-100)


def _loss_counts_padding(logits, ids):
    targets = ids[:, 1:].flatten()
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="none")
    return each.mean()


def _gelu_exact(x):
    return F.gelu(x)


def _gelu_sigmoid(x):
    return x * torch.sigmoid(1.702 * x)


def _parameters_untied(vocab_size, context_length, num_layers, d_model):
    return count_gpt2_parameters(2 * vocab_size, context_length, num_layers, d_model)


def _parameters_matrices_only(vocab_size, context_length, num_layers, d_model):
    return (vocab_size + context_length) * d_model + num_layers * 12 * d_model**2


def _parameters_no_last_norm(vocab_size, context_length, num_layers, d_model):
    return count_gpt2_parameters(vocab_size, context_length, num_layers, d_model) - 2 * d_model


def _top_p_stops_short(logits, p):
    ordered, order = logits.sort(dim=-1, descending=True)
    out = ordered.softmax(dim=-1).cumsum(dim=-1) > p
    out[:, 0] = False
    return logits.masked_fill(out.scatter(1, order, out), -torch.inf)


def _top_p_forgets_to_unsort(logits, p):
    ordered = logits.sort(dim=-1, descending=True).values
    probabilities = ordered.softmax(dim=-1)
    return ordered.masked_fill(probabilities.cumsum(dim=-1) - probabilities >= p, -torch.inf)


def _top_p_mask_not_unsorted(logits, p):
    probabilities = logits.sort(dim=-1, descending=True).values.softmax(dim=-1)
    return logits.masked_fill(probabilities.cumsum(dim=-1) - probabilities >= p, -torch.inf)


def _min_p_absolute(logits, min_p):
    return logits.masked_fill(logits.softmax(dim=-1) < min_p, -torch.inf)


def _min_p_on_logits(logits, min_p):
    return logits.masked_fill(logits < min_p * logits.amax(dim=-1, keepdim=True), -torch.inf)


def _min_p_over_the_batch(logits, min_p):
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.max(), -torch.inf)


def _bits_in_nats(nats_per_token, num_tokens, text):
    return nats_per_token * num_tokens / len(text.encode("utf-8"))


def _bits_per_character(nats_per_token, num_tokens, text):
    return nats_per_token * num_tokens / math.log(2) / len(text)


def _bits_per_token(nats_per_token, num_tokens, text):
    return nats_per_token / math.log(2)


def _plain_average(gradients, num_tokens):
    return torch.stack(gradients).mean(dim=0)


def _sum_of_gradients(gradients, num_tokens):
    return torch.stack(gradients).sum(dim=0)


def _weighted_but_not_divided(gradients, num_tokens):
    return sum(gradient * tokens for gradient, tokens in zip(gradients, num_tokens, strict=True))


WRONG_ANSWERS = {
    "apply_merge": [_merge_keeps_old_pairs, _merge_counts_words_once, _merge_first_only],
    "encode_with_ranks": [_encode_left_to_right, _encode_longest_first, _encode_last_learnt_first],
    "split_complete": [_split_replaces_everything, _split_waits_for_ever, _split_drops_the_tail],
    "causal_self_attention": [
        _attention_sees_all,
        _attention_mask_after_softmax,
        _attention_heads_not_put_back,
        _attention_scaled_by_width,
    ],
    "next_token_loss": [_loss_not_shifted, _loss_shifted_backwards, _loss_counts_padding],
    "gelu_tanh": [_gelu_exact, _gelu_sigmoid],
    "count_gpt2_parameters": [_parameters_untied, _parameters_matrices_only, _parameters_no_last_norm],
    "top_p_filter": [_top_p_stops_short, _top_p_forgets_to_unsort, _top_p_mask_not_unsorted],
    "min_p_filter": [_min_p_absolute, _min_p_on_logits, _min_p_over_the_batch],
    "bits_per_byte": [_bits_in_nats, _bits_per_character, _bits_per_token],
    "average_gradients": [_plain_average, _sum_of_gradients, _weighted_but_not_divided],
}
