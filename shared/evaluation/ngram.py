"""Interpolated modified Kneser–Ney: the best that counting does, and so what a neural model has to beat.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (TR-10-98, Harvard,
1998), §3: each order discounts its counts by D₁, D₂ or D₃₊ and hands what it took to the order below, where
an n-gram counts by the number of different tokens it has been seen to follow, not by how often it was seen.

    pₖ(w | h) = max(c(hw) − D(c(hw)), 0) / c(h·) + γ(h) pₖ₋₁(w | h')       h' = h without its first token
    γ(h)      = (D₁ N₁(h·) + D₂ N₂(h·) + D₃₊ N₃₊(h·)) / c(h·)              p₀ = 1 / vocabulary

Departures from the report: the text is one stream, without sentence markers (documents are best separated by
a token of their own); discounts fall back to ½, 1, 1½ at orders too sparse to estimate them (with few tokens,
the unigrams of a character model have no singletons).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNSEEN = -1


def discounts(counts: np.ndarray) -> np.ndarray:
    """D(0), D(1), D(2) and D(3 and more), estimated from how many n-grams have counts 1 to 4.

    Chen and Goodman (1998), equation 26: Y = n₁/(n₁ + 2n₂), Dᵢ = i − (i + 1) Y nᵢ₊₁/nᵢ.

    Args:
        counts: the (adjusted) count of every n-gram of one order, int64.

    Returns:
        Four float64 numbers, the first being 0.
    """
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
    if min(n1, n2, n3, n4) > 0:
        Y = n1 / (n1 + 2 * n2)
        D = np.array([0.0, 1 - 2 * Y * n2 / n1, 2 - 3 * Y * n3 / n2, 3 - 4 * Y * n4 / n3])
        if (D[1:] > 0).all():  # a discount of 0 would leave nothing for what was never seen
            return D
    return np.array([0.0, 0.5, 1.0, 1.5])


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order k, sorted by context and then by last token.

    An n-gram's number is its place in `keys`; its key is (number of its first k−1 tokens) · vocabulary + last
    token, so that a whole n-gram of any order fits one integer.
    """

    keys: np.ndarray  # (G,) int64, ascending
    discounted: np.ndarray  # (G,) float64, max(c(hw) − D, 0) / c(h·)
    gamma: np.ndarray  # (number of contexts,) float64, γ(h); 1 where h was never followed by anything

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The number of each key's n-gram, `UNSEEN` where there is none."""
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, place, UNSEEN)


class KneserNey:
    """An n-gram model over token ids, with interpolated modified Kneser–Ney smoothing.

    Args:
        order: n; an order-5 model looks at the 4 tokens before. 1 or more.
        vocab_size: ids are 0 … vocab_size − 1; every one of them gets some probability.
    """

    def __init__(self, order: int, vocab_size: int):
        if order < 1 or vocab_size < 1:
            raise ValueError(f"order {order} and vocab_size {vocab_size} must be at least 1")
        self.order = order
        self.vocab_size = vocab_size
        self._orders: list[_Order] = []

    def fit(self, ids: Sequence[int] | np.ndarray) -> "KneserNey":
        """Count a text. Time O(order · N log N); 10 million bytes at order 5 take some six seconds.

        Args:
            ids: N token ids, N ≥ order.

        Raises:
            ValueError: the text is shorter than one n-gram, or an id is outside the vocabulary.
        """
        ids = self._checked(ids)
        if len(ids) < self.order:
            raise ValueError(f"{len(ids)} tokens hold no n-gram of order {self.order}")
        grams = np.zeros(len(ids) + 1, dtype=np.int64)  # number of the k-gram that starts at each position
        keys, counts = [], []
        for k in range(1, self.order + 1):
            shorter = grams
            unique, where, grams, count = np.unique(
                shorter[:-1] * self.vocab_size + ids[k - 1 :],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            if k > 1:  # each different k-gram is one way to arrive at the (k−1)-gram it ends with
                counts[-1] = np.bincount(shorter[where + 1], minlength=len(keys[-1]))
            keys.append(unique)
            counts.append(count)
        contexts = [1] + [len(unique) for unique in keys[:-1]]
        self._orders = list(map(self._smooth, keys, counts, contexts))
        return self

    def _smooth(self, keys: np.ndarray, counts: np.ndarray, contexts: int) -> _Order:
        context = keys // self.vocab_size
        total = np.bincount(context, weights=counts, minlength=contexts)
        D = discounts(counts)[np.minimum(counts, 3)]
        # D ≤ c throughout, so what is taken away is what γ hands on, and the whole still sums to one.
        taken = np.bincount(context, weights=D, minlength=contexts)
        seen = total > 0
        gamma = np.divide(taken, total, out=np.ones(contexts), where=seen)
        return _Order(keys, (counts - D) / np.where(seen, total, 1.0)[context], gamma)

    def log_probabilities(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Natural log of p(token | up to n−1 tokens before it in this text), for every token.

        Args:
            ids: N token ids; the first ones have shorter contexts.

        Returns:
            (N,) float64, in nats, all negative.

        Raises:
            ValueError: an id is outside the vocabulary, or the model has not been fitted.
        """
        ids = self._checked(ids)
        probability = np.full(len(ids), 1.0 / self.vocab_size)
        contexts = np.zeros(len(ids), dtype=np.int64)  # the empty context is number 0
        for order in self._fitted():
            known = np.flatnonzero(contexts != UNSEEN)
            context = contexts[known]
            numbers = np.full(len(ids), UNSEEN)
            numbers[known] = order.find(context * self.vocab_size + ids[known])
            probability[known] *= order.gamma[context]
            seen = np.flatnonzero(numbers != UNSEEN)
            probability[seen] += order.discounted[numbers[seen]]
            # What ends at i−1 is the next order's context at i; before the text there is nothing.
            contexts = np.concatenate(([UNSEEN], numbers[:-1]))
        return np.log(probability)

    def distribution(self, context: Sequence[int] | np.ndarray) -> np.ndarray:
        """p(· | context), of which the last n−1 tokens matter.

        Returns:
            (vocab_size,) float64, positive, summing to one.

        Raises:
            ValueError: an id is outside the vocabulary, or the model has not been fitted.
        """
        context = self._checked(context)[max(0, len(context) - self.order + 1) :]
        probability = np.full(self.vocab_size, 1.0 / self.vocab_size)
        for k, order in enumerate(self._fitted()[: len(context) + 1]):
            number = self._number(context[len(context) - k :])
            if number == UNSEEN:
                break  # a longer context that ends in this one is unseen too
            probability *= order.gamma[number]
            low, high = np.searchsorted(
                order.keys, [number * self.vocab_size, (number + 1) * self.vocab_size]
            )
            probability[order.keys[low:high] % self.vocab_size] += order.discounted[low:high]
        return probability

    def bits_per_byte(self, ids: Sequence[int] | np.ndarray, n_bytes: int) -> float:
        """What the model pays for a text of `n_bytes` UTF-8 bytes, in bits per byte.

        Raises:
            ValueError: `n_bytes` is not positive, or as `log_probabilities`.
        """
        if n_bytes <= 0:
            raise ValueError(f"n_bytes is {n_bytes}; a text of at least one byte is needed")
        return float(-self.log_probabilities(ids).sum()) / math.log(2) / n_bytes

    def _number(self, gram: np.ndarray) -> int:
        number = 0
        for order, token in zip(self._orders, gram, strict=False):
            number = int(order.find(np.array([number * self.vocab_size + token]))[0])
            if number == UNSEEN:
                break
        return number

    def _fitted(self) -> list[_Order]:
        if not self._orders:
            raise ValueError("the model has counted nothing yet: call fit first")
        return self._orders

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids).astype(np.int64, copy=False)
        if ids.ndim != 1:
            raise ValueError(f"ids must have one dimension, not {ids.ndim}")
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids run from {ids.min()} to {ids.max()}, outside 0 … {self.vocab_size - 1}")
        return ids
