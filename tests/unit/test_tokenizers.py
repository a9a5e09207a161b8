"""Byte-level BPE from scratch against the `tokenizers` library, and against its definition."""

import argparse
import json
import random
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data import corpora, tokenizers
from shared.data.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer, LibraryTokenizer
from shared.runtime.errors import CourseError


def _stories() -> list[str]:
    return [document.text for document in corpora.load("stories").documents]


def _dates() -> list[str]:
    return [pair.source for pair in corpora.date_pairs("train", 3000)]


def _sources() -> list[str]:
    return [Path(module.__file__).read_text(encoding="utf-8") for module in (json, argparse, random)]


TEXTS = {"stories": _stories, "dates in 43 locales": _dates, "Python source": _sources}


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(_stories(), 600)


@pytest.fixture(scope="module")
def library() -> LibraryTokenizer:
    return LibraryTokenizer.train(_stories(), 600)


# Characters that both editions of Unicode know: Python 3.11 has the oldest of the three.
known_characters = st.characters(codec="utf-8").filter(
    lambda character: unicodedata.category(character) != "Cn"
)


# ------------------------------------------------------------------------------------ parity with the library


@pytest.mark.parametrize("name", TEXTS)
def test_training_from_scratch_learns_the_merges_of_the_library(name):
    texts = TEXTS[name]()
    ours, theirs = BPETokenizer.train(texts, 2000), LibraryTokenizer.train(texts, 2000)
    assert len(ours.merges) > 700
    assert ours.merges == theirs.merges
    assert ours.vocab == theirs.vocab
    assert ours.fingerprint() == theirs.fingerprint()


@pytest.mark.parametrize("name", TEXTS)
def test_encoding_from_scratch_gives_the_ids_of_the_library(name, trained, library):
    for text in TEXTS[name]():
        assert trained.encode(text) == library.encode(text)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="abcé ", max_size=40), max_size=8),
    merges=st.integers(0, 60),
    special=st.sampled_from([(), (END_OF_TEXT,), ("<a>", "<|b|>")]),
)
def test_ties_and_repeated_tokens_are_resolved_as_in_the_library(texts, merges, special):
    size = 256 + len(special) + merges
    ours, theirs = BPETokenizer.train(texts, size, special), LibraryTokenizer.train(texts, size, special)
    assert (ours.merges, ours.vocab) == (theirs.merges, theirs.vocab)


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=known_characters))
def test_any_text_gets_the_ids_of_the_library(trained, library, text):
    assert trained.encode(text) == library.encode(text)
    assert trained.decode(trained.encode(text)) == library.decode(library.encode(text)) == text


def test_a_very_long_word_gets_the_ids_of_the_library_too(trained, library):
    word = "".join(random.Random(0).choices("theandgi", k=100_000))
    assert trained.encode(word) == library.encode(word)


def test_batches_are_encoded_as_single_texts_are(trained, library):
    texts = _dates()[:200]
    assert (
        trained.encode_batch(texts) == library.encode_batch(texts) == [trained.encode(text) for text in texts]
    )


# ------------------------------------------------------------------------------------ against the definition


def _by_definition(texts: list[str], num_merges: int) -> list[tuple[bytes, bytes]]:
    """BPE as in Sennrich et al., algorithm 1: count all pairs anew for each merge."""
    order = {token: index for index, token in enumerate(tokenizers._alphabet())}
    words = Counter(tuple(bytes([b]) for b in word.encode()) for text in texts for word in _words(text))
    merges = []
    while len(merges) < num_merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]]))
        merges.append(best)
        order.setdefault(best[0] + best[1], len(order))
        words = Counter({_join(word, best): count for word, count in words.items()})
    return merges


def _words(text: str) -> list[str]:
    return tokenizers.PRETOKEN.findall(text)


def _join(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out: list[bytes] = []
    position = 0
    while position < len(word):
        if word[position : position + 2] == pair:
            out.append(pair[0] + pair[1])
            position += 2
        else:
            out.append(word[position])
            position += 1
    return tuple(out)


def test_the_incremental_index_learns_what_counting_anew_learns():
    texts = _stories()[:2]
    learnt = BPETokenizer.train(texts, 257 + 120)
    assert learnt.merges == _by_definition(texts, 120)


@settings(max_examples=100, deadline=None)
@given(word=st.text(alphabet="abcd", min_size=1, max_size=30), seed=st.integers(0, 20))
def test_the_merge_heap_applies_merges_in_the_order_in_which_they_were_learnt(word, seed):
    texts = ["".join(random.Random(seed).choices("abcd", k=200))]
    learnt = BPETokenizer.train(texts, 300)
    tokens = tuple(bytes([byte]) for byte in word.encode())
    for pair in learnt.merges:
        tokens = _join(tokens, pair)
    assert [learnt.token_bytes(index) for index in learnt.encode(word)] == list(tokens)


def test_words_are_cut_as_gpt2_cuts_them():
    assert _words("We'll  add 12 more…  don't\n\n you?") == [
        *("We", "'ll", " ", " add", " 12", " more", "…", " ", " don", "'t", "\n\n", " you", "?")
    ]


# ------------------------------------------------------------------------------------------------ round trips


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_come_back(trained, data):
    ids = trained.encode(data.decode("utf-8", "surrogateescape"))
    assert trained.decode_bytes(ids) == data


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_unicode_text_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_half_a_character_decodes_to_the_replacement_character(trained, library):
    first_byte = trained.encode("€")[:1]
    assert trained.decode(first_byte) == library.decode(first_byte) == "\ufffd"


@pytest.mark.parametrize("kind", ["scratch", "library"])
def test_half_a_surrogate_pair_is_refused(kind, trained, library):
    tokenizer = trained if kind == "scratch" else library
    with pytest.raises(CourseError, match=r"half a surrogate pair, U\+D800"):
        tokenizer.encode("a\ud800b")


# --------------------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("kind", ["scratch", "library"])
def test_special_tokens_in_a_text_are_plain_text_unless_allowed(kind, trained, library):
    tokenizer = trained if kind == "scratch" else library
    text = f"one{END_OF_TEXT}two"
    end = tokenizer.special_tokens[END_OF_TEXT]
    assert end not in tokenizer.encode(text)
    assert end not in tokenizer.encode_batch([text])[0]
    ids = tokenizer.encode(text, allow_special=True)
    assert ids == [*tokenizer.encode("one"), end, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == text


def test_the_longest_of_two_special_tokens_wins():
    names = ("<|a|>", "<|a|><|b|>")
    text = "x<|a|><|b|><|a|>y"
    ours, theirs = BPETokenizer.train([], 258, names), LibraryTokenizer.train([], 258, names)
    assert ours.encode(text, allow_special=True)[1:-1] == [1, 0]
    assert ours.encode(text, allow_special=True) == theirs.encode(text, allow_special=True)


@pytest.mark.parametrize("kind", [BPETokenizer, LibraryTokenizer])
def test_a_special_token_that_text_may_hold_is_refused(kind):
    with pytest.raises(CourseError, match="word that text may hold"):
        kind.train(["the"], 300, ("the",))


@pytest.mark.parametrize(
    ("size", "special", "message"),
    [
        (256, (END_OF_TEXT,), "need at least 257"),
        (2_000_000, (), "too large"),
        (300, ("<a>", "<a>"), "given twice"),
    ],
)
def test_an_impossible_request_is_refused(size, special, message):
    with pytest.raises(CourseError, match=message):
        BPETokenizer.train(["text"], size, special)


def test_training_reports_its_progress():
    seen: list[tuple[int, int]] = []
    BPETokenizer.train(_stories(), 600, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 343 // 64
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {600}


# ------------------------------------------------------------------------------------------ ids out of range


@pytest.mark.parametrize("kind", ["scratch", "library", "characters"])
@pytest.mark.parametrize("index", [-1, 600, 10**12])
def test_an_id_outside_the_vocabulary_is_named_with_the_size(kind, index, trained, library):
    characters = CharTokenizer([chr(0x100 + i) for i in range(600)])
    tokenizer = {"scratch": trained, "library": library, "characters": characters}[kind]
    for read in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(CourseError, match=rf"Token id {index} .*ids 0 to 599"):
            read([1, index])
    with pytest.raises(CourseError, match=str(index)):
        tokenizer.token_bytes(index)


# --------------------------------------------------------------------------------------------- tokenizer.json


def test_a_saved_tokenizer_is_the_same_whoever_wrote_and_whoever_reads_it(tmp_path, trained, library):
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    trained.save(ours)
    library.save(theirs)
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    text = _stories()[0] + END_OF_TEXT
    for path in (ours, theirs):
        for implementation, kind in (("scratch", BPETokenizer), ("library", LibraryTokenizer)):
            loaded = tokenizers.load(path, implementation)
            assert type(loaded) is kind
            assert loaded.fingerprint() == trained.fingerprint()
            for allow in (False, True):
                assert loaded.encode(text, allow_special=allow) == trained.encode(text, allow_special=allow)


def test_the_library_itself_reads_what_we_save(tmp_path, trained):
    from tokenizers import Tokenizer

    trained.save(tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = f"Ballast yelled{END_OF_TEXT}"
    assert theirs.encode(text).ids == trained.encode(text, allow_special=True)
    assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) == text


def test_merges_written_as_one_string_are_read(tmp_path, trained):
    document = trained._document()
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    (tmp_path / "old.json").write_text(json.dumps(document))
    assert tokenizers.load(tmp_path / "old.json", "scratch").merges == trained.merges


def test_tokenizers_with_other_merges_have_other_fingerprints(trained):
    assert BPETokenizer.train(_stories(), 599).fingerprint() != trained.fingerprint()
    assert BPETokenizer.train(_stories(), 600, ("<|end|>",)).fingerprint() != trained.fingerprint()


def _without(key):
    return lambda document: document.pop(key)


def _model(**changes):
    return lambda document: document["model"].update(changes)


DAMAGE = {
    "no model": (_without("model"), "'model' is missing"),
    "no merges": (_model(merges=None), "'merges' is missing"),
    "no vocabulary": (_model(vocab=[]), "'vocab' is missing"),
    "no special tokens": (_without("added_tokens"), "'added_tokens' is missing"),
    "special token without id": (lambda d: d["added_tokens"][0].pop("id"), "'id' is missing"),
    "merge of unknown tokens": (lambda d: d["model"]["merges"].append(["q~", "~q"]), "the merge"),
    "merge of three": (lambda d: d["model"]["merges"].append(["a", "b", "c"]), "the merge"),
    "an id twice": (lambda d: d["model"]["vocab"].update({"!": 5}), "do not have the ids"),
    "an id that is a word": (lambda d: d["model"]["vocab"].update({"!": "one"}), "not a whole number"),
    "a token that is no bytes": (_model(vocab={"漢": 0}, merges=[]), "stands for no byte|do not have"),
    "another kind": (_model(type="Whole"), "holds a Whole tokenizer"),
}


@pytest.mark.parametrize("implementation", ["scratch", "library"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, trained, implementation, name):
    damage, message = DAMAGE[name]
    document = trained._document()
    damage(document)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(document))
    with pytest.raises(CourseError, match=message) as caught:
        tokenizers.load(path, implementation)
    assert "broken.json" in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"text"', "\ud800".encode("utf-8", "surrogatepass")]
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CourseError, match="broken.json is not a tokenizer.json"):
        tokenizers.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CourseError, match="No such file"):
        tokenizers.load(tmp_path / "missing.json")


def test_from_scratch_refuses_other_rules_for_words_and_the_library_takes_them(tmp_path, trained):
    document = trained._document()
    document["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "other.json").write_text(json.dumps(document))
    with pytest.raises(CourseError, match="implementation='library'"):
        tokenizers.load(tmp_path / "other.json", "scratch")
    assert tokenizers.load(tmp_path / "other.json").encode("the")[0] == trained.encode(" the")[0]


# ------------------------------------------------------------------------------------------------- characters


def test_characters_get_ids_in_unicode_order_after_the_special_tokens():
    tokenizer = CharTokenizer.from_text("banana ä", ("<pad>", "<de>"))
    assert tokenizer.encode("<de>ä b", allow_special=True) == [1, 6, 2, 4]
    assert tokenizer.decode([1, 6, 2, 4]) == "<de>ä b"
    assert tokenizer.vocab_size == 7


def test_an_unknown_character_is_named_or_becomes_unk():
    with pytest.raises(CourseError, match="'z' is not among the 2"):
        CharTokenizer.from_text("ab").encode("az")
    assert CharTokenizer.from_text("ab", ("<unk>",)).encode("azb") == [1, 0, 2]


def test_characters_survive_saving_and_the_library_reads_the_file(tmp_path):
    from tokenizers import Tokenizer

    text = "Ein Käfer,\n🎈 zwei  Käfer.\r\n"
    tokenizer = CharTokenizer.from_text(text, ("<pad>", "<unk>"))
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert isinstance(loaded, CharTokenizer)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode(text) == tokenizer.encode(text)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(text).ids == tokenizer.encode(text)
    assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) == text
    assert theirs.encode("q").ids == tokenizer.encode("q") == [1]


@pytest.mark.slow
def test_transformers_reads_what_we_save(tmp_path, trained):
    from transformers import PreTrainedTokenizerFast

    trained.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(_stories()[0])["input_ids"] == trained.encode(_stories()[0])


@pytest.mark.slow
def test_merges_equal_the_librarys_on_python_docs():
    texts = [document.text for document in corpora.load("python-docs").documents[::20]]
    ours, theirs = BPETokenizer.train(texts, 8449), LibraryTokenizer.train(texts, 8449)
    assert ours.merges == theirs.merges
    assert ours.encode_batch(texts[:500]) == theirs.encode_batch(texts[:500])
