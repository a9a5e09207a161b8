"""From documents to a stream of token ids: cleaning, splitting, joining."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

from shared.data.tokenizers import END_OF_TEXT, Tokenizer
from shared.runtime.errors import CourseError

_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")
_ENCODE_CHARACTERS = 1 << 20  # texts are handed to the tokenizer about 1 MB at a time


def normalize(text: str) -> str:
    """One spelling for what looks the same: NFC, "\\n" as line end, no byte-order mark, no trailing spaces,
    at most two blank lines in a row, no white space around the whole."""
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff"))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", text)).strip()


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: the same on every machine, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_groups(sizes: dict[str, int], validation: float) -> set[str]:
    """Names of groups that together make at most the share `validation` of the whole, chosen by hash.

    The groups are taken in the order of their hashes, each if it still fits; so a group that is added later
    moves few others. One larger than a quarter of the share is never chosen: the validation set is varied.

    Args:
        sizes: name → size, in any unit.
        validation: share in (0, 1).

    Raises:
        CourseError: every group is too large.
    """
    room = validation * sum(sizes.values())
    largest = room / 4
    chosen: set[str] = set()
    for name in sorted(sizes, key=hash_fraction):
        if sizes[name] <= min(room, largest):
            room -= sizes[name]
            chosen.add(name)
    if not chosen:
        raise CourseError(
            f"None of {len(sizes)} groups of texts is small enough to be a part of {validation:.2%} that is "
            "held out; hold out more, or split by position."
        )
    return chosen


def token_stream(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of the texts, each followed by "<|endoftext|>" if the tokenizer has it, about 1 MB at a time.

    Special tokens that are spelt out in a text are read as plain text.

    Yields:
        (n,) int64 arrays: pieces of the stream, for `shards.write_shards` or `numpy.concatenate`.
    """
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _ENCODE_CHARACTERS:
            yield _joined(batch, tokenizer)
            batch, characters = [], 0
    if batch:
        yield _joined(batch, tokenizer)


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The whole of `token_stream` in memory, (N,) int64."""
    return np.concatenate([np.empty(0, np.int64), *token_stream(texts, tokenizer)])


def _joined(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    end = tokenizer.special_tokens.get(END_OF_TEXT)
    rows = tokenizer.encode_batch(texts)
    if end is not None:
        for row in rows:
            row.append(end)
    return np.concatenate([np.asarray(row, np.int64) for row in rows])
