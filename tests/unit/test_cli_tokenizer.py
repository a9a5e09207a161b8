"""`course tokenizer`: what it prints, what it writes, what it refuses."""

import io
import json
import re
from itertools import pairwise

import pytest

from shared.cli import main
from shared.data import corpora, tokenizers
from shared.data.unigram import UnigramTokenizer
from shared.data.wordpiece import WordPieceTokenizer


@pytest.fixture
def file(tmp_path, capsys):
    """A tokenizer.json learnt from the stories."""
    path = tmp_path / "stories.json"
    assert main(["tokenizer", "train", "--corpus", "stories", "--vocab-size", "500", "--out", str(path)]) == 0
    capsys.readouterr()
    return path


def _json(capsys):
    captured = capsys.readouterr()
    return json.loads(captured.out)


def _refused(capsys, *arguments, status=2):
    assert main(["tokenizer", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_training_writes_the_tokenizer_that_the_class_learns(tmp_path, capsys):
    out = tmp_path / "new" / "stories.json"
    arguments = [
        "tokenizer",
        "train",
        "--corpus",
        "stories",
        "--vocab-size",
        "500",
        "--out",
        str(out),
        "--json",
    ]
    assert main(arguments) == 0
    result = _json(capsys)
    texts = [document.text for document in corpora.load("stories").documents]
    expected = tokenizers.BPETokenizer.train(texts, 500)
    assert tokenizers.load(out).fingerprint() == expected.fingerprint() == result["fingerprint"]
    assert (result["vocab_size"], result["merges"]) == (500, 243)
    encoded = sum(map(len, expected.encode_batch(texts)))
    assert result["bytes_per_token"] == pytest.approx(result["bytes"] / encoded, abs=0.001)


@pytest.mark.parametrize(
    ("kind", "trainer", "name"),
    [("wordpiece", WordPieceTokenizer, "WordPiece"), ("unigram", UnigramTokenizer, "Unigram")],
)
def test_each_kind_is_trained_inspected_and_used(tmp_path, capsys, kind, trainer, name):
    out = tmp_path / f"{kind}.json"
    arguments = ["train", "--corpus", "stories", "--kind", kind, "--vocab-size", "600", "--out", str(out)]
    assert main(["tokenizer", *arguments, "--json"]) == 0
    result = _json(capsys)
    texts = [document.text for document in corpora.load("stories").documents]
    expected = trainer.train(texts, 600)
    assert result["fingerprint"] == expected.fingerprint() == tokenizers.load(out).fingerprint()
    assert (result["kind"], result["vocab_size"], result["merges"]) == (name, 600, 0)
    encoded = sum(map(len, expected.encode_batch(texts)))
    assert result["bytes_per_token"] == pytest.approx(result["bytes"] / encoded, abs=0.001)

    assert main(["tokenizer", "inspect", str(out), "--json"]) == 0
    shown = _json(capsys)
    assert (shown["kind"], shown["special_tokens"]) == (name, expected.special_tokens)
    assert main(["tokenizer", "inspect", str(out)]) == 0
    table = capsys.readouterr().out
    assert name in table
    assert "Merges" not in table
    assert ("Best pieces" in table) == (kind == "unigram")

    assert main(["tokenizer", "encode", str(out), "the cat.", "--json"]) == 0
    ids = _json(capsys)["ids"]
    assert ids == expected.encode("the cat.")
    assert main(["tokenizer", "decode", str(out), *map(str, ids)]) == 0
    assert capsys.readouterr().out == "the cat.\n"


def test_inspect_shows_the_most_probable_pieces(tmp_path, capsys):
    out = tmp_path / "unigram.json"
    main(
        [
            "tokenizer",
            "train",
            "--corpus",
            "stories",
            "--kind",
            "unigram",
            "--vocab-size",
            "600",
            "--out",
            str(out),
        ]
    )
    capsys.readouterr()
    assert main(["tokenizer", "inspect", str(out), "--json"]) == 0
    pieces = _json(capsys)["best_pieces"]
    assert len(pieces) == 10
    assert [" the", pytest.approx(-3.2, abs=0.5)] in pieces
    assert all(before[1] >= after[1] for before, after in pairwise(pieces))


def test_a_text_of_ones_own_is_read_and_a_small_one_ends_early(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("a b a b a b")
    out = tmp_path / "mine.json"
    assert main(["tokenizer", "train", "--text", str(tmp_path / "mine.txt"), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "no more pairs to merge: 259 tokens, not 8192" in captured.err
    assert f"{out}: 259 tokens" in captured.out
    assert tokenizers.load(out).merges == [(b" ", b"b"), (b" ", b"a")]


def test_an_existing_file_is_replaced_only_when_asked_to(file, capsys):
    before = file.read_bytes()
    arguments = ["train", "--corpus", "stories", "--vocab-size", "300", "--out", str(file)]
    assert "already exists" in _refused(capsys, *arguments)
    assert file.read_bytes() == before
    assert main(["tokenizer", *arguments, "--force"]) == 0
    assert tokenizers.load(file).vocab_size == 300


def test_text_goes_to_ids_and_back(file, capsys):
    text = "The keeper's cat.  Ünïcode 🎈"
    assert main(["tokenizer", "encode", str(file), text]) == 0
    ids = capsys.readouterr().out.split()
    assert [int(word) for word in ids] == tokenizers.load(file).encode(text)
    assert main(["tokenizer", "decode", str(file), *ids]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_json_shows_each_token(file, capsys):
    assert main(["tokenizer", "encode", str(file), " the cat€", "--json"]) == 0
    result = _json(capsys)
    assert result["tokens"][0] == " the"
    assert result["tokens"][-3:] == ["\\xe2", "\\x82", "\\xac"]  # no merge joins the bytes of a euro sign
    assert main(["tokenizer", "decode", str(file), *map(str, result["ids"]), "--json"]) == 0
    assert _json(capsys) == {"text": " the cat€"}


def test_special_tokens_are_read_only_when_asked_to(file, capsys):
    assert main(["tokenizer", "encode", str(file), "a<|endoftext|>", "--special"]) == 0
    assert capsys.readouterr().out.split()[1:] == ["0"]
    assert main(["tokenizer", "encode", str(file), "a<|endoftext|>"]) == 0
    assert "0" not in capsys.readouterr().out.split()


def test_standard_input_is_read_for_a_dash(file, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ein Käfer".encode())))
    assert main(["tokenizer", "encode", str(file), "-"]) == 0
    ids = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(ids.encode())))
    assert main(["tokenizer", "decode", str(file), "-"]) == 0
    assert capsys.readouterr().out == "ein Käfer\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "not UTF-8 at byte 2" in _refused(capsys, "encode", file, "-")


def test_inspect_says_what_the_tokenizer_knows(file, capsys):
    assert main(["tokenizer", "inspect", str(file), "--json"]) == 0
    result = _json(capsys)
    tokenizer = tokenizers.load(file)
    assert result["kind"] == "byte-level BPE"
    assert (result["vocab_size"], result["merges"]) == (500, 243)
    assert result["special_tokens"] == {"<|endoftext|>": 0}
    assert result["first_merges"][0] == ["h", "e"]
    assert len(result["longest_tokens"][0]) == max(len(token) for token in tokenizer.vocab)
    assert main(["tokenizer", "inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "byte-level BPE" in shown
    assert tokenizer.fingerprint() in shown


def test_inspect_shows_characters_too(tmp_path, capsys):
    corpora.date_tokenizer().save(tmp_path / "dates.json")
    assert main(["tokenizer", "inspect", str(tmp_path / "dates.json"), "--json"]) == 0
    result = _json(capsys)
    assert (result["kind"], result["merges"]) == ("characters", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "x.json"], "Name one source"),
        (["train", "--out", "x.json", "--text", "a.txt", "--corpus", "stories"], "Name one source"),
        (["train", "--out", "x.json", "--corpus", "wikitext"], "no corpus 'wikitext'"),
        (["train", "--out", "x.json", "--corpus", "text"], "--text PATH"),
        (["train", "--out", "x.json", "--text", "missing.txt"], "missing.txt does not exist"),
        (["train", "--out", "x.json", "--corpus", "stories", "--vocab-size", "10"], "at least 257"),
        (["train", "--out", "x.json", "--corpus", "stories", "--kind", "char"], "'char' is not one of 'bpe'"),
        (
            ["train", "--out", "x.json", "--corpus", "stories", "--kind", "wordpiece", "--vocab-size", "9"],
            "too small",
        ),
        (
            ["train", "--out", "x.json", "--corpus", "stories", "--kind", "unigram", "--vocab-size", "9"],
            "too small",
        ),
        (["inspect", "missing.json"], "No such file"),
        (["decode", "FILE", "500"], "Token id 500 .*ids 0 to 499"),
        (["decode", "FILE", "--", "-1"], "Token id -1 "),
        (["decode", "FILE", "3", "four"], "'four' is not a token id"),
        (["decode", "FILE", "1" * 5000], "is not"),
    ],
)
def test_bad_input_gets_one_sentence_and_status_2(file, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(file.parent)
    error = _refused(capsys, *[str(file) if word == "FILE" else word for word in arguments])
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9", "not UTF-8 at byte 3"), (b"", "holds no text"), (b"x", "single character")],
)
def test_a_text_that_cannot_be_used_is_refused_and_nothing_is_written(tmp_path, capsys, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    error = _refused(capsys, "train", "--text", tmp_path / "bad.txt", "--out", tmp_path / "out.json")
    assert message in error
    assert not (tmp_path / "out.json").exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = _refused(capsys, "train", "--corpus", "stories", "--out", tmp_path / "file" / "out.json")
    assert "Cannot write" in error
