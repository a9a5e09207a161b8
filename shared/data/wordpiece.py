"""WordPiece, BERT's tokenizer, from scratch and by the `tokenizers` library, behind the face of `tokenizers`.

1. The text is normalised: control characters go, all white space becomes a space, each Chinese character
   stands alone, and, where the tokenizer is uncased, capitals and accents go.
2. It is cut into words at white space, which is lost, and around each punctuation sign.
3. A word is cut into the vocabulary's tokens from the left, always the longest that fits; tokens that
   continue a word are written with "##". A word that cannot be cut wholly becomes one "[UNK]": WordPiece has
   no bytes to fall back to, so a script that was not in the training text is unknown.

What is lost does not come back: `decode` joins the tokens to words, puts one space between two words and
takes it away before a full stop and the like. That text, encoded once more, gives the same ids, if none of
them is "[UNK]".

Training joins pairs as byte-level BPE does, and keeps the tokens but not the merges: encoding looks only for
the longest token, and may cut a word otherwise than the merges would. Two scores for a pair:

- "count", what the `tokenizers` library does: the most frequent pair;
- "likelihood", count(ab) / (count(a) · count(b)): the logarithm is what a unigram model of the text gains by
  each pair that is joined, up to a constant. Schuster & Nakajima 2012 take the token that raises the
  likelihood most, and publish no code. The ratio does not ask how often the pair comes, so rare pairs come
  first; `min_frequency` holds them back.

Sources: Schuster & Nakajima 2012, "Japanese and Korean Voice Search" (training); Wu et al. 2016, "Google's
Neural Machine Translation System", §4.1 (a manageable alphabet, the rest unknown); Devlin et al. 2019,
"BERT", §3, and the `tokenization.py` released with it (normalisation, words, "##", longest match first).

Departures: the library's table of Unicode is older than Python's. A character that was added, or whose
category was changed, since Unicode 8 may be kept, cut or stripped otherwise.
"""

import heapq
import json
import unicodedata
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import regex

from shared.data import tokenizers as face
from shared.data.tokenizers import LibraryEncoding, PairIndex, Tokenizer
from shared.runtime.errors import CourseError

PAD, UNKNOWN, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNKNOWN, CLS, SEP, MASK)
CONTINUES = "##"
MAX_WORD = 100  # characters; a longer word is unknown
# After clean-up, these stand without the space that joins words: English punctuation and contractions.
CLEAN_UP = (
    *((f" {sign}", sign) for sign in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m")),
    (" do not", " don't"),
    *((f" {ending}", ending) for ending in ("'s", "'ve", "'re")),
)
_CHINESE = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)),
    *((0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)
# A punctuation sign, which for BERT is all ASCII signs and Unicode's category P, or whatever lies between.
_WORDS = regex.compile(r"[!-/:-@\[-`{-~\p{P}]|[^\s!-/:-@\[-`{-~\p{P}]+")


class _Table(dict[int, str]):
    """For `str.translate`: what becomes of a character, found out when it first comes."""

    def __init__(self, becomes: Callable[[str], str]):
        super().__init__()
        self._becomes = becomes

    def __missing__(self, code: int) -> str:
        self[code] = result = self._becomes(chr(code))
        return result


@dataclass(frozen=True)
class Normalizer:
    """BERT's normalisation; the names are those of the library's BertNormalizer.

    Attributes:
        clean_text: drop control and format characters, U+0000 and U+FFFD; all white space becomes " ".
        handle_chinese_chars: a space on each side of a CJK ideograph.
        strip_accents: decompose (NFD) and drop the marks; None does as `lowercase` says.
        lowercase: each character by itself, so that "Σ" becomes "σ" at the end of a word too.
    """

    clean_text: bool = True
    handle_chinese_chars: bool = True
    strip_accents: bool | None = None
    lowercase: bool = True

    def __call__(self, text: str) -> str:
        """The text, normalised."""
        text = text.translate(self._first)
        if self._strips and not text.isascii():
            text = unicodedata.normalize("NFD", text).translate(self._second)
        if not self.lowercase:
            return text
        return text.lower() if text.isascii() else text.translate(self._third)

    @property
    def _strips(self) -> bool:
        return self.lowercase if self.strip_accents is None else self.strip_accents

    @cached_property
    def _first(self) -> _Table:
        return _Table(self._cleaned)

    @cached_property
    def _second(self) -> _Table:
        return _Table(lambda character: "" if unicodedata.category(character) == "Mn" else character)

    @cached_property
    def _third(self) -> _Table:
        return _Table(str.lower)

    def _cleaned(self, character: str) -> str:
        if self.clean_text:
            if character in "\t\n\r" or unicodedata.category(character) in ("Zs", "Zl", "Zp"):
                return " "
            if character in "\0\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co"):
                return ""
        if self.handle_chinese_chars and any(low <= ord(character) <= high for low, high in _CHINESE):
            return f" {character} "
        return character

    def words(self, text: str) -> list[str]:
        """The words and signs of a text, normalised; white space is gone.

        Raises:
            CourseError: the text holds half a surrogate pair, or bytes that are no UTF-8.
        """
        if not text.isascii():
            face.utf8(text, errors="strict")
        return _WORDS.findall(self(text))


@dataclass(frozen=True)
class Rules:
    """Everything but the vocabulary.

    Attributes:
        normalizer: what happens to the text first.
        max_word: characters; a longer word is unknown.
        clean_up: whether `decode` takes away the space before a full stop and the like.
    """

    normalizer: Normalizer = field(default_factory=Normalizer)
    max_word: int = MAX_WORD
    clean_up: bool = True


class _WordPiece(Tokenizer):
    """What both implementations know: the tokens, the special tokens among them, and the document."""

    def __init__(self, vocab: Mapping[str, int], special_tokens: Mapping[str, int]):
        self.vocab: dict[str, int] = {name: i for name, i in vocab.items() if name not in special_tokens}
        self.special_tokens = dict(special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of ids: special tokens, the alphabet, the tokens learnt."""
        return len(self.vocab) + len(self.special_tokens)

    @cached_property
    def _names(self) -> list[str]:
        names = {index: name for name, index in [*self.vocab.items(), *self.special_tokens.items()]}
        return [names[index] for index in range(self.vocab_size)]

    @cached_property
    def _tokens(self) -> list[bytes]:
        return [name.encode() for name in self._names]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The words of token ids, one space between two; see the module's docstring."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of `decode` in UTF-8."""
        return self.decode(ids).encode("utf-8")

    def token_bytes(self, index: int) -> bytes:
        """The token as it is written, "##" included; see `Tokenizer.token_bytes`."""
        return self._tokens[self._checked([index])[0]]

    def _identity(self) -> object:
        document = self._document()
        model = {key: value for key, value in document["model"].items() if key != "vocab"}
        words = {key: document[key] for key in ("normalizer", "pre_tokenizer")}
        return {**words, "model": model, "names": self._names, "special": self.special_tokens}


class WordPieceTokenizer(_WordPiece):
    """WordPiece from scratch; the same ids as `LibraryWordPiece` on the same vocabulary.

    Args:
        vocab: token → id, the special tokens included or not; with them the ids are 0…vocab_size − 1.
        special_tokens: name → id; "[UNK]" is among them.
        rules: normalisation, longest word, clean-up.
    """

    def __init__(
        self, vocab: Mapping[str, int], special_tokens: Mapping[str, int], rules: Rules | None = None
    ):
        super().__init__(vocab, special_tokens)
        self.rules = rules or Rules()
        _require_unknown(special_tokens)
        self._ids = {**self.vocab, **self.special_tokens}
        self._unknown = [self.special_tokens[UNKNOWN]]
        self._longest = max(map(len, self._ids))
        self._cache: dict[str, list[int]] = {}
        self._special = face.special_pattern(self.special_tokens)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        progress: Callable[[int, int], None] | None = None,
        *,
        lowercase: bool = True,
        score: str = "count",
        min_frequency: int = 2,
        limit_alphabet: int = 1000,
    ) -> "WordPieceTokenizer":
        """Join pairs of tokens until the vocabulary is full or no pair is left.

        Of pairs with equal scores the one with the smaller ids is joined first (left token, then right). Ids:
        special tokens, characters, characters that continue a word, tokens in the order learnt.

        Args:
            texts: the corpus.
            vocab_size: special tokens + alphabet + tokens learnt.
            special_tokens: get the ids from 0 on; "[UNK]" must be among them.
            progress: called now and then with (tokens so far, `vocab_size`).
            lowercase: uncased, and without accents.
            score: "count" or "likelihood"; see the module's docstring.
            min_frequency: a pair that comes less often is not joined.
            limit_alphabet: most frequent characters that are kept; the others are unknown.

        Raises:
            CourseError: the texts hold no word; `vocab_size` is too small for the alphabet; a special token
                could be learnt as text, or "[UNK]" is missing.
        """
        if score not in ("count", "likelihood"):
            raise ValueError(f"score {score!r} is neither 'count' nor 'likelihood'")
        rules = Rules(Normalizer(lowercase=lowercase))
        _check_special(special_tokens, rules.normalizer)
        counts = count_words(texts, rules.normalizer)
        tokens = [*special_tokens, *_alphabet(counts, limit_alphabet)]
        _check_size(vocab_size, special_tokens, tokens)
        pairs_of = PairIndex if score == "count" else _LikelihoodPairs
        _learn(counts, tokens, vocab_size, min_frequency, pairs_of, progress)
        vocab = {token: index for index, token in enumerate(tokens)}
        return cls(vocab, {name: vocab[name] for name in special_tokens}, rules)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`."""
        if not allow_special:
            return self._encode_plain(text)
        return face.encode_special(text, self._special, self.special_tokens, self._encode_plain)

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        cache = self._cache
        for word in self.rules.normalizer.words(text):
            found = cache.get(word)
            if found is None:
                found = self._cut(word)
                if len(cache) < face.CACHED_WORDS and len(word) <= face.CACHED_LENGTH:
                    cache[word] = found
            ids += found
        return ids

    def _cut(self, word: str) -> list[int]:
        """Greedy, the longest token first; "[UNK]" for the whole word as soon as nothing fits."""
        if len(word) > self.rules.max_word:
            return self._unknown
        ids: list[int] = []
        start, prefix = 0, ""
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                index = self._ids.get(prefix + word[start:end])
                if index is not None:
                    break
            else:
                return self._unknown
            ids.append(index)
            start, prefix = end, CONTINUES
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The words of token ids, one space between two; see the module's docstring."""
        parts = []
        for number, index in enumerate(self._checked(ids)):
            name = self._names[index]
            if number:  # a text may begin in the middle of a word: then "##" is shown
                name = name[len(CONTINUES) :] if name.startswith(CONTINUES) else f" {name}"
            if self.rules.clean_up:
                for spaced, joined in CLEAN_UP:
                    name = name.replace(spaced, joined)
            parts.append(name)
        return "".join(parts)

    def _document(self) -> dict[str, Any]:
        return _document(self._names, self.special_tokens, self.rules)


class LibraryWordPiece(LibraryEncoding, _WordPiece):
    """The `tokenizers` library's WordPiece behind the same face, whatever its normalisation.

    Args:
        tokenizer: a `tokenizers.Tokenizer` whose model is a WordPiece.
    """

    def __init__(self, tokenizer: Any):
        text = tokenizer.to_str()
        super().__init__(*_read_vocab(json.loads(text), "the tokenizer"))
        self._bind(text)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        *,
        lowercase: bool = True,
        min_frequency: int = 2,
        limit_alphabet: int = 1000,
    ) -> "LibraryWordPiece":
        """Learn the vocabulary with the library; arguments and errors as in `WordPieceTokenizer.train`.

        The library numbers the characters that continue a word ("##a") in the order of a hash table, another
        in each run, and takes of equally frequent pairs the one with the smaller numbers. So two runs of it
        differ wherever pairs tie. Here the alphabet is handed to it in a fixed order, as special tokens, and
        what it learns is the same in every run, and the same as from scratch.
        """
        from tokenizers import Tokenizer as RustTokenizer
        from tokenizers import models, normalizers, pre_tokenizers, trainers

        rules = Rules(Normalizer(lowercase=lowercase))
        _check_special(special_tokens, rules.normalizer)
        texts = list(texts)
        alphabet = _alphabet(count_words(texts, rules.normalizer), limit_alphabet)
        _check_size(vocab_size, special_tokens, [*special_tokens, *alphabet])
        tokenizer = RustTokenizer(models.WordPiece(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[*special_tokens, *alphabet],
            limit_alphabet=0,  # none but those
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer=trainer)
        vocab = tokenizer.get_vocab()
        special = {name: vocab[name] for name in special_tokens}
        document = _document(sorted(vocab, key=vocab.__getitem__), special, rules)
        return cls(RustTokenizer.from_str(json.dumps(document)))


# ------------------------------------------------------------------------------------------------ training


def count_words(texts: Iterable[str], normalizer: Normalizer) -> Counter[str]:
    """How often each word comes in the texts.

    Raises:
        CourseError: none does.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.words(text))
    if not counts:
        raise CourseError("The texts hold no word to learn from; give some text.")
    return counts


def _alphabet(counts: Counter[str], limit: int) -> list[str]:
    """The most frequent characters, then those that continue a word, each in Unicode's order."""
    if limit < 1:
        raise CourseError(f"limit_alphabet is {limit}; keep at least one character.")
    characters: Counter[str] = Counter()
    continuing: set[str] = set()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
        continuing.update(word[1:])
    kept = sorted(sorted(characters, key=lambda character: (-characters[character], character))[:limit])
    return [*kept, *(CONTINUES + character for character in kept if character in continuing)]


def _check_special(names: Sequence[str], normalizer: Normalizer) -> None:
    face.check_special(names, normalizer.words)
    _require_unknown(names)


def _require_unknown(names: Iterable[str]) -> None:
    if UNKNOWN not in names:
        raise CourseError(f"WordPiece needs the special token {UNKNOWN!r}, for words it cannot cut.")


def _check_size(vocab_size: int, special_tokens: Sequence[str], tokens: Sequence[str]) -> None:
    if vocab_size < len(tokens):
        raise CourseError(
            f"A vocabulary of {vocab_size} is too small: the text's characters, at the start of words and "
            f"inside, and {len(special_tokens)} special tokens need at least {len(tokens)}."
        )
    if vocab_size > face.MAX_VOCAB:
        raise CourseError(f"A vocabulary of {vocab_size} is too large; ask for at most {face.MAX_VOCAB}.")


class _LikelihoodPairs(PairIndex):
    """Pairs by count(ab) / (count(a) · count(b)); otherwise as in `PairIndex`.

    A merge changes the score of every pair that one of its tokens is in, so all of these go into the heap
    anew, and an entry whose score is no longer true is thrown away when it comes up.
    """

    def __init__(self, words: list[str], counts: list[int], min_frequency: int):
        super().__init__(words, counts, min_frequency)
        self.token_counts: Counter[str] = Counter()
        for word, count in zip(words, counts, strict=True):
            for token in word:
                self.token_counts[token] += count
        self.pairs_of: defaultdict[str, set[str]] = defaultdict(set)  # token → the pairs it is in
        self.heap: list[tuple[float, str]] = []
        self._push(self.counts)

    def score(self, pair: str) -> float:
        return self.counts[pair] / (self.token_counts[pair[0]] * self.token_counts[pair[1]])

    def pop(self) -> str | None:
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            alive = pair in self.places and self.counts[pair] >= self.min_frequency
            if alive and self.score(pair) == -negative:
                return pair
        return None

    def _rank(self, changed: Iterable[str], pair: str, new: str, replaced: int) -> None:
        self.counts[pair] = 0
        self.token_counts[pair[0]] -= replaced
        self.token_counts[pair[1]] -= replaced
        self.token_counts[new] += replaced
        self._push({*changed, *self.pairs_of[pair[0]], *self.pairs_of[pair[1]], *self.pairs_of[new]})

    def _push(self, pairs: Iterable[str]) -> None:
        for pair in pairs:
            if self.counts[pair] >= self.min_frequency:
                self.pairs_of[pair[0]].add(pair)
                self.pairs_of[pair[1]].add(pair)
                heapq.heappush(self.heap, (-self.score(pair), pair))


def _learn(
    counts: Counter[str],
    tokens: list[str],
    vocab_size: int,
    min_frequency: int,
    pairs_of: type[PairIndex],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Append the tokens of the merges to `tokens`.

    A pair that makes a token which is there already is joined too, and adds none. Characters outside the
    alphabet are passed over, as the library does: their neighbours come to stand together.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    words, multiplicity = [], []
    for word, count in counts.items():
        parts = [ids.get(CONTINUES + c if i else c) for i, c in enumerate(word)]
        words.append("".join([chr(index) for index in parts if index is not None]))
        multiplicity.append(count)
    pairs = pairs_of(words, multiplicity, min_frequency)
    merges = 0
    while len(tokens) < vocab_size and (pair := pairs.pop()) is not None:
        joined = tokens[ord(pair[0])] + tokens[ord(pair[1])].removeprefix(CONTINUES)
        new = ids.setdefault(joined, len(tokens))
        if new == len(tokens):
            tokens.append(joined)
        pairs.merge(pair, chr(new))
        merges += 1
        if progress is not None and merges % 64 == 0:
            progress(len(tokens), vocab_size)


# ------------------------------------------------------------------------------------------ tokenizer.json


def _document(names: Sequence[str], special_tokens: Mapping[str, int], rules: Rules) -> dict[str, Any]:
    return {
        **face.COMMON,
        "added_tokens": face.added_tokens(special_tokens),
        "normalizer": {"type": "BertNormalizer", **asdict(rules.normalizer)},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _sentence_marks(special_tokens),
        "decoder": {"type": "WordPiece", "prefix": CONTINUES, "cleanup": rules.clean_up},
        "model": {
            "type": "WordPiece",
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": CONTINUES,
            "max_input_chars_per_word": rules.max_word,
            "vocab": {name: index for index, name in enumerate(names)},
        },
    }


def _sentence_marks(special_tokens: Mapping[str, int]) -> dict[str, Any] | None:
    """For `transformers`: [CLS] A [SEP], and [CLS] A [SEP] B [SEP]; the face's `encode` adds neither."""
    if CLS not in special_tokens or SEP not in special_tokens:
        return None

    def mark(name: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    first = [mark(CLS, 0), {"Sequence": {"id": "A", "type_id": 0}}, mark(SEP, 0)]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}, mark(SEP, 1)],
        "special_tokens": {
            name: {"id": name, "ids": [special_tokens[name]], "tokens": [name]} for name in (CLS, SEP)
        },
    }


def read(document: Mapping[str, Any], path: Path, implementation: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` that holds a WordPiece; `tokenizers.load` calls it.

    Raises:
        CourseError: it is damaged, or is none that the implementation can be.
    """
    vocab, special = _read_vocab(document, path)
    if implementation == "library":
        return LibraryWordPiece(face.read_library(path))
    return WordPieceTokenizer(vocab, special, _read_rules(document, special, path))


def _read_vocab(document: Mapping[str, Any], path: Path | str) -> tuple[dict[str, int], dict[str, int]]:
    model = face.field(document, "model", dict, path)
    vocab = face.field(model, "vocab", dict, path)
    special = face.read_special(document, path)
    for name, index in special.items():
        if vocab.get(name, index) != index:
            raise CourseError(f"{path} is damaged: the special token {name!r} has two ids.")
    face.check_ids({**vocab, **special}, path)
    unknown = model.get("unk_token", UNKNOWN)
    if not isinstance(unknown, str) or unknown not in vocab:
        raise CourseError(f"{path} is damaged: its unknown token {unknown!r} is not in its vocabulary.")
    return vocab, special


def _read_rules(document: Mapping[str, Any], special: Mapping[str, int], path: Path) -> Rules:
    """The rules of a BERT tokenizer; anything else only the library can be."""
    normalizer, decoder = face.part(document, "normalizer", path), face.part(document, "decoder", path)
    words, model = face.part(document, "pre_tokenizer", path), document["model"]
    options = {key: value for key, value in normalizer.items() if key != "type"}
    max_word = model.get("max_input_chars_per_word", MAX_WORD)
    bert = (
        normalizer.get("type") == "BertNormalizer"
        and set(options) <= set(Normalizer.__dataclass_fields__)
        and all(
            isinstance(value, bool) or (key == "strip_accents" and value is None)
            for key, value in options.items()
        )
        and words.get("type") == "BertPreTokenizer"
        and decoder.get("type") == "WordPiece"
        and decoder.get("prefix", CONTINUES) == CONTINUES
        and model.get("continuing_subword_prefix", CONTINUES) == CONTINUES
        and model.get("unk_token", UNKNOWN) == UNKNOWN
        and UNKNOWN in special
        and type(max_word) is int
        and max_word >= 0
        and not any(entry.get(option) for entry in document["added_tokens"] for option in face.MATCHING)
    )
    if not bert:
        raise CourseError(
            f"{path} treats text otherwise than BERT's own tokenizer; load it with implementation='library'."
        )
    return Rules(Normalizer(**options), max_word, bool(decoder.get("cleanup", True)))
