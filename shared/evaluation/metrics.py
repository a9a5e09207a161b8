"""Scores for language models and translations, and what a compressor makes of the same text.

Losses of models with different tokenisers are compared in bits per byte of the underlying UTF-8 text: a token
is whatever its tokeniser says, a byte is a byte.
"""

import gzip
import lzma
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

LN2 = math.log(2)


def nats_to_bits_per_byte(total_nats: float, n_bytes: int) -> float:
    """Bits per byte of a text that costs `total_nats` in all and is `n_bytes` long in UTF-8.

    Raises:
        ValueError: `n_bytes` is not positive.
    """
    if n_bytes <= 0:
        raise ValueError(f"n_bytes is {n_bytes}; a text of at least one byte is needed")
    return total_nats / LN2 / n_bytes


def perplexity(nats_per_token: float) -> float:
    """exp of the mean negative log-likelihood per token: the size of a uniform choice that is as hard."""
    return math.exp(nats_per_token)


@dataclass(frozen=True)
class LMScore:
    """What a language model pays for a text.

    Attributes:
        total_nats: −Σ log p(token | what came before it in its window), in nats.
        tokens: how many tokens were predicted.
    """

    total_nats: float
    tokens: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood, the training loss's unit."""
        return self.total_nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return perplexity(self.nats_per_token)

    def bits_per_byte(self, n_bytes: int) -> float:
        """Bits per byte, `n_bytes` being the UTF-8 length of the tokens that were predicted."""
        return nats_to_bits_per_byte(self.total_nats, n_bytes)


@torch.inference_mode()
def evaluate_lm(
    model: nn.Module,
    tokens: Sequence[int] | torch.Tensor,
    *,
    context_length: int,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> LMScore:
    """Score a causal language model on every token of a validation set.

    Windows do not overlap: window w reads tokens wT … wT+T−1 and predicts wT+1 … wT+T, the last one being cut
    where the text ends. So each token but the very first, which nothing precedes, is predicted exactly once,
    with 1 to T tokens of context. (Overlapping windows would give lower losses for more work.)

    Args:
        model: called as `model(ids, targets)` on (B, T) int64, returns (logits, mean loss in nats per token).
            Put in evaluation mode and back.
        tokens: N ≥ 2 token ids, anything NumPy can read as one dimension (a memory map is read piecewise).
        context_length: T, the window.
        batch_size: windows at a time; changes the speed, not the score.
        dtype: run under autocast in this dtype where it is not float32.

    Raises:
        ValueError: fewer than two tokens, or a window or batch below 1.
    """
    import numpy as np

    N, T = len(tokens), context_length
    if N < 2 or T < 1 or batch_size < 1:
        raise ValueError(f"cannot score {N} tokens in windows of {T}, {batch_size} at a time")
    device = next(model.parameters()).device
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        start = 0
        while start < N - 1:
            rows = min(batch_size, (N - 1 - start) // T)
            # Full windows together; what is left over at the end is one shorter window of its own.
            length = T if rows else N - 1 - start
            rows = max(rows, 1)
            chunk = np.asarray(tokens[start : start + rows * length + 1]).astype(np.int64)
            chunk = torch.from_numpy(chunk).to(device)
            with autocast:
                _, loss = model(chunk[:-1].view(rows, length), chunk[1:].view(rows, length))
            total += loss.item() * rows * length
            start += rows * length
    finally:
        model.train(was_training)
    return LMScore(total, N - 1)


def _check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"{len(hypotheses)} hypotheses against {len(references)} references; need as many, and some"
        )


def bleu(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> float:
    """Corpus BLEU by sacrebleu, 0 to 100 (Papineni et al. 2002; Post 2018: name the tokeniser).

    Args:
        hypotheses: what the model said.
        references: what it should have said, one each.
        tokenize: sacrebleu's tokeniser; "13a" is the one of WMT, "char" suits dates and other short strings.

    Raises:
        ValueError: different numbers of hypotheses and references, or none.
    """
    import sacrebleu

    _check_pairs(hypotheses, references)
    return sacrebleu.corpus_bleu(list(hypotheses), [list(references)], tokenize=tokenize).score


def exact_match(hypotheses: Sequence, references: Sequence) -> float:
    """The fraction of hypotheses that equal their reference, 0 to 1.

    Raises:
        ValueError: different numbers of hypotheses and references, or none.
    """
    _check_pairs(hypotheses, references)
    return sum(h == r for h, r in zip(hypotheses, references, strict=True)) / len(references)


def _as_bytes(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else bytes(text)
    if not data:
        raise ValueError("the text is empty: it has no bits per byte")
    return data


def gzip_bits_per_byte(text: str | bytes) -> float:
    """Bits per byte after `gzip -9` (LZ77 with a 32 kB window, then Huffman codes).

    Raises:
        ValueError: the text is empty.
    """
    data = _as_bytes(text)
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / len(data)


def xz_bits_per_byte(text: str | bytes) -> float:
    """Bits per byte after `xz -9e` (LZ77 with a 64 MB window, then a context-modelled range coder).

    Raises:
        ValueError: the text is empty.
    """
    data = _as_bytes(text)
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def zstd_bits_per_byte(text: str | bytes, dictionary: str | bytes | None = None) -> float:
    """Bits per byte after `zstd -19`, alone or primed with other text.

    A compressor that starts cold is a poor opponent for a model that has read megabytes of the same kind of
    text. Primed with that text as a raw-content dictionary (RFC 8878, §5), it may copy from it as if it had
    just compressed it, and pays nothing for it: what the model's training was, in a compressor's terms.

    Args:
        text: what is compressed.
        dictionary: what may be copied from, such as the training text; the end of it is nearest.

    Raises:
        ValueError: the text is empty.
    """
    import zstandard

    data = _as_bytes(text)
    before = _as_bytes(dictionary) if dictionary else b""
    primed = zstandard.ZstdCompressionDict(before, zstandard.DICT_TYPE_RAWCONTENT) if before else None
    reach = len(before) + len(data)  # the window has to cover both, or the dictionary's start is out of sight
    window_log = min(max((reach - 1).bit_length(), zstandard.WINDOWLOG_MIN), zstandard.WINDOWLOG_MAX)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19, source_size=len(data), dict_size=len(before), window_log=window_log
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters, dict_data=primed)
    return 8 * len(compressor.compress(data)) / len(data)
