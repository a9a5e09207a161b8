"""Cleaning, splitting and joining of texts."""

import numpy as np
import pytest

from shared.data import preprocessing
from shared.data.preprocessing import hash_fraction, normalize, split_groups, token_stream, tokenize
from shared.data.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer
from shared.runtime.errors import CourseError


def test_what_looks_the_same_becomes_the_same():
    assert normalize("\ufeff cafe\u0301  \r\nnext\rlast\n\n\n\n\n\nend \t\n") == "café\nnext\nlast\n\n\nend"


def test_normalizing_twice_changes_nothing():
    text = "a \r\n\r\n\r\n\r\n \n b\u0301\t"
    assert normalize(normalize(text)) == normalize(text)


def test_the_hash_is_the_same_on_every_machine_and_spread_evenly():
    assert hash_fraction("2021-03-12") == pytest.approx(0.21077, abs=1e-5)
    shares = [hash_fraction(str(number)) for number in range(4000)]
    assert 0 <= min(shares) < max(shares) < 1
    counts = np.histogram(shares, bins=4, range=(0, 1))[0]
    assert counts.min() > 900


def test_held_out_groups_fill_their_share_and_none_is_large():
    sizes = {f"package{number}": number for number in range(1, 101)} | {"giant": 5000}
    chosen = split_groups(sizes, 0.1)
    room = 0.1 * sum(sizes.values())
    assert 0.9 * room < sum(sizes[name] for name in chosen) <= room
    assert max(sizes[name] for name in chosen) <= room / 4
    assert chosen == split_groups(dict(reversed(sizes.items())), 0.1)


def test_groups_that_are_all_too_large_are_refused():
    with pytest.raises(CourseError, match="split by position"):
        split_groups({"a": 5, "b": 5}, 0.1)


def test_documents_are_joined_by_the_end_of_text_token():
    tokenizer = BPETokenizer.train(["one two"], 260)
    end = tokenizer.special_tokens[END_OF_TEXT]
    texts = ["one", f"two{END_OF_TEXT}", ""]
    expected = [*tokenizer.encode(texts[0]), end, *tokenizer.encode(texts[1]), end, end]
    ids = tokenize(texts, tokenizer)
    assert ids.dtype == np.int64
    assert ids.tolist() == expected
    assert expected.count(end) == 3  # the one spelt out in the second text is plain text


def test_without_an_end_of_text_token_documents_follow_each_other():
    assert tokenize(["ab", "ba"], CharTokenizer.from_text("ab")).tolist() == [0, 1, 1, 0]


def test_a_long_stream_comes_in_pieces(monkeypatch):
    monkeypatch.setattr(preprocessing, "_ENCODE_CHARACTERS", 4)
    tokenizer = CharTokenizer.from_text("ab", (END_OF_TEXT,))
    pieces = list(token_stream(["ab", "ab", "b"], tokenizer))
    assert [piece.tolist() for piece in pieces] == [[1, 2, 0, 1, 2, 0], [2, 0]]
    assert tokenize([], tokenizer).shape == (0,)
