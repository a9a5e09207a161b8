"""Exercises of week 1. Write each function, then run `course check week1`.

Shapes: B batch, H heads, T time (positions), D width of a head, V vocabulary. Use PyTorch, but not the
function that does it all: no `F.scaled_dot_product_attention`, no `F.cross_entropy`.
"""

from collections.abc import Iterable

from torch import Tensor

from shared.curriculum.exercises import exercise


@exercise(
    minutes=5,
    difficulty=1,
    teaches="the heart of attention in one line",
    hint="Scores are (…, Tq, Tk). Which dimension is the softmax over, and what is divided by √D?",
)
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Scaled dot-product attention weights, softmax(q·kᵀ/√D).

    Args:
        q: (…, Tq, D) queries.
        k: (…, Tk, D) keys.

    Returns:
        (…, Tq, Tk); each query's weights sum to one over the keys.
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=2,
    teaches="where a mask belongs, and what a row without any key does",
    hint="−∞ before the softmax. A row that is hidden entirely gives nan: put zeros there at the end.",
)
def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention over the allowed keys.

    Args:
        q: (…, Tq, D) queries.
        k, v: (…, Tk, D) keys and values.
        mask: bool, broadcastable to (…, Tq, Tk), True = may attend.

    Returns:
        (…, Tq, D). A query that may attend to nothing gets zeros.
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=2,
    teaches="masks as arithmetic on positions",
    hint="Make a (T, T) matrix of distances i − j with two aranges; the mask is two comparisons on it.",
)
def window_mask(T: int, window: int) -> Tensor:
    """A causal sliding window: position i may attend to the `window` positions i − window + 1 … i.

    Returns:
        (T, T) bool, row i for query i, True = may attend.
    """
    raise NotImplementedError


@exercise(
    minutes=5,
    difficulty=1,
    teaches="the difference between a transpose and a reshape",
    hint="Numbers that belong to one position must stand next to each other before you reshape.",
)
def merge_heads(x: Tensor) -> Tensor:
    """The heads' results side by side: (B, H, T, D) -> (B, T, H·D), head 0 first."""
    raise NotImplementedError


@exercise(
    minutes=15,
    difficulty=2,
    teaches="grouped-query attention: which query head reads which key head",
    hint="Query head h reads key head h // (H / Hkv). `repeat` and `repeat_interleave` differ in just that.",
)
def grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    """Dot products (unscaled) of H query heads with Hkv shared key heads.

    Args:
        q: (B, H, Tq, D).
        k: (B, Hkv, Tk, D), Hkv divides H; consecutive query heads share a key head.

    Returns:
        (B, H, Tq, Tk).
    """
    raise NotImplementedError


@exercise(
    minutes=25,
    difficulty=3,
    teaches="rotary positions, and the layout that Llama's checkpoints use",
    hint="Pair i is (x[i], x[i + D/2]), its angle position · base^(−2i/D). Turn it like any point.",
)
def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding.

    Args:
        x: (…, T, D) queries or keys, D even.
        positions: (T,) int64, where each of them stands.
        base: the slowest pair turns by about position / base.

    Returns:
        The shape of `x`.
    """
    raise NotImplementedError


@exercise(
    minutes=25,
    difficulty=4,
    teaches="the trick inside FlashAttention: softmax over data that comes in pieces",
    hint="Carry a maximum, a sum, a weighted sum. What happens to the last two when the maximum grows?",
)
def online_softmax(pieces: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """softmax(scores)·values for one query, reading scores and values once, piece by piece.

    Args:
        pieces: (scores (n,), values (n, D)) each; n may differ. It can be iterated over only once, and may be
            too long to keep. Scores may be as large as 1000.

    Returns:
        (D,): the average of all values, weighted by the softmax over all scores.
    """
    raise NotImplementedError


@exercise(
    minutes=5,
    difficulty=1,
    teaches="what a long conversation costs, before it is held",
    hint="Two tensors (keys, values) a layer, of shape (batch, key heads, tokens, head width).",
)
def kv_cache_bytes(
    num_layers: int, num_heads: int, num_kv_heads: int, d_model: int, tokens: int, batch: int, bytes_each: int
) -> int:
    """Bytes of the KV cache of a model with `num_heads` query heads and `num_kv_heads` key/value heads.

    Args:
        d_model: width of the model; a head is d_model / num_heads wide.
        tokens: positions in the cache.
        bytes_each: bytes of one number (2 for bfloat16).
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=2,
    teaches="why the Transformer's learning rate first rises",
    hint="Equation 3 of the paper; its first step is 1, ours is 0. Where do both branches of the min meet?",
)
def noam_rate(step: int, d_model: int, warmup_steps: int) -> float:
    """The learning rate of Vaswani et al. 2017, §5.3, at `step` = 0, 1, 2, … (0 is the paper's step 1)."""
    raise NotImplementedError


@exercise(
    minutes=20,
    difficulty=3,
    teaches="label smoothing, and which tokens a loss is an average over",
    hint="(1 − ε)·(−log p[target]) + ε·(mean over V of −log p); then leave the padding out, twice.",
)
def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float, pad_id: int) -> Tensor:
    """Cross-entropy against targets that are smoothed by ε, averaged over the real tokens.

    The target distribution has ε/V on every token and another 1 − ε on the right one.

    Args:
        logits: (B, T, V).
        targets: (B, T) int64; where they are `pad_id` there is no token.
        epsilon: ε, 0 ≤ ε < 1.
        pad_id: the padding's id.

    Returns:
        Scalar, nats a token.
    """
    raise NotImplementedError


@exercise(
    minutes=25,
    difficulty=4,
    teaches="one step of beam search",
    hint="Flatten the (K, V) scores, take the best, and get hypothesis and token back with // and %.",
)
def beam_step(
    scores: Tensor, log_probs: Tensor, finished: Tensor, end_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The K best continuations of K hypotheses.

    A finished hypothesis is continued by `end_id` alone, at no cost; all others by every token.

    Args:
        scores: (K,) sum of log-probabilities of each hypothesis so far.
        log_probs: (K, V) log-probability of each next token.
        finished: (K,) bool, the hypothesis has ended.
        end_id: the token that ends a hypothesis.

    Returns:
        new scores (K,) from best to worst; which hypothesis each of them continues (K,) int64; by which token
        (K,) int64.
    """
    raise NotImplementedError
