"""Files of token ids: what is written comes back, and damage of any kind is noticed and named."""

import numpy as np
import pytest

from shared.data import shards
from shared.data.shards import HEADER_BYTES, open_shards, write_shards
from shared.data.tokenizers import CharTokenizer
from shared.runtime.errors import CourseError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "train.tokens"
    write_shards(path, [[1, 2, 3], np.array([4, 5]), []], vocab_size=300)
    return path


def test_ids_come_back_in_order_and_are_not_read_into_memory(path):
    opened = open_shards(path)
    opened.verify()
    assert isinstance(opened.tokens, np.memmap)
    assert opened.tokens.dtype == np.uint16
    assert opened.tokens.tolist() == [1, 2, 3, 4, 5]
    assert (len(opened), opened.vocab_size, opened.fingerprint) == (5, 300, "")


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4), (4_000_000_000, 4)])
def test_the_width_fits_the_vocabulary(tmp_path, vocab_size, width):
    write_shards(tmp_path / "ids", [[vocab_size - 1, 0]], vocab_size)
    opened = open_shards(tmp_path / "ids")
    opened.verify()
    assert opened.tokens.itemsize == width
    assert opened.tokens.tolist() == [vocab_size - 1, 0]
    assert (tmp_path / "ids").stat().st_size == HEADER_BYTES + 2 * width


def test_an_empty_stream_makes_an_empty_file(tmp_path):
    write_shards(tmp_path / "ids", [], 10)
    opened = open_shards(tmp_path / "ids")
    opened.verify()
    assert len(opened) == 0


@pytest.mark.parametrize("ids", [[-1], [300], [0.5], [[1, 2]]])
def test_ids_that_cannot_be_are_refused_and_the_old_file_stays(path, ids):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="token ids"):
        write_shards(path, [[1], ids], 300)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_stream_that_fails_halfway_leaves_the_old_file(path):
    def stream():
        yield [1, 2]
        raise KeyboardInterrupt

    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_shards(path, stream(), 300)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_cut_short_at_any_byte_is_refused(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CourseError, match="train.tokens"):
            open_shards(path)


def test_bytes_after_the_end_are_refused(path):
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(CourseError, match="train.tokens is damaged: it holds 12 bytes"):
        open_shards(path)


def test_a_flipped_bit_anywhere_is_noticed(path):
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CourseError, match="train.tokens"):
            open_shards(path).verify()


def test_a_large_file_is_checked_block_by_block(path, monkeypatch):
    write_shards(path, [np.arange(250)], 300)
    monkeypatch.setattr(shards, "_READ_BYTES", 64)
    open_shards(path).verify()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CourseError, match="checksum"):
        open_shards(path).verify()


def test_ids_of_another_tokenizer_are_refused(tmp_path, path):
    ours, other = CharTokenizer.from_text("abc"), CharTokenizer.from_text("abd")
    write_shards(tmp_path / "ids", [[0, 1]], 3, ours.fingerprint())
    assert open_shards(tmp_path / "ids", ours).fingerprint == ours.fingerprint()
    for wrong, tokenizer in ((tmp_path / "ids", other), (path, ours)):
        with pytest.raises(CourseError, match="another tokenizer"):
            open_shards(wrong, tokenizer)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CourseError, match="Cannot read .*missing"):
        open_shards(tmp_path / "missing")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("token ids? no, a text" * 20)
    with pytest.raises(CourseError, match=r"notes\.txt is not a file of token ids"):
        open_shards(tmp_path / "notes.txt")
