"""Token ids on disk: a header of 128 bytes, then the ids, read through the operating system's page cache.

offset  bytes  what (little-endian)
     0      8  magic, "COURSETK"
     8      4  version of this layout, 1
    12      4  bytes per id: 2 (vocabulary up to 65,536) or 4
    16      8  vocabulary size
    24      8  number of ids
    32     32  SHA-256 of the ids
    64     32  fingerprint of the tokenizer (zeros: not known)
    96     32  SHA-256 of the 96 bytes before
"""

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from shared.data.tokenizers import Tokenizer
from shared.runtime import files
from shared.runtime.errors import CourseError

MAGIC = b"COURSETK"
VERSION = 1
_FIELDS = struct.Struct("<8sIIQQ32s32s")
HEADER_BYTES = _FIELDS.size + 32
_READ_BYTES = 1 << 24  # for checking: 16 MiB at a time


class TokenShards:
    """A file of token ids, open for reading. Made by `open_shards`.

    Attributes:
        path: the file.
        vocab_size: ids are below it.
        fingerprint: of the tokenizer that made the ids, 64 hexadecimal digits, or "" where it is not known.
        tokens: (N,) uint16 or uint32, memory-mapped: nothing is read before it is used.
    """

    def __init__(self, path: Path, vocab_size: int, fingerprint: str, digest: bytes, tokens: np.ndarray):
        self.path, self.vocab_size, self.fingerprint = path, vocab_size, fingerprint
        self.tokens = tokens
        self._digest = digest

    def __len__(self) -> int:
        return len(self.tokens)

    def verify(self) -> None:
        """Read the whole file and compare it with its checksum.

        Raises:
            CourseError: a byte has changed, or an id is outside the vocabulary.
        """
        digest, largest, step = hashlib.sha256(), -1, _READ_BYTES // self.tokens.itemsize
        for start in range(0, len(self.tokens), step):
            block = np.ascontiguousarray(self.tokens[start : start + step])
            digest.update(block)
            largest = max(largest, int(block.max()))
        if digest.digest() != self._digest:
            raise _damaged(self.path, "its ids do not match its checksum")
        if largest >= self.vocab_size:
            raise _damaged(self.path, f"it holds id {largest}, outside its vocabulary of {self.vocab_size}")


def write_shards(
    path: Path | str, chunks: Iterable[Sequence[int] | np.ndarray], vocab_size: int, fingerprint: str = ""
) -> None:
    """Write ids to one file, which appears complete or not at all.

    Args:
        path: the file to write; an existing one is replaced.
        chunks: one-dimensional pieces of the token stream, in order; only one is held in memory at a time.
        vocab_size: decides the width: 2 bytes an id up to 65,536, else 4.
        fingerprint: `Tokenizer.fingerprint()`, so that ids and tokenizer cannot be mixed up later.

    Raises:
        CourseError: the file cannot be written.
        ValueError: an id is not in 0…vocab_size − 1.
    """
    path = Path(path)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    with files.explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(bytes(HEADER_BYTES))  # in its place until count and checksum are known
                digest, count = hashlib.sha256(), 0
                for chunk in chunks:
                    ids = _narrow(np.asarray(chunk), vocab_size, dtype)
                    file.write(ids.data)
                    digest.update(ids.data)
                    count += len(ids)
                file.seek(0)
                file.write(_header(dtype, vocab_size, count, digest.digest(), fingerprint))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def open_shards(path: Path | str, tokenizer: Tokenizer | None = None) -> TokenShards:
    """Open a file of token ids; header and length are checked, `TokenShards.verify` checks every byte.

    Args:
        path: a file that `write_shards` made.
        tokenizer: if given, the one that must have made the ids.

    Raises:
        CourseError: not such a file, damaged, cut short, or made with another tokenizer.
    """
    path = Path(path)
    with files.explained("read", path), open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        payload = file.seek(0, os.SEEK_END) - HEADER_BYTES
    if not header.startswith(MAGIC):
        raise CourseError(
            f"{path} is not a file of token ids; make one with shared.data.shards.write_shards."
        )
    if (
        len(header) < HEADER_BYTES
        or hashlib.sha256(header[: _FIELDS.size]).digest() != header[_FIELDS.size :]
    ):
        raise _damaged(path, "its header does not match its checksum")
    _, version, width, vocab_size, count, digest, fingerprint = _FIELDS.unpack(header[: _FIELDS.size])
    if version != VERSION:
        raise CourseError(f"{path} has layout version {version}, this course reads {VERSION}; make it again.")
    if payload != count * width:
        raise _damaged(path, f"it holds {payload:,} bytes of ids where its header says {count * width:,}")
    made_with = "" if fingerprint == bytes(32) else fingerprint.hex()
    if tokenizer is not None and made_with != tokenizer.fingerprint():
        raise CourseError(f"{path} was made with another tokenizer; make it again with this one.")
    tokens = (
        np.memmap(path, f"<u{width}", "r", HEADER_BYTES, (count,)) if count else np.empty(0, f"<u{width}")
    )
    return TokenShards(path, vocab_size, made_with, digest, tokens)


def _narrow(ids: np.ndarray, vocab_size: int, dtype: np.dtype) -> np.ndarray:
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"token ids must be whole numbers in one dimension, not {ids.dtype} {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(
            f"token ids run from {ids.min()} to {ids.max()}, outside a vocabulary of {vocab_size}"
        )
    return np.ascontiguousarray(ids, dtype=dtype)


def _header(dtype: np.dtype, vocab_size: int, count: int, digest: bytes, fingerprint: str) -> bytes:
    made_with = bytes.fromhex(fingerprint) if fingerprint else bytes(32)
    fields = _FIELDS.pack(MAGIC, VERSION, dtype.itemsize, vocab_size, count, digest, made_with)
    return fields + hashlib.sha256(fields).digest()


def _damaged(path: Path, how: str) -> CourseError:
    return CourseError(f"{path} is damaged: {how}; delete it and make it again.")
