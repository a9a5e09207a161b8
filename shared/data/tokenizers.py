"""Text to token ids and back: the face of every tokenizer, byte-level BPE and characters.

Byte-level BPE is here from scratch and by the `tokenizers` library; `wordpiece` and `unigram` hold two more
kinds behind the same face, and `load` reads them all.

A byte-level BPE tokenizer works in three steps:

1. the text is cut into words by a regular expression (`PRETOKEN`); no token crosses a word's border;
2. a word becomes its UTF-8 bytes, so that 256 tokens cover every text there is;
3. the merges, learnt in order from a corpus, join neighbouring tokens, the earliest learnt first.

Sources: Sennrich, Haddow & Birch 2016, "Neural Machine Translation of Rare Words with Subword Units", §3.2
(the merges); Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", §2.2 (bytes as the
alphabet, words never merged across categories of characters).

`PRETOKEN` asks Unicode what a letter and a number is, and `regex` follows newer editions of Unicode than the
`tokenizers` library does: a text with a character that was added after the library's edition may be cut
differently. Every text comes back whole from either.
"""

import heapq
import json
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from shared.runtime import files
from shared.runtime.errors import CourseError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
# GPT-2's rule: English contractions, letters, numbers, other signs (each with one space before), white space.
PRETOKEN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
MAX_VOCAB = 0x110000  # the training writes ids as characters
CACHED_WORDS = 1 << 16  # words whose ids are kept, about 10 MB
CACHED_LENGTH = 64  # longer words rarely come twice


def _byte_characters() -> list[str]:
    """A printable character for each byte 0…255, as GPT-2 writes tokens in JSON.

    Printable Latin-1 stands for itself; the other 68 bytes get the characters from U+0100 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def _printable(token: bytes) -> str:
    return "".join([BYTE_CHARACTERS[byte] for byte in token])


def utf8(text: str, errors: str = "surrogateescape") -> bytes:
    """UTF-8; bytes that were no UTF-8 and came in by "surrogateescape" go back to what they were."""
    try:
        return text.encode("utf-8", errors)
    except UnicodeEncodeError as error:
        raise CourseError(
            f"The text has half a surrogate pair, U+{ord(text[error.start]):04X}, which UTF-8 cannot hold; "
            "decode it from its bytes again, with the right encoding."
        ) from error


class Tokenizer(ABC):
    """What every tokenizer of the course can do. Ids run from 0 to `vocab_size` − 1."""

    special_tokens: dict[str, int]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    @abstractmethod
    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text.

        What `decode` makes of them depends on the kind: byte-level BPE, and Unigram with byte fallback, give
        the text back exactly; characters, and Unigram without, do so for the characters they know; WordPiece
        gives back the words, without the capitals, accents and spaces that it took away.

        Args:
            text: any text.
            allow_special: read "<|endoftext|>" in the text as the special token; otherwise, as is right for
                text from outside, it is a word like any other.

        Raises:
            CourseError: a character cannot be encoded (characters without "<unk>"; half a surrogate pair).
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens read as plain text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD.

        Raises:
            CourseError: an id is not in 0…vocab_size − 1.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids: of a tokenizer that loses nothing, exactly as they went in.

        Raises:
            CourseError: an id is not in 0…vocab_size − 1.
        """
        return b"".join([self._tokens[index] for index in self._checked(ids)])

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one id stands for; of a special token, its name.

        Raises:
            CourseError: the id is not in 0…vocab_size − 1.
        """
        return self.decode_bytes([index])

    def save(self, path: Path | str) -> None:
        """Write the tokenizer as `tokenizer.json`, which `tokenizers` and `transformers` read too.

        Raises:
            CourseError: the file cannot be written.
        """
        text = json.dumps(self._document(), ensure_ascii=False, indent=2)
        files.atomic_write(path, text.encode("utf-8"))

    def fingerprint(self) -> str:
        """SHA-256 over all that decides the ids: equal for tokenizers that give the same ids."""
        return files.sha256_json(self._identity())

    @property
    @abstractmethod
    def _tokens(self) -> list[bytes]:
        """The bytes of each id."""

    @abstractmethod
    def _document(self) -> dict[str, Any]:
        """The content of `tokenizer.json`."""

    @abstractmethod
    def _identity(self) -> object:
        """Everything that decides the ids, JSON-able."""

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids, size = list(ids), self.vocab_size
        for index in ids:
            if not 0 <= index < size:
                raise CourseError(
                    f"Token id {int(index)} is not in this tokenizer's vocabulary (ids 0 to {size - 1}); "
                    "decode with the tokenizer that the ids were made with."
                )
        return ids


class _ByteLevelBPE(Tokenizer):
    """What both implementations of byte-level BPE know: the tokens, the merges and the special tokens."""

    def __init__(
        self,
        vocab: Mapping[bytes, int],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Mapping[str, int],
    ):
        self.vocab: dict[bytes, int] = dict(vocab)  # without the special tokens
        self.merges: list[tuple[bytes, bytes]] = list(merges)  # in the order in which they were learnt
        self.special_tokens = dict(special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of ids: special tokens, 256 bytes, one for each merge."""
        return len(self.vocab) + len(self.special_tokens)

    @cached_property
    def _tokens(self) -> list[bytes]:
        names = {index: name.encode() for name, index in self.special_tokens.items()}
        names.update((index, token) for token, index in self.vocab.items())
        return [names[index] for index in range(self.vocab_size)]

    def _identity(self) -> object:
        merges = [[_printable(left), _printable(right)] for left, right in self.merges]
        vocab = {_printable(token): index for token, index in self.vocab.items()}
        return {"type": "byte-level BPE", "vocab": vocab, "merges": merges, "special": self.special_tokens}


class BPETokenizer(_ByteLevelBPE):
    """Byte-level BPE, from scratch; the same merges and ids as `LibraryTokenizer` on the same texts.

    Args:
        vocab: bytes of each ordinary token → id; with `special_tokens`, the ids are 0…vocab_size − 1.
        merges: pairs of tokens in the order in which they were learnt.
        special_tokens: name → id.
    """

    def __init__(
        self,
        vocab: Mapping[bytes, int],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Mapping[str, int],
    ):
        super().__init__(vocab, merges, special_tokens)
        # (left id, right id) → (rank, id of the two together)
        self._ranks = {
            (self.vocab[left], self.vocab[right]): (rank, self.vocab[left + right])
            for rank, (left, right) in enumerate(self.merges)
        }
        self._byte_ids = [self.vocab[bytes([byte])] for byte in range(256)]
        self._cache: dict[str, list[int]] = {}
        self._special = special_pattern(self.special_tokens)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        progress: Callable[[int, int], None] | None = None,
    ) -> "BPETokenizer":
        """Learn merges until the vocabulary is full or no pair is left.

        Args:
            texts: the corpus; a word never crosses from one text into the next.
            vocab_size: special tokens + 256 bytes + merges.
            special_tokens: get the ids from 0 on.
            progress: called now and then with (tokens so far, `vocab_size`).

        Raises:
            CourseError: `vocab_size` is too small or too large, or a special token could be learnt as text.
        """
        _check_request(vocab_size, special_tokens)
        tokens = [*[name.encode() for name in special_tokens], *_alphabet()]
        merges = _learn_merges(count_words(texts), tokens, len(special_tokens), vocab_size, progress)
        special = {name: index for index, name in enumerate(special_tokens)}
        vocab = {token: index for index, token in enumerate(tokens) if index >= len(special)}
        return cls(vocab, merges, special)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`.

        Any bytes can be encoded, through `data.decode("utf-8", "surrogateescape")`.
        """
        if not allow_special:
            return self._encode_plain(text)
        return encode_special(text, self._special, self.special_tokens, self._encode_plain)

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        cache = self._cache
        for word in PRETOKEN.findall(text):
            found = cache.get(word)
            if found is None:
                found = merge_ids([self._byte_ids[byte] for byte in utf8(word)], self._ranks)
                if len(cache) < CACHED_WORDS and len(word) <= CACHED_LENGTH:
                    cache[word] = found
            ids += found
        return ids

    def _document(self) -> dict[str, Any]:
        return _bpe_document(self)


class LibraryEncoding(Tokenizer):
    """What the `tokenizers` library (in Rust) does for each kind: encode, decode, write its document."""

    def _bind(self, text: str) -> None:
        """Take the library's tokenizer with the document `text`."""
        from tokenizers import Tokenizer as RustTokenizer

        self._plain = RustTokenizer.from_str(text)
        self._plain.encode_special_tokens = True  # the library's word for: they are text like any other
        self._with_special = RustTokenizer.from_str(text)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`."""
        tokenizer, text = self._with_special if allow_special else self._plain, self._whole(text)
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            raise _cannot_encode(error) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on as many threads as `RAYON_NUM_THREADS` allows."""
        texts = [self._whole(text) for text in texts]
        try:
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            raise _cannot_encode(error) from error
        return [encoding.ids for encoding in encodings]

    @staticmethod
    def _whole(text: str) -> str:
        """`text`, if the library can take it: it has no way for bytes that are no UTF-8."""
        if not text.isascii():
            utf8(text, errors="strict")
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; see `Tokenizer.decode`."""
        return self._plain.decode([int(index) for index in self._checked(ids)], skip_special_tokens=False)

    def _document(self) -> dict[str, Any]:
        return json.loads(self._plain.to_str())


def _cannot_encode(error: Exception) -> CourseError:
    return CourseError(
        f"The tokenizers library cannot encode this text: {error}; use a tokenizer that has a token for it."
    )


class LibraryTokenizer(LibraryEncoding, _ByteLevelBPE):
    """The `tokenizers` library's byte-level BPE behind the same face, whatever its words.

    Args:
        tokenizer: a `tokenizers.Tokenizer` whose model is a byte-level BPE.
    """

    def __init__(self, tokenizer: Any):
        text = tokenizer.to_str()
        super().__init__(*_read_tables(json.loads(text), "the tokenizer"))
        self._bind(text)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
    ) -> "LibraryTokenizer":
        """Learn merges with the library; arguments and errors as in `BPETokenizer.train`."""
        from tokenizers import Tokenizer as RustTokenizer
        from tokenizers import decoders, models, pre_tokenizers, trainers

        _check_request(vocab_size, special_tokens)
        tokenizer = RustTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer=trainer)
        return cls(tokenizer)


class CharTokenizer(Tokenizer):
    """One token a character, after the special tokens. With "<unk>" among these, any text can be encoded.

    Args:
        characters: in the order of their ids.
        special_tokens: names; they get the ids from 0 on.
    """

    def __init__(self, characters: Sequence[str], special_tokens: Sequence[str] = ()):
        names = [*special_tokens, *characters]
        if len(set(names)) != len(names):
            raise ValueError("a character or special token is given twice")
        self.special_tokens = {name: index for index, name in enumerate(special_tokens)}
        self.vocab = {character: index for index, character in enumerate(characters, len(special_tokens))}
        self._names = names
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = regex.compile("|".join([*map(regex.escape, longest_first), r"[\s\S]"]))

    @classmethod
    def from_text(cls, text: str, special_tokens: Sequence[str] = ()) -> "CharTokenizer":
        """A tokenizer for the characters of `text`, in Unicode order."""
        utf8(text, errors="strict")
        return cls(sorted(set(text)), special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of ids: special tokens and characters."""
        return len(self._names)

    @cached_property
    def _tokens(self) -> list[bytes]:
        return [name.encode() for name in self._names]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`."""
        if allow_special:
            pieces = self._special.findall(text)
            return [
                self.special_tokens[piece] if piece in self.special_tokens else self._id(piece)
                for piece in pieces
            ]
        try:
            return [self.vocab[character] for character in text]
        except KeyError:
            return [self._id(character) for character in text]

    def _id(self, character: str) -> int:
        index = self.vocab.get(character, self.special_tokens.get(UNKNOWN))
        if index is None:
            raise CourseError(
                f"The character {character!r} is not among the {len(self.vocab)} that this tokenizer knows; "
                "take it out of the text, or use a byte-level tokenizer."
            )
        return index

    def _document(self) -> dict[str, Any]:
        return {
            **COMMON,
            "added_tokens": added_tokens(self.special_tokens),
            "pre_tokenizer": _EACH_CHARACTER,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "WordLevel",
                "vocab": {name: index for index, name in enumerate(self._names)},
                "unk_token": UNKNOWN,
            },
        }

    def _identity(self) -> object:
        return {"type": "characters", "names": self._names, "special": self.special_tokens}


# ------------------------------------------------------------------------------------------------ training


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word of `PRETOKEN` comes in the texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(PRETOKEN.findall(text))
    return counts


def _alphabet() -> list[bytes]:
    """The 256 bytes in the library's order: that of the characters that stand for them in JSON."""
    return [bytes([byte]) for byte in sorted(range(256), key=BYTE_CHARACTERS.__getitem__)]


def _check_request(vocab_size: int, special_tokens: Sequence[str]) -> None:
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise CourseError(
            f"A vocabulary of {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens "
            f"need at least {least}."
        )
    if vocab_size > MAX_VOCAB:
        raise CourseError(f"A vocabulary of {vocab_size} is too large; ask for at most {MAX_VOCAB}.")
    check_special(special_tokens, PRETOKEN.findall)


def check_special(names: Sequence[str], words: Callable[[str], Sequence[str]]) -> None:
    """Refuse a special token that is named twice or that `words` may leave whole when it cuts a text.

    Raises:
        CourseError: with the name.
    """
    if len(set(names)) != len(names):
        raise CourseError("A special token is given twice; name each once.")
    for name in names:
        if len(words(name)) < 2:
            raise CourseError(
                f"The special token {name!r} is a word that text may hold; give it marks, as in '<|{name}|>'."
            )


def special_pattern(names: Iterable[str]) -> regex.Pattern[str] | None:
    """What finds special tokens in a text, the longest name first; None where there are none."""
    ordered = sorted(names, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, ordered))) if ordered else None


def encode_special(
    text: str,
    pattern: regex.Pattern[str] | None,
    special_tokens: Mapping[str, int],
    encode: Callable[[str], list[int]],
) -> list[int]:
    """Token ids of a text whose special tokens are read as such; `encode` does what lies between them."""
    ids: list[int] = []
    end = 0
    for match in pattern.finditer(text) if pattern is not None else ():
        ids += encode(text[end : match.start()])
        ids.append(special_tokens[match.group()])
        end = match.end()
    return ids + encode(text[end:])


class PairIndex:
    """How often each pair of neighbouring tokens occurs, and in which words: the incremental index.

    `pop` and `merge` in turn learn one merge: the most frequent pair, replaced by the new token everywhere.

    Token ids are written as characters, `chr(id)`: a word is a string, a pair is a string of two, and
    Python's own string methods, which run in C, find and replace pairs.
    """

    def __init__(self, words: list[str], counts: list[int], min_frequency: int = 1):
        self.words, self.word_counts = words, counts
        self.min_frequency = max(min_frequency, 1)  # a pair that comes less often is never the next
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.places: defaultdict[str, list[int]] = defaultdict(
            list
        )  # may name a word that lost the pair, or twice
        for index, (word, count) in enumerate(zip(words, counts, strict=True)):
            for position in range(len(word) - 1):
                pair = word[position : position + 2]
                self.counts[pair] += count
                self.places[pair].append(index)
        # Most frequent first, then smallest ids. Entries whose count has changed since are put right when
        # they come up, which is cheaper than finding them in the heap.
        self.heap = [(-count, pair) for pair, count in self.counts.items() if count >= min_frequency]
        heapq.heapify(self.heap)

    def pop(self) -> str | None:
        """The most frequent pair; of several, the one with the smallest ids. None when no pair is left."""
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            if pair not in self.places:  # merged already
                continue
            count = self.counts[pair]
            if count == -negative:
                return pair
            if count >= self.min_frequency:
                heapq.heappush(self.heap, (-count, pair))
        return None

    def merge(self, pair: str, new: str) -> None:
        """Replace `pair` by `new` in all words that hold it, and count its neighbours anew."""
        before: defaultdict[str, list[int]] = defaultdict(list)  # neighbour → the words where it stands so
        after: defaultdict[str, list[int]] = defaultdict(list)
        words, replaced = self.words, 0
        for index in self.places.pop(pair):
            parts = words[index].split(pair)
            if len(parts) == 1:
                continue
            words[index] = new.join(parts)
            last = len(parts) - 1
            replaced += last * self.word_counts[index]
            for number in range(last):  # an occurrence lies between parts `number` and `number` + 1
                if neighbour := parts[number][-1:] or (new if number else ""):
                    before[neighbour].append(index)
                if neighbour := parts[number + 1][:1] or (pair[0] if number + 1 < last else ""):
                    after[neighbour].append(index)
        changed = set()
        for neighbour, indices in before.items():
            changed.add(self._move(neighbour + pair[0], neighbour + new, indices))
        for neighbour, indices in after.items():
            changed.add(self._move(pair[1] + neighbour, new + neighbour, indices))
        self._rank(changed, pair, new, replaced)

    def _rank(self, changed: Iterable[str], pair: str, new: str, replaced: int) -> None:
        """Put the pairs whose counts changed into the heap, after `pair` became `new`, `replaced` times."""
        for other in changed:
            if self.counts[other] >= self.min_frequency:
                heapq.heappush(self.heap, (-self.counts[other], other))

    def _move(self, old: str, new: str, indices: list[int]) -> str:
        occurrences = sum([self.word_counts[index] for index in indices])
        self.counts[old] -= occurrences
        self.counts[new] += occurrences
        self.places[new] += indices
        return new


def _learn_merges(
    counts: Counter[str],
    tokens: list[bytes],
    num_special: int,
    vocab_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[bytes, bytes]]:
    """Learn merges, append their tokens to `tokens`, return the pairs in order.

    A pair that makes a token which is there already ("ab" + "c" after "a" + "bc") is a merge with no new id.
    """
    ids = {token: index for index, token in enumerate(tokens) if index >= num_special}
    as_ids = {byte: chr(ids[bytes([byte])]) for byte in range(256)}
    words = [utf8(word).decode("latin-1").translate(as_ids) for word in counts]
    pairs = PairIndex(words, list(counts.values()))
    merges = []
    while len(tokens) < vocab_size and (pair := pairs.pop()) is not None:
        left, right = tokens[ord(pair[0])], tokens[ord(pair[1])]
        merges.append((left, right))
        new = ids.setdefault(left + right, len(tokens))
        if new == len(tokens):
            tokens.append(left + right)
        pairs.merge(pair, chr(new))
        if progress is not None and len(merges) % 64 == 0:
            progress(len(tokens), vocab_size)
    return merges


def merge_ids(ids: list[int], ranks: Mapping[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Apply merges to one word, the earliest learnt first and of these the leftmost first; O(n log n).

    Args:
        ids: the word's tokens, one for each byte.
        ranks: (left id, right id) → (rank, id of the two together).

    Returns:
        The word's tokens when no merge is left to apply.
    """
    ids, n = list(ids), len(ids)
    following = list(range(1, n + 1))  # a linked list: merged tokens leave the chain
    previous = list(range(-1, n - 1))
    heap = [(ranks[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = following[i]
        found = ranks.get((ids[i], ids[j])) if j < n else None
        if found is None or found[0] != rank:  # one of the two has been merged since
            continue
        ids[i], ids[j] = found[1], -1
        following[i] = k = following[j]
        if k < n:
            previous[k] = i
            if (ids[i], ids[k]) in ranks:
                heapq.heappush(heap, (ranks[ids[i], ids[k]][0], i))
        h = previous[i]
        if h >= 0 and (ids[h], ids[i]) in ranks:
            heapq.heappush(heap, (ranks[ids[h], ids[i]][0], h))
    return [index for index in ids if index >= 0]


# ------------------------------------------------------------------------------------------ tokenizer.json

COMMON = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None}
_BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
_EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
MATCHING = {"single_word": False, "lstrip": False, "rstrip": False}


def load(path: Path | str, implementation: str = "library") -> Tokenizer:
    """Read `tokenizer.json`: byte-level BPE, WordPiece, Unigram or characters, whoever wrote it.

    Args:
        path: the file.
        implementation: "library" (fast) or "scratch"; characters have one only.

    Raises:
        CourseError: the file is missing or damaged, or holds a tokenizer that the implementation cannot be.
    """
    if implementation not in ("library", "scratch"):
        raise ValueError(f"implementation {implementation!r} is neither 'library' nor 'scratch'")
    path = Path(path)
    document = _read_json(path)
    kind = field(document, "model", dict, path).get("type", "BPE")
    if kind == "WordLevel":
        return _read_characters(document, path)
    if kind in ("WordPiece", "Unigram"):  # they build on this module
        from shared.data import unigram, wordpiece

        return (wordpiece if kind == "WordPiece" else unigram).read(document, path, implementation)
    if kind != "BPE":
        raise CourseError(
            f"{path} holds a {kind} tokenizer; the course reads byte-level BPE, WordPiece, Unigram and "
            "characters."
        )
    tables = _read_tables(document, path)
    if implementation == "scratch":
        _require_gpt2_words(document, path)
        return BPETokenizer(*tables)
    return LibraryTokenizer(read_library(path))


def read_library(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file.

    Raises:
        CourseError: the library cannot read it.
    """
    from tokenizers import Tokenizer as RustTokenizer

    try:
        return RustTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CourseError(f"{path} cannot be read by the tokenizers library: {error}.") from error


def _bpe_document(tokenizer: _ByteLevelBPE) -> dict[str, Any]:
    vocab = {**tokenizer.special_tokens, **{_printable(token): i for token, i in tokenizer.vocab.items()}}
    return {
        **COMMON,
        "added_tokens": added_tokens(tokenizer.special_tokens),
        "pre_tokenizer": {**_BYTE_LEVEL, "add_prefix_space": False},
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},  # the library's default; decoding ignores it
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [[_printable(left), _printable(right)] for left, right in tokenizer.merges],
        },
    }


def added_tokens(special_tokens: Mapping[str, int]) -> list[dict[str, Any]]:
    """Special tokens as `tokenizer.json` lists them: found in the text as it is, before any change to it."""
    rest = {**MATCHING, "normalized": False, "special": True}
    return [{"id": index, "content": name, **rest} for name, index in special_tokens.items()]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CourseError(f"Cannot read the tokenizer {path}: {error.strerror}; check the path.") from error
    except ValueError as error:
        raise CourseError(f"{path} is not a tokenizer.json: it is not valid JSON ({error}).") from error
    if not isinstance(document, dict):
        raise CourseError(f"{path} is not a tokenizer.json: its outermost value is not an object.")
    return document


def field(holder: Mapping[str, Any], key: str, kind: type, path: Path | str) -> Any:
    """`holder[key]`, if it is a `kind`; CourseError naming the file `path` if not."""
    value = holder.get(key)
    if not isinstance(value, kind):
        raise CourseError(f"{path} is damaged: {key!r} is missing or is not a {kind.__name__}.")
    return value


def part(document: Mapping[str, Any], key: str, path: Path | str) -> dict[str, Any]:
    """A part that a `tokenizer.json` may leave out: `document[key]`, or {} for null."""
    return {} if document.get(key) is None else field(document, key, dict, path)


def read_special(document: Mapping[str, Any], path: Path | str) -> dict[str, int]:
    """Names and ids of the special tokens in a `tokenizer.json`."""
    special = {}
    for entry in field(document, "added_tokens", list, path):
        if not isinstance(entry, dict):
            raise CourseError(f"{path} is damaged: an entry of 'added_tokens' is not an object.")
        special[field(entry, "content", str, path)] = field(entry, "id", int, path)
    return special


def _read_tables(
    document: Mapping[str, Any], path: Path | str
) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]], dict[str, int]]:
    """Vocabulary, merges and special tokens of a byte-level BPE, checked against each other."""
    model = field(document, "model", dict, path)
    special = read_special(document, path)
    written: dict[str, int] = field(model, "vocab", dict, path)
    check_ids({**written, **special}, path)
    try:
        vocab = {_to_bytes(token): index for token, index in written.items() if token not in special}
    except KeyError as error:
        raise CourseError(
            f"{path} is not a byte-level tokenizer: the character {error} of a token stands for no byte."
        ) from error
    merges = [_read_merge(entry, vocab, path) for entry in field(model, "merges", list, path)]
    missing = next((byte for byte in range(256) if bytes([byte]) not in vocab), None)
    if missing is not None:
        raise CourseError(f"{path} is not a byte-level tokenizer: it has no token for byte {missing}.")
    return vocab, merges, special


def _to_bytes(token: str) -> bytes:
    return bytes([CHARACTER_BYTES[character] for character in token])


def check_ids(names: Mapping[str, object], path: Path | str) -> None:
    """Refuse tokens whose ids are not 0, 1, 2 … up to their number less one, each once."""
    if any(type(index) is not int for index in names.values()):
        raise CourseError(f"{path} is damaged: a token's id is not a whole number.")
    for name in names:
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise CourseError(f"{path} is damaged: its token {name!r} holds half a surrogate pair.")
    if sorted(names.values()) != list(range(len(names))):
        raise CourseError(
            f"{path} is damaged: its {len(names)} tokens do not have the ids 0 to {len(names) - 1}."
        )


def _read_merge(entry: object, vocab: Mapping[bytes, int], path: Path | str) -> tuple[bytes, bytes]:
    pair = entry.split(" ") if isinstance(entry, str) else entry  # files before 2024 have "a b"
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
        try:
            left, right = _to_bytes(pair[0]), _to_bytes(pair[1])
        except KeyError:
            left = right = b""
        if left in vocab and right in vocab and left + right in vocab:
            return left, right
    raise CourseError(f"{path} is damaged: the merge {entry!r} is not made of tokens in its vocabulary.")


def _require_gpt2_words(document: Mapping[str, Any], path: Path) -> None:
    words = part(document, "pre_tokenizer", path)
    gpt2 = (
        words.get("type") == "ByteLevel"
        and not words.get("add_prefix_space")
        and words.get("use_regex", True)
    )
    plain = document.get("normalizer") is None and not any(
        entry.get(option) for entry in document["added_tokens"] for option in MATCHING
    )
    model = document["model"]
    if not (gpt2 and plain) or model.get("dropout") or model.get("ignore_merges"):
        raise CourseError(
            f"{path} cuts text into words otherwise than GPT-2; load it with implementation='library'."
        )


def _read_characters(document: Mapping[str, Any], path: Path) -> CharTokenizer:
    special = read_special(document, path)
    names = field(field(document, "model", dict, path), "vocab", dict, path)
    check_ids(names, path)
    ordered = sorted(names, key=names.__getitem__)
    characters = ordered[len(special) :]
    if document.get("pre_tokenizer") != _EACH_CHARACTER or any(len(name) != 1 for name in characters):
        raise CourseError(
            f"{path} holds a word-level tokenizer; the course reads byte-level BPE and characters."
        )
    if {name: index for index, name in enumerate(ordered[: len(special)])} != special:
        raise CourseError(f"{path} is damaged: its special tokens do not have the first ids.")
    return CharTokenizer(characters, ordered[: len(special)])
