"""Tests of week 2's exercises. A failure says what is wrong, not only that something is."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F


def count_all(words):
    pairs = Counter()
    for word, count in words:
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def without_zeros(pairs):
    return {pair: count for pair, count in pairs.items() if count != 0}


# ------------------------------------------------------------------------------------------- apply_merge


@pytest.mark.parametrize(
    ("word", "pair", "expected"),
    [
        ((1, 2, 3), (2, 3), (1, 9)),
        ((1, 2, 1, 2, 3), (1, 2), (9, 9, 3)),
        ((4, 4, 4, 4, 4), (4, 4), (9, 9, 4)),
        ((1, 2, 3), (3, 1), (1, 2, 3)),
    ],
)
def test_apply_merge_joins_every_occurrence_from_the_left(answers, word, pair, expected):
    after = tuple(answers.apply_merge(word, 1, pair, 9, dict(count_all([(word, 1)]))))
    if after != expected and after.count(9) < expected.count(9):
        pytest.fail(f"you joined {after.count(9)} of {expected.count(9)} occurrences of {pair} in {word}")
    assert after == expected, f"merging {pair} in {word} gives {expected}; you gave {after}"


def test_apply_merge_keeps_the_counts_as_if_counted_again(answers):
    words = [((5, 1, 2, 6, 1, 2), 7), ((1, 2, 1, 2, 5), 3), ((5, 1, 7), 2)]
    pairs = dict(count_all(words))
    after = [(tuple(answers.apply_merge(word, count, (1, 2), 9, pairs)), count) for word, count in words]
    expected, found = without_zeros(count_all(after)), without_zeros(pairs)
    stale = sorted(pair for pair in found if pair not in expected)
    assert not stale, f"pair {stale[0]} no longer occurs anywhere, but you count it {found[stale[0]]} times"
    for pair, count in sorted(expected.items()):
        said = found.get(pair, 0)
        assert said == count, (
            f"pair {pair} occurs {count} times; you say {said} (the words occur 7, 3 and 2 times)"
        )


# ------------------------------------------------------------------------------------- encode_with_ranks


def ranks_of(*pairs):
    return {(left.encode(), right.encode()): rank for rank, (left, right) in enumerate(pairs)}


def shown(tokens):
    return "·".join(token.decode() for token in tokens)


def test_encode_with_ranks_applies_the_earliest_merge_first(answers):
    ranks = ranks_of(("b", "c"), ("a", "b"))
    found = list(answers.encode_with_ranks(b"abc", ranks))
    message = f"'bc' was learnt before 'ab', so 'abc' is a·bc; you cut it {shown(found)}"
    assert found == [b"a", b"bc"], message


def test_encode_with_ranks_does_not_jump_to_the_longest_token(answers):
    ranks = ranks_of(("c", "d"), ("a", "b"), ("ab", "c"))
    found = list(answers.encode_with_ranks(b"abcd", ranks))
    message = f"'cd' is joined first, so the token 'abc' cannot arise: ab·cd; you cut it {shown(found)}"
    assert found == [b"ab", b"cd"], message


def test_encode_with_ranks_goes_on_with_merged_tokens(answers):
    ranks = ranks_of(("i", "n"), ("in", "g"), ("r", "ing"), ("t", "ring"), ("s", "tring"), ("string", "ing"))
    found = list(answers.encode_with_ranks(b"stringing", ranks))
    assert found == [b"stringing"], (
        f"tokens just made may be joined too: stringing is one; you cut {shown(found)}"
    )


@pytest.mark.parametrize("word", [b"", b"x", b"aaaaa", bytes(range(250, 256))])
def test_encode_with_ranks_loses_no_byte(answers, word):
    found = list(answers.encode_with_ranks(word, ranks_of(("a", "a"))))
    assert b"".join(found) == word, (
        f"the tokens of {word!r} must join to it again; yours give {b''.join(found)!r}"
    )
    if word == b"aaaaa":
        assert found == [b"aa", b"aa", b"a"], f"equal ranks go from the left: aa·aa·a; you cut {shown(found)}"


# ---------------------------------------------------------------------------------------- split_complete


@pytest.mark.parametrize("character", ["é", "ท", "😀"])
def test_split_complete_waits_for_the_rest_of_a_character(answers, character):
    data = character.encode()
    for cut in range(1, len(data)):
        text, rest = answers.split_complete(b"ab" + data[:cut])
        assert "\ufffd" not in text, (
            f"{cut} of {len(data)} bytes of {character!r} have come: wait, do not show U+FFFD"
        )
        assert bytes(rest) == data[:cut], f"the waiting bytes are {data[:cut]!r}; you keep {rest!r}"
        assert text == "ab", f"'ab' is complete and can be shown; you show {text!r}"


def test_split_complete_shows_whole_characters_at_once(answers):
    assert tuple(answers.split_complete("naïve 😀".encode())) == ("naïve 😀", b""), (
        "nothing is missing, nothing waits"
    )
    assert tuple(answers.split_complete(b"")) == ("", b""), "no bytes: no text, nothing waiting"


def test_split_complete_does_not_wait_for_what_cannot_come(answers):
    text, rest = answers.split_complete(b"a\xffb")
    assert not rest, f"0xFF never begins a character, so waiting for more is in vain; you hold back {rest!r}"
    assert text == "a\ufffdb", f"an impossible byte is shown as U+FFFD: 'a\ufffdb'; you show {text!r}"


# --------------------------------------------------------------------------------- causal_self_attention


def random_attention(B=2, T=6, C=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in ((B, T, C), (C, 3 * C), (C, C))]


def test_causal_self_attention_has_the_right_shape(answers):
    x, w_qkv, w_out = random_attention(B=2, T=5, C=12)
    shape = tuple(answers.causal_self_attention(x, w_qkv, w_out, 3).shape)
    assert shape == (2, 5, 12), f"the output has the input's shape (2, 5, 12); yours is {shape}"


def test_causal_self_attention_scales_and_joins_heads(answers):
    x, w_qkv, w_out = random_attention()
    B, T, C = x.shape
    q, k, v = (part.view(B, T, 2, C // 2).transpose(1, 2) for part in (x @ w_qkv).split(C, dim=-1))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = answers.causal_self_attention(x, w_qkv, w_out, 2)
    by_width = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=C**-0.5).transpose(1, 2)
    assert not torch.allclose(found, by_width.reshape(B, T, C) @ w_out, atol=1e-4), (
        "you divide by √C; each head's dot products have D = C / H terms, so it is √D"
    )
    mixed = heads.reshape(B, T, C) @ w_out
    assert not torch.allclose(found, mixed, atol=1e-4), (
        "(B, H, T, D) must be transposed back to (B, T, H, D) before it is reshaped to (B, T, C)"
    )


def test_causal_self_attention_does_not_look_ahead(answers):
    x, w_qkv, w_out = random_attention()
    x.requires_grad_()
    for t in range(x.shape[1]):
        (gradient,) = torch.autograd.grad(answers.causal_self_attention(x, w_qkv, w_out, 2)[:, t].sum(), x)
        seen = gradient.abs().amax(dim=(0, 2)) > 0
        late = [j for j in range(t + 1, x.shape[1]) if seen[j]]
        assert not late, f"your mask lets position {t} see position {late[0]} (or the softmax already has)"
        assert seen[: t + 1].all(), f"position {t} must see itself and all positions before it"


def test_causal_self_attention_equals_torch(answers):
    x, w_qkv, w_out = random_attention()
    B, T, C = x.shape
    q, k, v = (part.view(B, T, 2, C // 2).transpose(1, 2) for part in (x @ w_qkv).split(C, dim=-1))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = heads.transpose(1, 2).reshape(B, T, C) @ w_out
    error = (answers.causal_self_attention(x, w_qkv, w_out, 2) - expected).abs().max().item()
    assert error < 1e-4, f"differs from PyTorch's by up to {error:.2g}: check heads, scale and w_out"


# --------------------------------------------------------------------------------------- next_token_loss


def confident(ids, shift, vocab_size=11):
    """Logits that are sure of the token `shift` places further on."""
    return 30.0 * F.one_hot(ids.roll(-shift, dims=1), vocab_size).float()


def test_next_token_loss_looks_one_token_ahead(answers):
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    right = float(answers.next_token_loss(confident(ids, 1), ids))
    copying = float(answers.next_token_loss(confident(ids, 0), ids))
    assert copying > 1, (
        "a model that repeats the token it has just read gets a loss of zero: nothing is shifted"
    )
    assert right < 1e-3, (
        f"a model that always knows the next token has loss 0, not {right:.3f}: which way do you shift?"
    )


def test_next_token_loss_leaves_out_padding(answers):
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    padded = ids.clone()
    padded[1, 3:] = -100
    each = -logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # (B, T − 1)
    expected = torch.cat((each[0], each[1, :2])).mean().item()
    found = float(answers.next_token_loss(logits, padded))
    assert abs(found - expected) < 1e-5, (
        f"seven real targets have a mean loss of {expected:.4f}; you say {found:.4f} (padding does not count)"
    )


# --------------------------------------------------------------------------------------------- gelu_tanh


def test_gelu_tanh_equals_torch_to_seven_digits(answers):
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    found, expected = answers.gelu_tanh(x), F.gelu(x, approximate="tanh")
    assert not torch.allclose(found, F.gelu(x), atol=1e-9), (
        "that is the exact GELU; GPT-2 uses its tanh approximation"
    )
    worst = (found - expected).abs().argmax()
    error = (found - expected).abs().max().item()
    assert error < 1e-9, f"at x = {x[worst]:.2f} it is {expected[worst]:.6f}; you say {found[worst]:.6f}"


# --------------------------------------------------------------------------------- count_gpt2_parameters


@pytest.mark.parametrize(
    ("num_layers", "d_model", "expected"),
    [(12, 768, 124_439_808), (24, 1024, 354_823_168), (36, 1280, 774_030_080), (48, 1600, 1_557_611_200)],
)
def test_count_gpt2_parameters_of_the_published_sizes(answers, num_layers, d_model, expected):
    found = answers.count_gpt2_parameters(50_257, 1024, num_layers, d_model)
    missing = expected - found
    hints = {
        -50_257 * d_model: "the head is the token embedding again: count it once",
        2 * d_model: "the last LayerNorm, before the head, has a weight and a bias too",
        num_layers * 13 * d_model + 2 * d_model: "the biases and LayerNorms are missing",
    }
    hint = hints.get(missing, f"off by {missing:,}")
    assert found == expected, f"{num_layers} layers of {d_model}: {expected:,}, you say {found:,}; {hint}"


# ------------------------------------------------------------------------------------------ top_p_filter


def kept(filtered):
    return [row.isfinite().nonzero().flatten().tolist() for row in filtered]


LOGITS = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]).log()


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.4, [[1], [0]]), (0.6, [[1, 3], [0]]), (0.8, [[1, 2, 3], [0]]), (1.0, [[0, 1, 2, 3], [0, 1, 2, 3]])],
)
def test_top_p_filter_keeps_the_smallest_set_that_reaches_p(answers, p, expected):
    filtered = answers.top_p_filter(LOGITS.clone(), p)
    found = kept(filtered)
    where = (
        f"of probabilities {LOGITS[0].exp().tolist()}"
        if found[0] != expected[0]
        else "of 0.97 and three 0.01"
    )
    assert found == expected, f"p = {p} keeps tokens {expected} {where}; you keep {found}"
    same = torch.where(filtered.isfinite(), filtered, LOGITS)
    assert torch.equal(same, LOGITS), "the logits that stay must stay where they were and as they were"


# ------------------------------------------------------------------------------------------ min_p_filter


@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.3, [[1, 2, 3], [0]]), (0.6, [[1], [0]]), (0.0, [[0, 1, 2, 3]] * 2)]
)
def test_min_p_filter_follows_the_most_probable_token(answers, min_p, expected):
    filtered = answers.min_p_filter(LOGITS.clone(), min_p)
    found = kept(filtered)
    assert found == expected, (
        f"min_p = {min_p} of the largest probability (0.5 and 0.97) keeps {expected}; you keep {found}"
    )
    assert torch.equal(torch.where(filtered.isfinite(), filtered, LOGITS), LOGITS), (
        "the others stay as they were"
    )


# ----------------------------------------------------------------------------------------- bits_per_byte


def test_bits_per_byte_of_ordinary_text(answers):
    found = answers.bits_per_byte(math.log(16), 3, "abcdef")
    assert found == pytest.approx(2.0), (
        f"3 tokens of 4 bits for 6 bytes are 2 bits per byte; you say {found:.3f}"
    )


def test_bits_per_byte_counts_bytes_and_not_characters(answers):
    found = answers.bits_per_byte(math.log(4), 6, "ทท")
    assert found == pytest.approx(2.0), (
        f"'ทท' is six bytes in UTF-8, not two; 6 × 2 bits / 6 = 2, you say {found:.3f}"
    )


# ------------------------------------------------------------------------------------- average_gradients


def test_average_gradients_of_equal_shares_is_the_mean(answers):
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    found = answers.average_gradients(gradients, [10, 10])
    assert torch.allclose(found, torch.tensor([2.0, 4.0])), (
        f"two equal processes: the mean, [2, 4]; you say {found}"
    )


def test_average_gradients_equals_one_process_with_all_tokens(answers):
    torch.manual_seed(0)
    weight, tokens = torch.randn(5, requires_grad=True), torch.randn(12, 5)
    (expected,) = torch.autograd.grad((tokens @ weight).square().mean(), weight)
    parts, gradients = tokens.split([9, 2, 1]), []
    for part in parts:
        gradients.append(torch.autograd.grad((part @ weight).square().mean(), weight)[0])
    found = answers.average_gradients(gradients, [9, 2, 1])
    unweighted = torch.allclose(found, torch.stack(gradients).mean(0), atol=1e-5)
    assert not unweighted, "a process with 1 token weighs as much as one with 9: weigh by tokens"
    error = (found - expected).abs().max().item()
    assert error < 1e-5, f"one process with all 12 tokens has another gradient (off by {error:.2g})"


def test_average_gradients_bears_a_process_without_tokens(answers):
    found = answers.average_gradients([torch.tensor([3.0]), torch.tensor([0.0])], [4, 0])
    assert torch.allclose(found, torch.tensor([3.0])), (
        f"a process without tokens changes nothing: 3; you say {found}"
    )
