"""WordPiece from scratch against the `tokenizers` library, and against its definition."""

import argparse
import itertools
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
from shared.data.wordpiece import (
    SPECIAL_TOKENS,
    UNKNOWN,
    LibraryWordPiece,
    Normalizer,
    Rules,
    WordPieceTokenizer,
    count_words,
)
from shared.runtime.errors import CourseError


def _stories() -> list[str]:
    return [document.text for document in corpora.load("stories").documents]


def _dates() -> list[str]:
    return [pair.source for pair in corpora.date_pairs("train", 3000)]


def _sources() -> list[str]:
    return [Path(module.__file__).read_text(encoding="utf-8") for module in (json, argparse, random)]


TEXTS = {"stories": _stories, "dates in 43 locales": _dates, "Python source": _sources}
HANDMADE = [
    *(
        "",
        " ",
        "\t\r\n",
        "Ünïcödé naïve ΣΊΣΥΦΟΣ İstanbul ǅ ﬃ",
        "漢字かな交じり文 한국어",
        "zero\0width\u200bjoin\ufffd",
    ),
    *(
        "e\u0301 e\u0323\u0301",
        "👩‍👩‍👧 🎈",
        "don't!!! (well…) «quoted» $5 <a>",
        "a\u00a0b\u2003c\u2028d",
        "x" * 100,
    ),
    *("x" * 101, "[UNK] [MASK] [CLS]", "##ing a##b", "\u3000全角、句読点。"),
]


@pytest.fixture(scope="module")
def trained() -> WordPieceTokenizer:
    return WordPieceTokenizer.train(_stories(), 600)


@pytest.fixture(scope="module")
def library() -> LibraryWordPiece:
    return LibraryWordPiece.train(_stories(), 600)


# Characters that are the same in Unicode 3.2 and now: the library's edition lies between.
settled_characters = st.characters(codec="utf-8").filter(
    lambda character: (
        unicodedata.ucd_3_2_0.category(character) == unicodedata.category(character) != "Cn"
        and character != "\u166d"  # a symbol since Unicode 12, a sign of punctuation before
    )
)


# ------------------------------------------------------------------------------------ parity with the library


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("name", TEXTS)
def test_training_from_scratch_learns_the_vocabulary_of_the_library(name, lowercase):
    texts = TEXTS[name]()
    ours = WordPieceTokenizer.train(texts, 1200, lowercase=lowercase)
    theirs = LibraryWordPiece.train(texts, 1200, lowercase=lowercase)
    assert len(ours.vocab) > 1000
    assert ours._names == theirs._names
    assert ours.fingerprint() == theirs.fingerprint()


def test_a_limited_alphabet_is_learnt_as_the_library_learns_it():
    texts = _dates()
    ours = WordPieceTokenizer.train(texts, 400, limit_alphabet=80)
    assert ours._names == LibraryWordPiece.train(texts, 400, limit_alphabet=80)._names
    characters = Counter("".join(ours.rules.normalizer(text).replace(" ", "") for text in texts))
    kept = {name for name in ours.vocab if len(name) == 1}
    assert len(kept) == 80 < len(characters)
    assert min(characters[c] for c in kept) >= max(characters[c] for c in characters if c not in kept)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="abcé .", max_size=40), min_size=1, max_size=8),
    merges=st.integers(0, 60),
    min_frequency=st.integers(0, 3),
)
def test_ties_and_repeated_tokens_are_resolved_as_in_the_library(texts, merges, min_frequency):
    if not "".join(texts).strip():
        return
    options = {"min_frequency": min_frequency, "limit_alphabet": 4}
    size = 5 + 2 * 4 + merges
    ours = WordPieceTokenizer.train(texts, size, **options)
    assert ours._names == LibraryWordPiece.train(texts, size, **options)._names


def test_until_two_pairs_tie_a_plain_run_of_the_library_learns_the_same_tokens():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = _stories()
    tokens, first_tie = _by_definition(texts, 30, "count")
    assert 10 < first_tie < 30
    theirs = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    theirs.normalizer, theirs.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    theirs.train_from_iterator(texts, trainer)
    vocab = theirs.get_vocab()
    start = len(tokens) - 30
    assert set(tokens[:start]) == {name for name, index in vocab.items() if index < start}
    ordered = sorted(vocab, key=vocab.__getitem__)
    assert ordered[start : start + first_tie] == tokens[start : start + first_tie]
    ours = WordPieceTokenizer.train(texts, 600)
    assert len(set(vocab) & set(ours._names)) > 570  # 597 to 600 in thirty runs


@pytest.mark.parametrize("name", TEXTS)
def test_encoding_from_scratch_gives_the_ids_of_the_library(name, trained, library):
    texts = TEXTS[name]()
    assert trained.encode_batch(texts) == library.encode_batch(texts)


@pytest.mark.parametrize("text", HANDMADE)
def test_odd_texts_get_the_ids_of_the_library(text):
    everything = [*_stories(), *HANDMADE] * 2
    ours = WordPieceTokenizer.train(everything, 700)
    theirs = LibraryWordPiece.train(everything, 700)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=settled_characters))
def test_any_text_gets_the_ids_of_the_library(trained, library, text):
    assert trained.encode(text) == library.encode(text)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet=settled_characters),
    flags=st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, True, False]), st.booleans()),
)
def test_any_text_is_normalised_as_the_library_does_it(text, flags):
    from tokenizers import normalizers

    ours = Normalizer(*flags)
    theirs = normalizers.BertNormalizer(
        clean_text=flags[0], handle_chinese_chars=flags[1], strip_accents=flags[2], lowercase=flags[3]
    )
    assert ours(text) == theirs.normalize_str(text)


def test_the_same_ideographs_stand_alone_as_in_the_library():
    from tokenizers import normalizers

    blocks = (range(0x2E00, 0xD800), range(0xE000, 0x10000), range(0x1F000, 0x32000))
    text = "".join(chr(code) for block in blocks for code in block)
    theirs = normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=False)
    assert Normalizer(False, True, False, False)(text) == theirs.normalize_str(text)


@pytest.mark.parametrize("clean_up", [True, False])
def test_any_ids_are_decoded_as_the_library_decodes_them(clean_up):
    extra = {name: 600 + i for i, name in enumerate(["n't", "'s", "do not", "##.", "a . b", "?!", " do not"])}
    base = WordPieceTokenizer.train(_stories(), 600)
    ours = WordPieceTokenizer({**base.vocab, **extra}, base.special_tokens, Rules(clean_up=clean_up))
    theirs = _library(ours._document())
    draw = random.Random(0)
    for _ in range(300):
        ids = draw.choices(range(ours.vocab_size), k=draw.randrange(12)) + draw.choices(range(600, 607), k=2)
        draw.shuffle(ids)
        assert ours.decode(ids) == theirs.decode(ids)


def _library(document) -> LibraryWordPiece:
    from tokenizers import Tokenizer

    return LibraryWordPiece(Tokenizer.from_str(json.dumps(document)))


# ------------------------------------------------------------------------------------ against the definition


def _by_definition(
    texts: list[str], learnt: int, score: str, min_frequency: int = 1
) -> tuple[list[str], int]:
    """All pairs counted anew for each token; the tokens, and how many were learnt before the first tie."""
    counts = count_words(texts, Normalizer())
    characters = sorted({c for word in counts for c in word})
    inside = sorted({c for word in counts for c in word[1:]})
    tokens = [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in inside)]
    order = {token: i for i, token in enumerate(tokens)}
    words = {word: [f"##{c}" if i else c for i, c in enumerate(word)] for word in counts}
    first_tie, size = learnt, len(tokens) + learnt
    while len(tokens) < size:
        pairs, single = Counter(), Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
            for part in parts:
                single[part] += counts[word]
        scores = {pair: _score(pair, pairs, single, score) for pair in pairs if pairs[pair] >= min_frequency}
        if not scores:
            break
        best = min(scores, key=lambda pair: (-scores[pair], order[pair[0]], order[pair[1]]))
        if list(scores.values()).count(scores[best]) > 1:
            first_tie = min(first_tie, learnt - (size - len(tokens)))
        joined = best[0] + best[1].removeprefix("##")
        if joined not in order:
            order[joined] = len(tokens)
            tokens.append(joined)
        words = {word: _join(parts, best, joined) for word, parts in words.items()}
    return tokens, first_tie


def _score(pair, pairs, single, score):
    return pairs[pair] if score == "count" else pairs[pair] / (single[pair[0]] * single[pair[1]])


def _join(parts: list[str], pair: tuple[str, str], joined: str) -> list[str]:
    out: list[str] = []
    position = 0
    while position < len(parts):
        if tuple(parts[position : position + 2]) == pair:
            out.append(joined)
            position += 2
        else:
            out.append(parts[position])
            position += 1
    return out


@pytest.mark.parametrize("min_frequency", [1, 4])
@pytest.mark.parametrize("score", ["count", "likelihood"])
def test_the_incremental_index_learns_what_counting_anew_learns(score, min_frequency):
    texts = _stories()[:2]
    expected, _ = _by_definition(texts, 150, score, min_frequency)
    options = {"score": score, "min_frequency": min_frequency}
    ours = WordPieceTokenizer.train(texts, len(expected), **options)
    assert ours._names == expected


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="aab ", min_size=1, max_size=60), score=st.sampled_from(["count", "likelihood"]))
def test_runs_of_one_letter_are_counted_right_for_both_scores(text, score):
    if not text.strip():
        return
    expected, _ = _by_definition([text], 12, score)
    ours = WordPieceTokenizer.train([text], len(expected), score=score, min_frequency=1)
    assert len(ours._names) == len(expected)
    if score == "count":  # a run "aaa" holds the pair twice, and joins once: only the counts agree for both
        assert ours._names == expected


def test_the_two_scores_choose_differently():
    texts = ["ab ab ab ab ac bd xy xy"]  # "ab" is most frequent; "x" never stands without "y"
    learnt = {}
    for score in ("count", "likelihood"):
        tokenizer = WordPieceTokenizer.train(texts, 100, score=score, min_frequency=2)
        learnt[score] = [name for name in tokenizer._names[5:] if len(name.removeprefix("##")) > 1]
    assert learnt == {"count": ["ab", "xy"], "likelihood": ["xy", "ab"]}


def test_a_word_is_cut_from_the_left_the_longest_token_first():
    names = [*SPECIAL_TOKENS, *"abc", "ab", "##b", "##c", "##bc", "abcd"]
    tokenizer = WordPieceTokenizer(
        {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(SPECIAL_TOKENS)}
    )
    cut = {
        word: [names[index] for index in tokenizer.encode(word)] for word in ("abc", "abbc", "abcd", "abca")
    }
    assert cut["abc"] == ["ab", "##c"]  # greedy, though "a ##bc" is as short
    assert cut["abbc"] == ["ab", "##bc"]
    assert cut["abcd"] == ["abcd"]
    assert cut["abca"] == ["[UNK]"]  # there is no "##a"


def test_a_word_longer_than_the_limit_is_unknown(trained):
    assert len(trained.encode("t" * 100)) == 100
    assert trained.encode("t" * 101) == [trained.special_tokens[UNKNOWN]]


def test_normalisation_takes_away_capitals_accents_and_control_characters():
    words = Normalizer().words("Ça\u200b  va,\0 ΟΔΟΣ?\t東京x")
    assert words == ["ca", "va", ",", "οδοσ", "?", "東", "京", "x"]
    cased = Normalizer(lowercase=False).words("Ça va, ÉTÉ")
    assert cased == ["Ça", "va", ",", "ÉTÉ"]


def test_an_unseen_script_is_unknown(trained):
    assert trained.encode("שלום") == [trained.special_tokens[UNKNOWN]]
    assert trained.decode(trained.encode("the שלום.")) == "the [UNK]."


# ------------------------------------------------------------------------------------------- what comes back


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abcdeit ABÉü.,'!?\n-\"", max_size=60))
def test_decoding_loses_only_capitals_accents_and_spaces(trained, text):
    ids = trained.encode(text)
    again = trained.decode(ids)
    if trained.special_tokens[UNKNOWN] not in ids:
        assert trained.encode(again) == ids
        assert again.replace(" ", "") == "".join(trained.rules.normalizer(text).split())


def test_decoding_puts_spaces_between_words_and_none_before_a_full_stop(trained):
    assert trained.decode(trained.encode("The Cat,  and\nthe dog.")) == "the cat, and the dog."


@pytest.mark.parametrize("kind", ["scratch", "library"])
def test_bytes_and_tokens_are_those_of_the_text(kind, trained, library):
    tokenizer = trained if kind == "scratch" else library
    ids = tokenizer.encode("the cat was singing")
    assert tokenizer.decode_bytes(ids) == b"the cat was singing"
    names = [tokenizer.token_bytes(index).decode() for index in ids]
    assert names[0] == "the"
    assert names[-1].startswith("##")


# --------------------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("kind", ["scratch", "library"])
def test_special_tokens_in_a_text_are_plain_text_unless_allowed(kind, trained, library):
    tokenizer = trained if kind == "scratch" else library
    text = "the [MASK] cat[SEP]"
    assert not {2, 3, 4} & set(tokenizer.encode(text))
    assert not {2, 3, 4} & set(tokenizer.encode_batch([text])[0])
    ids = tokenizer.encode(text, allow_special=True)
    assert ids == [*tokenizer.encode("the"), 4, *tokenizer.encode("cat"), 3]
    assert tokenizer.decode(ids) == "the [MASK] cat [SEP]"


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", [WordPieceTokenizer, LibraryWordPiece])
@pytest.mark.parametrize(
    ("texts", "size", "special", "message"),
    [
        ([], 100, SPECIAL_TOKENS, "no word to learn from"),
        (["", " \n\0"], 100, SPECIAL_TOKENS, "no word to learn from"),
        (["abc"], 9, SPECIAL_TOKENS, "need at least 10"),
        (["abc"], 2_000_000, SPECIAL_TOKENS, "too large"),
        (["abc"], 100, ("[PAD]",), r"needs the special token '\[UNK\]'"),
        (["abc"], 100, ("[UNK]", "[UNK]"), "given twice"),
        (["abc"], 100, ("[UNK]", "pad"), "'pad' is a word that text may hold"),
        (["abc"], 100, ("[UNK]", ""), "'' is a word that text may hold"),
        (["ab\udcff"], 100, SPECIAL_TOKENS, "UTF-8 cannot hold"),
    ],
)
def test_an_impossible_request_is_refused(kind, texts, size, special, message):
    with pytest.raises(CourseError, match=message):
        kind.train(texts, size, special)


def test_an_unknown_score_is_a_mistake_in_the_program():
    with pytest.raises(ValueError, match="neither 'count' nor"):
        WordPieceTokenizer.train(["a"], 100, score="loss")


def test_an_alphabet_of_no_characters_is_refused():
    with pytest.raises(CourseError, match="at least one character"):
        WordPieceTokenizer.train(["abc"], 300, limit_alphabet=0)


@pytest.mark.parametrize("kind", ["scratch", "library"])
@pytest.mark.parametrize("index", [-1, 600, 10**12])
def test_an_id_outside_the_vocabulary_is_named_with_the_size(kind, index, trained, library):
    tokenizer = trained if kind == "scratch" else library
    for read in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(CourseError, match=rf"Token id {index} .*ids 0 to 599"):
            read([1, index])
    with pytest.raises(CourseError, match=str(index)):
        tokenizer.token_bytes(index)


@pytest.mark.parametrize("kind", ["scratch", "library"])
@pytest.mark.parametrize("text", ["a\ud800b", b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_a_text_that_is_no_utf8_is_refused(kind, text, trained, library):
    with pytest.raises(CourseError, match="UTF-8 cannot hold"):
        (trained if kind == "scratch" else library).encode(text)


def test_training_reports_its_progress():
    seen: list[tuple[int, int]] = []
    WordPieceTokenizer.train(_stories(), 600, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {600}


# --------------------------------------------------------------------------------------------- tokenizer.json


def test_a_saved_tokenizer_is_the_same_whoever_wrote_and_whoever_reads_it(tmp_path, trained, library):
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    trained.save(ours)
    library.save(theirs)
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    text = _stories()[0] + "[SEP] Ünknown 漢"
    for path in (ours, theirs):
        for implementation, kind in (("scratch", WordPieceTokenizer), ("library", LibraryWordPiece)):
            loaded = tokenizers.load(path, implementation)
            assert type(loaded) is kind
            assert loaded.fingerprint() == trained.fingerprint()
            for allow in (False, True):
                assert loaded.encode(text, allow_special=allow) == trained.encode(text, allow_special=allow)


@pytest.mark.parametrize(
    "rules", [Rules(Normalizer(lowercase=False)), Rules(Normalizer(False, False, True), 7, False)]
)
def test_rules_survive_saving(tmp_path, trained, rules):
    changed = WordPieceTokenizer(trained.vocab, trained.special_tokens, rules)
    changed.save(tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json", "scratch")
    assert loaded.rules == rules
    assert loaded.fingerprint() == tokenizers.load(tmp_path / "tokenizer.json").fingerprint()
    assert loaded.fingerprint() != trained.fingerprint()


def test_tokenizers_with_other_tokens_have_other_fingerprints(trained):
    assert WordPieceTokenizer.train(_stories(), 599).fingerprint() != trained.fingerprint()
    assert WordPieceTokenizer.train(_stories(), 600).fingerprint() == trained.fingerprint()


def test_the_library_itself_reads_what_we_save_and_adds_the_marks_of_bert(tmp_path, trained):
    from tokenizers import Tokenizer

    trained.save(tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    one, two = trained.encode("The keeper"), trained.encode("a cat.")
    assert theirs.encode("The keeper").ids == [2, *one, 3]
    pair = theirs.encode("The keeper", "a cat.")
    assert pair.ids == [2, *one, 3, *two, 3]
    assert pair.type_ids == [0] * (len(one) + 2) + [1] * (len(two) + 1)


def test_without_marks_among_the_special_tokens_none_are_added(tmp_path):
    from tokenizers import Tokenizer

    tokenizer = WordPieceTokenizer.train(_stories(), 600, (UNKNOWN, tokenizers.END_OF_TEXT))
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("The keeper").ids == tokenizer.encode("The keeper")


def _model(**changes):
    return lambda document: document["model"].update(changes)


DAMAGE = {
    "no model": (lambda d: d.pop("model"), "'model' is missing"),
    "no vocabulary": (_model(vocab=None), "'vocab' is missing"),
    "no special tokens": (lambda d: d.pop("added_tokens"), "'added_tokens' is missing"),
    "an id twice": (lambda d: d["model"]["vocab"].update({"the": 9}), "do not have the ids"),
    "an id that is a word": (lambda d: d["model"]["vocab"].update({"the": "one"}), "not a whole number"),
    "a special token with two ids": (lambda d: d["added_tokens"][0].update(id=7), "has two ids"),
    "no unknown token": (lambda d: d["model"].update(unk_token="[X]"), r"'\[X\]' is not in its vocabulary"),
    "an unknown token that is a list": (lambda d: d["model"].update(unk_token=[1]), "unknown token"),
    "half a surrogate pair": (
        lambda d: d["model"]["vocab"].update({"\ud800": len(d["model"]["vocab"])}),
        "half a surrogate pair",
    ),
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


OTHERS = {
    "no normaliser": lambda d: d.update(normalizer=None),
    "another normaliser": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "other words": lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
    "another decoder": lambda d: d.update(decoder={"type": "Fuse"}),
    "another mark": _model(continuing_subword_prefix="@@"),
    "another unknown": _model(unk_token="[PAD]"),
    "greedy special tokens": lambda d: d["added_tokens"][4].update(lstrip=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_from_scratch_refuses_other_rules_and_the_library_takes_them(tmp_path, trained, name):
    document = trained._document()
    OTHERS[name](document)
    (tmp_path / "other.json").write_text(json.dumps(document))
    with pytest.raises(CourseError, match="implementation='library'"):
        tokenizers.load(tmp_path / "other.json", "scratch")
    other = tokenizers.load(tmp_path / "other.json")
    assert isinstance(other, LibraryWordPiece)
    assert other.encode("the") == trained.encode("the")
    same_ids = name in ("another decoder", "greedy special tokens")
    assert (other.fingerprint() == trained.fingerprint()) == same_ids


@pytest.mark.parametrize("key", ["normalizer", "pre_tokenizer", "decoder"])
@pytest.mark.parametrize("value", ["Bert", [], [1], 3])
def test_a_part_that_is_no_object_is_refused(tmp_path, trained, key, value):
    (tmp_path / "odd.json").write_text(json.dumps({**trained._document(), key: value}))
    for implementation in ("scratch", "library"):
        with pytest.raises(CourseError, match=r"odd\.json"):
            tokenizers.load(tmp_path / "odd.json", implementation)


@pytest.mark.slow
def test_transformers_reads_what_we_save(tmp_path, trained):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    trained.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[MASK]", "pad_token": "[PAD]"}
        )
    )
    text = _stories()[0]
    expected = [2, *trained.encode(text), 3]
    direct = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert direct(text)["input_ids"] == expected
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(text)["input_ids"] == expected
    assert auto.mask_token_id == 4


@pytest.mark.slow
def test_vocabulary_equals_the_librarys_on_python_docs():
    texts = [
        document.text for document in itertools.islice(corpora.load("python-docs").documents, 0, None, 20)
    ]
    ours, theirs = WordPieceTokenizer.train(texts, 8000), LibraryWordPiece.train(texts, 8000)
    assert ours._names == theirs._names
    assert len(ours._names) == 8000
    assert ours.encode_batch(texts[:500]) == theirs.encode_batch(texts[:500])
