import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.evaluation.ngram import KneserNey, discounts


def brute_force(text, order, V):
    """Interpolated modified Kneser–Ney by dictionaries of tuples, straight from the definitions."""
    counts = {order: Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))}
    for k in range(order - 1, 0, -1):
        followed = {tuple(text[i : i + k + 1]) for i in range(len(text) - k)}
        counts[k] = Counter(gram[1:] for gram in followed)

    D = {}
    for k in counts:
        n = [sum(c == i for c in counts[k].values()) for i in range(5)]
        D[k] = (0, 0.5, 1.0, 1.5)
        if n[1] and n[2] and n[3] and n[4]:
            Y = n[1] / (n[1] + 2 * n[2])
            estimated = (0, *(i - (i + 1) * Y * n[i + 1] / n[i] for i in (1, 2, 3)))
            if min(estimated[1:]) > 0:
                D[k] = estimated

    def p(word, context):
        k = len(context) + 1
        lower = p(word, context[1:]) if context else 1 / V
        following = [counts[k][(*context, w)] for w in range(V)]
        total = sum(following)
        if total == 0:
            return lower
        c = following[word]
        gamma = sum(D[k][min(f, 3)] for f in following) / total
        return max(c - D[k][min(c, 3)], 0) / total + gamma * lower

    return p


def markov_text(n, V, seed):
    """Tokens that depend on the one before, so that counts of every size occur."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(V, 0.3), size=V)
    text = [0]
    for _ in range(n - 1):
        text.append(int(rng.choice(V, p=table[text[-1]])))
    return text


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_equal_a_brute_force_implementation(order):
    V = 6
    text, held_out = markov_text(400, V, seed=1), markov_text(60, V, seed=2)
    p = brute_force(text, order, V)
    expected = [p(w, tuple(held_out[max(0, i - order + 1) : i])) for i, w in enumerate(held_out)]
    measured = np.exp(KneserNey(order, V).fit(text).log_probabilities(held_out))
    np.testing.assert_allclose(measured, expected, rtol=1e-12)


def test_this_text_uses_estimated_discounts_as_well_as_the_fallback():
    # Otherwise the comparison above would not see a wrong formula.
    text = markov_text(400, 6, seed=1)
    trigrams = np.array(list(Counter(zip(text, text[1:], text[2:], strict=False)).values()))
    assert discounts(trigrams)[1] not in (0.5, 1.0)
    assert discounts(np.array([7, 9])).tolist() == [0, 0.5, 1.0, 1.5]


def test_discounts_follow_the_published_formula():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 16, 9, 5, 3])
    Y = 40 / (40 + 2 * 16)
    expected = [0, 1 - 2 * Y * 16 / 40, 2 - 3 * Y * 9 / 16, 3 - 4 * Y * 5 / 9]
    np.testing.assert_allclose(discounts(counts), expected, rtol=1e-12)


@given(
    text=st.lists(st.integers(0, 3), min_size=4, max_size=60),
    order=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_probabilities_sum_to_one_after_every_context(text, order):
    model = KneserNey(order, 4).fit(text)
    for length in range(order + 1):
        for context in itertools.product(range(4), repeat=length):
            p = model.distribution(context)
            assert p.min() > 0
            assert p.sum() == pytest.approx(1, abs=1e-12)


def test_the_distribution_after_a_context_is_what_the_sequence_score_uses():
    model = KneserNey(4, 6).fit(markov_text(300, 6, seed=3))
    text = markov_text(40, 6, seed=4)
    scored = model.log_probabilities(text)
    for i, token in enumerate(text):
        assert np.log(model.distribution(text[:i])[token]) == pytest.approx(scored[i], abs=1e-12)


def test_a_token_that_follows_many_others_beats_a_frequent_one_that_follows_one():
    # "San Francisco": 2 is frequent but only ever comes after 1; 3 is rarer and comes after anything.
    text = [1, 2] * 20 + [0, 3, 4, 3, 5, 3, 0, 4, 3]
    p = KneserNey(2, 7).fit(text).distribution([6])  # a context never seen: the order below decides
    assert p[3] > p[2]


def test_higher_orders_compress_better_text_that_has_structure():
    text = np.frombuffer(b"the cat sat on the mat and the dog sat on the cat, " * 40, np.uint8)
    held_out = np.frombuffer(b"the dog sat on the mat and the cat sat on the dog", np.uint8)
    bits = [KneserNey(k, 256).fit(text).bits_per_byte(held_out, len(held_out)) for k in (1, 2, 4)]
    assert bits[0] > bits[1] + 0.5 > bits[2] + 0.7


def test_bits_per_byte_of_a_fair_coin_is_one_bit():
    text = np.random.default_rng(0).integers(0, 2, 20_000)
    model = KneserNey(1, 2).fit(text)
    assert model.bits_per_byte(text[:5000], 5000) == pytest.approx(1, abs=0.002)


def test_large_vocabularies_and_eight_orders_do_not_overflow():
    V = 100_000
    rng = np.random.default_rng(0)
    text = np.tile(rng.integers(0, V, 500), 3)
    model = KneserNey(8, V).fit(text)
    seen, unseen = model.log_probabilities(text[:50]), model.log_probabilities(rng.integers(0, V, 50))
    assert np.isfinite(seen).all()
    assert seen[10:].mean() > unseen[10:].mean() + 5


@pytest.mark.parametrize("ids", [[0, 1, 5], [0, -1, 1], [[0, 1], [1, 0]]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match="ids"):
        KneserNey(2, 5).fit(ids)


def test_a_text_shorter_than_one_ngram_is_refused():
    with pytest.raises(ValueError, match="no n-gram of order 3"):
        KneserNey(3, 5).fit([1, 2])


def test_an_unfitted_model_says_so():
    with pytest.raises(ValueError, match="call fit"):
        KneserNey(3, 5).distribution([1])
