"""Exercises of week 2. Replace each `raise NotImplementedError`; `course check week2` tests your answers.

They follow the notebooks: the first three belong to 01, the next four to 02, then three to 03 and one to 04.
Nothing here needs `shared`; plain Python and torch are enough.
"""

import torch  # noqa: F401 - for your answers
from torch import Tensor

from shared.curriculum.exercises import exercise


@exercise(
    minutes=15,
    difficulty=3,
    teaches="why training a tokenizer need not count everything again",
    hint="Write a helper that adds sign · count for each pair of a word; call it for old and new word.",
)
def apply_merge(
    word: tuple[int, ...], count: int, pair: tuple[int, int], new: int, pairs: dict[tuple[int, int], int]
) -> tuple[int, ...]:
    """Merge `pair` into `new` wherever it stands in one word, and bring the counts of all pairs up to date.

    Args:
        word: token ids of the word.
        count: how often the word occurs in the corpus.
        pair: the two neighbours to join, from left to right; where occurrences overlap, the left one wins.
        new: the id of the two together.
        pairs: how often each pair of neighbours occurs in the whole corpus. Changed in place: it must be what
            counting everything again would give. A pair that no longer occurs may stay with count 0.

    Returns:
        The word after the merge: (1, 2, 3) becomes (1, 9) for pair (2, 3) and new 9.
    """
    raise NotImplementedError


@exercise(
    minutes=15,
    difficulty=2,
    teaches="that the order of learning is the order of applying",
    hint="While any neighbours are in `ranks`: find the smallest rank, join its first occurrence.",
)
def encode_with_ranks(word: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """Cut a word into tokens by replaying merges.

    Args:
        word: the bytes of one word.
        ranks: (left token, right token) → when it was learnt, 0 being the first.

    Returns:
        The tokens; joined, they are `word`. An empty word has none.
    """
    raise NotImplementedError


@exercise(
    minutes=20,
    difficulty=3,
    teaches="how to show text while a model is still writing it",
    hint="The first byte of a character says how many follow: 0xC2–0xDF one, 0xE0–0xEF two, 0xF0–0xF4 three.",
)
def split_complete(data: bytes) -> tuple[str, bytes]:
    """What can be shown of the bytes that a model has produced so far, and what has to wait for more.

    A token may end in the middle of a character. The last bytes wait only if bytes to come could complete
    them. What can never become valid UTF-8 is shown as U+FFFD, as `errors="replace"` does.

    Args:
        data: bytes, in order, as joined from tokens.

    Returns:
        the text that is complete, and the 0 to 3 bytes at the end that wait.
    """
    raise NotImplementedError


@exercise(
    minutes=20,
    difficulty=3,
    teaches="the one layer of a GPT in which positions talk to each other",
    hint="Cut x @ w_qkv into q, k, v; view each as (B, T, H, D), transpose; mask before the softmax.",
)
def causal_self_attention(x: Tensor, w_qkv: Tensor, w_out: Tensor, num_heads: int) -> Tensor:
    """Multi-head causal self-attention in about ten lines, without `F.scaled_dot_product_attention`.

    Args:
        x: (B, T, C).
        w_qkv: (C, 3·C); the columns are all of q, then all of k, then all of v.
        w_out: (C, C), applied to the heads put side by side again.
        num_heads: H; head h takes columns h·D … (h + 1)·D − 1 of q, of k and of v, with D = C / H.

    Returns:
        (B, T, C).
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=2,
    teaches="what is predicted from what",
    hint="The logits at position t are about token t + 1: drop the last logits and the first token.",
)
def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss of a language model on a batch of sequences.

    Args:
        logits: (B, T, V), what the model says after reading ids[:, : t + 1].
        ids: (B, T), int64, the same tokens that the model read; −100 marks padding, which is never a target.

    Returns:
        Mean of −log p(next token) over all real targets, in nats; scalar.
    """
    raise NotImplementedError


@exercise(
    minutes=5,
    difficulty=1,
    teaches="a formula that parity tests will hold you to, to seven digits",
    hint="½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))",
)
def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's activation, the tanh form of GELU (Hendrycks & Gimpel 2016), without `F.gelu`; any shape."""
    raise NotImplementedError


@exercise(
    minutes=15,
    difficulty=2,
    teaches="where a GPT's parameters sit, and why the paper's 117M is not the checkpoint's 124M",
    hint="Per layer: two LayerNorms of 2·C, a C → 3·C, a C → C, a C → 4·C and a 4·C → C, all with biases.",
)
def count_gpt2_parameters(vocab_size: int, context_length: int, num_layers: int, d_model: int) -> int:
    """How many parameters a GPT-2 of these sizes has, the head being tied to the token embedding.

    Learned positions, biases everywhere, an MLP of 4·C, and a last LayerNorm before the head.
    """
    raise NotImplementedError


@exercise(
    minutes=20,
    difficulty=3,
    teaches="nucleus sampling",
    hint="Sort downwards and cumulate; a token stays if those before it have less than p. Undo the sorting.",
)
def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose probabilities add up to at least `p`.

    Args:
        logits: (B, V).
        p: 0 < p ≤ 1. At least one token always stays.

    Returns:
        (B, V): the logits, −inf where a token is out.
    """
    raise NotImplementedError


@exercise(
    minutes=5,
    difficulty=1,
    teaches="a cut-off that follows the model's own confidence",
    hint="Softmax first; the threshold is min_p times the largest probability of the row.",
)
def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Keep the tokens that are at least `min_p` times as probable as the most probable one.

    Args:
        logits: (B, V).
        min_p: 0 ≤ min_p ≤ 1.

    Returns:
        (B, V): the logits, −inf where a token is out.
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=2,
    teaches="how to compare models whose tokenizers differ",
    hint="Total nats / ln 2 are bits; a text's bytes are those of its UTF-8.",
)
def bits_per_byte(nats_per_token: float, num_tokens: int, text: str) -> float:
    """Bits per byte of a text that a model read as `num_tokens` tokens at a mean loss of `nats_per_token`."""
    raise NotImplementedError


@exercise(
    minutes=15,
    difficulty=3,
    teaches="what data parallelism has to average, when processes hold different numbers of tokens",
    hint="Undo each process's own mean, add up, and divide by the tokens of all.",
)
def average_gradients(gradients: list[Tensor], num_tokens: list[int]) -> Tensor:
    """The gradient that one process would have had for the whole batch.

    Args:
        gradients: one a process: of the mean loss over that process's own tokens; all of one shape.
        num_tokens: how many tokens each process averaged over; 0 where there are none (and no gradient).

    Returns:
        The gradient of the mean loss over all tokens.
    """
    raise NotImplementedError
