"""Unigram tokenization, from scratch and by the `tokenizers` library, behind the face of `tokenizers`.

A unigram language model gives every piece of its vocabulary a probability; a segmentation of a word is as
probable as the product of its pieces, a word as the sum over its segmentations.

- Encoding takes the most probable segmentation (Viterbi), or, for subword regularisation, draws one.
- Training starts from many frequent substrings, fits their probabilities by EM, and drops, round by round,
  those whose loss costs the text's likelihood least, until the vocabulary has the size asked for.

The words are those of byte-level BPE (`tokenizers.PRETOKEN`), a space being the first character of a word; a
space stays a space in the pieces, where SentencePiece writes "▁" and so loses the difference. No word holds
marks and letters, so that neither a special token nor the name of a byte piece can come out of plain text.

A character that is no piece is, with byte fallback, written as the pieces "<0x00>" … "<0xFF>" of its UTF-8
bytes: any text can then be encoded, and comes back exactly. Without, a run of such characters becomes one
"<unk>", and is lost.

Sources: Kudo 2018, "Subword Regularization", §3.2 (model, EM, pruning) and §3.1 with eq. 7 (sampling); Kudo &
Richardson 2018, "SentencePiece"; Liang & Klein 2007, "Structured Bayesian Nonparametric Models with
Variational Inference" (the digamma in the M step, which makes rare pieces rarer).

Departures from SentencePiece and the library's trainer: the substrings are counted as often as their words
come, not once for each different word; pruning goes on by the loss to the very size asked for, where they
stop 10 % above and then take the most probable; a rare character is left out rather than kept at any cost.
"""

import json
import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shared.data import tokenizers as face
from shared.data.tokenizers import END_OF_TEXT, PRETOKEN, UNKNOWN, LibraryEncoding, Tokenizer
from shared.runtime.errors import CourseError

SPECIAL_TOKENS = (END_OF_TEXT, UNKNOWN)
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
UNKNOWN_PENALTY = 10.0  # nats; an unknown character costs that much more than the rarest piece
LONGEST = 16  # characters of a piece
MAX_WORDS = 100_000  # most frequent words that are trained on
MAX_WORD = 64  # characters; in training a longer word is cut
SHRINK = 0.75  # of the pieces stay in each round of pruning
EM_STEPS = 2  # in each round
RARE = 0.5  # expected occurrences; a piece with fewer is dropped


class _Unigram(Tokenizer):
    """What both implementations know: the pieces with their scores, and the special tokens.

    Args:
        pieces: (piece, natural logarithm of its probability), in the order of the ids from 0 on.
        special_tokens: name → id; names that are no pieces have the ids after those.
        byte_fallback: whether unknown characters become byte pieces.
    """

    def __init__(
        self, pieces: Sequence[tuple[str, float]], special_tokens: Mapping[str, int], byte_fallback: bool
    ):
        self.pieces = list(pieces)
        self.special_tokens = dict(special_tokens)
        self.byte_fallback = byte_fallback

    @property
    def vocab_size(self) -> int:
        """Number of ids: special tokens, with byte fallback 256 bytes, the pieces learnt."""
        return len(self._names)

    @cached_property
    def _names(self) -> list[str]:
        names = [piece for piece, _ in self.pieces]
        beyond = {index: name for name, index in self.special_tokens.items() if index >= len(names)}
        return names + [beyond[index] for index in sorted(beyond)]

    @cached_property
    def _tokens(self) -> list[bytes]:
        names = BYTE_PIECES if self.byte_fallback else ()
        bytes_of = {name: bytes([byte]) for byte, name in enumerate(names)}
        return [bytes_of.get(name) or name.encode("utf-8") for name in self._names]

    def _identity(self) -> object:
        document = self._document()
        keys = ("normalizer", "pre_tokenizer", "model")
        return {**{key: document[key] for key in keys}, "special": self.special_tokens}


class UnigramTokenizer(_Unigram):
    """Unigram from scratch; the same ids as `LibraryUnigram` for the same pieces and scores.

    Args:
        pieces: (piece, natural logarithm of its probability), in the order of the ids; the special tokens,
            and with byte fallback the byte pieces, are among them.
        special_tokens: name → id.
        unknown: id of the piece for what no piece covers.
        byte_fallback: write unknown characters as bytes.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[str, float]],
        special_tokens: Mapping[str, int],
        unknown: int,
        byte_fallback: bool = True,
    ):
        super().__init__(pieces, special_tokens, byte_fallback)
        self.unknown = unknown
        self._scored = {piece: (score, index) for index, (piece, score) in enumerate(self.pieces)}
        self._longest = max(map(len, self._scored))
        self._unknown_score = min(score for _, score in self.pieces) - UNKNOWN_PENALTY
        self._byte_ids = [self._scored[name][1] for name in BYTE_PIECES] if byte_fallback else None
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
        byte_fallback: bool = True,
        limit_alphabet: int = 1000,
    ) -> "UnigramTokenizer":
        """Fit pieces to the texts by EM and prune them to the size asked for.

        Args:
            texts: the corpus; a word never crosses from one text into the next.
            vocab_size: special tokens + 256 bytes with byte fallback + pieces learnt. A small text may have
                fewer.
            special_tokens: get the ids from 0 on; "<unk>" must be among them.
            progress: called in each round with (how far it is, `vocab_size`).
            byte_fallback: write unknown characters as bytes, else as "<unk>".
            limit_alphabet: most frequent characters that are pieces; the others are unknown.

        Raises:
            CourseError: the texts hold no word; `vocab_size` is too small for the alphabet; a special token
                could be learnt as text, or "<unk>" is missing.
        """
        _check_special(special_tokens)
        counts = _count_words(texts)
        reserved = len(special_tokens) + (256 if byte_fallback else 0)
        alphabet = _alphabet(counts, limit_alphabet)
        _check_size(vocab_size, reserved, len(alphabet))
        words = _training_words(counts, set(alphabet))

        def report(share: float) -> None:
            if progress is not None:
                progress(int(share * vocab_size), vocab_size)

        learnt = _fit(words, alphabet, vocab_size - reserved, report)
        return cls(*_assemble(learnt, special_tokens, byte_fallback))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of the most probable segmentation; see `Tokenizer.encode`.

        Of equally probable segmentations the one whose last piece is longest, as in the library. With byte
        fallback any bytes can be encoded, through `data.decode("utf-8", "surrogateescape")`.
        """
        if not allow_special:
            return self._encode_plain(text)
        return face.encode_special(text, self._special, self.special_tokens, self._encode_plain)

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        cache = self._cache
        for word in PRETOKEN.findall(text):
            found = cache.get(word)
            if found is None:
                found = self._ids_of(word, self._viterbi(word))
                if len(cache) < face.CACHED_WORDS and len(word) <= face.CACHED_LENGTH:
                    cache[word] = found
            ids += found
        return ids

    def sample(self, text: str, generator: random.Random, alpha: float = 0.2) -> list[int]:
        """Token ids of a segmentation drawn at random, for subword regularisation.

        A segmentation x of a word is drawn with probability P(x)^alpha / Σ P(x')^alpha, from all of them, by
        forward filtering and backward sampling (Kudo 2018, eq. 7 with l → ∞).

        Args:
            text: special tokens in it are plain text.
            generator: `random.Random(seed)`; the same seed gives the same ids.
            alpha: 0 draws all segmentations alike; the greater, the surer the most probable one.

        Raises:
            CourseError: `alpha` is negative or no number.
        """
        if not 0 <= alpha < math.inf:
            raise CourseError(f"alpha is {alpha}; give a number that is not negative, such as 0.2.")
        ids: list[int] = []
        for word in PRETOKEN.findall(text):
            edges, total = self._forward(word, alpha)
            path, position = [], len(word)
            while position:
                before = edges[position]
                weights = [
                    math.exp(total[start] + alpha * score - total[position]) for start, score, _ in before
                ]
                start, _, index = generator.choices(before, weights)[0]
                path.append((start, position, index))
                position = start
            ids += self._ids_of(word, path[::-1])
        return ids

    def log_probability(self, text: str) -> float:
        """Natural logarithm of the text's probability: over its words, of the sum over all segmentations.

        An unknown character counts as `UNKNOWN_PENALTY` nats below the rarest piece.
        """
        return sum(self._forward(word, 1.0)[1][-1] for word in PRETOKEN.findall(text))

    def _edges(self, word: str) -> Iterator[tuple[int, int, float, int]]:
        """All pieces in a word: (start, end, score, id), by start, then by end.

        A character that is no piece is an edge of its own, with the id of the unknown.
        """
        length, longest, scored = len(word), self._longest, self._scored
        for start in range(length):
            single = False
            for end in range(start + 1, min(length, start + longest) + 1):
                found = scored.get(word[start:end])
                if found is not None:
                    single = single or end == start + 1
                    yield start, end, *found
            if not single:
                yield start, start + 1, self._unknown_score, self.unknown

    def _viterbi(self, word: str) -> list[tuple[int, int, int]]:
        """The most probable segmentation: (start, end, id) of each piece."""
        best = [0.0] + [-math.inf] * len(word)  # log-probability of the best way to each position
        back = [(0, 0)] * (len(word) + 1)  # its last piece: start and id
        for start, end, score, index in self._edges(word):
            if best[start] + score > best[end]:
                best[end] = best[start] + score
                back[end] = (start, index)
        path, position = [], len(word)
        while position:
            start, index = back[position]
            path.append((start, position, index))
            position = start
        return path[::-1]

    def _forward(self, word: str, alpha: float) -> tuple[list[list[tuple[int, float, int]]], list[float]]:
        """For each position the pieces that end there, (start, score, id), and log Σ P^alpha of its ways."""
        edges: list[list[tuple[int, float, int]]] = [[] for _ in range(len(word) + 1)]
        for start, end, score, index in self._edges(word):
            edges[end].append((start, score, index))
        total = [0.0]
        for before in edges[1:]:
            terms = [total[start] + alpha * score for start, score, _ in before]
            top = max(terms)
            total.append(top + math.log(sum([math.exp(term - top) for term in terms])))
        return edges, total

    def _ids_of(self, word: str, path: Sequence[tuple[int, int, int]]) -> list[int]:
        """Ids of a segmentation; a run of unknown characters becomes one "<unk>", or its bytes."""
        ids: list[int] = []
        in_run = False
        for start, end, index in path:
            if index != self.unknown:
                ids.append(index)
                in_run = False
                continue
            data = face.utf8(word[start:end])
            if self._byte_ids is not None:
                ids += [self._byte_ids[byte] for byte in data]
            elif not in_run:
                ids.append(index)
            in_run = True
        return ids

    def _document(self) -> dict[str, Any]:
        return _document(self.pieces, self.special_tokens, self.unknown, self.byte_fallback)


class LibraryUnigram(LibraryEncoding, _Unigram):
    """The `tokenizers` library's Unigram behind the same face, whatever its words.

    Args:
        tokenizer: a `tokenizers.Tokenizer` whose model is a Unigram.
    """

    def __init__(self, tokenizer: Any):
        text = tokenizer.to_str()
        document = json.loads(text)
        pieces, special, _, byte_fallback = _read_pieces(document, "the tokenizer")
        super().__init__(pieces, special, byte_fallback)
        self._plain_pieces = document.get("decoder") == _DECODER  # the pieces are the text's own bytes
        self._bind(text)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        *,
        byte_fallback: bool = True,
    ) -> "LibraryUnigram":
        """Learn pieces with the library, on the same words; see `UnigramTokenizer.train`.

        The library keeps every character of the texts as a piece.
        """
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as RustTokenizer

        _check_special(special_tokens)
        texts = list(texts)
        reserved = len(special_tokens) + (256 if byte_fallback else 0)
        _check_size(vocab_size, reserved, len(_alphabet(_count_words(texts), face.MAX_VOCAB)))
        tokenizer = RustTokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PRETOKEN.pattern), "isolated")
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size - reserved + 1,  # it counts "<unk>"
            unk_token=UNKNOWN,
            special_tokens=[UNKNOWN],
            max_piece_length=LONGEST,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer=trainer)
        vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
        learnt = [(piece, score) for piece, score in vocab if piece != UNKNOWN]
        return cls(
            RustTokenizer.from_str(json.dumps(_document(*_assemble(learnt, special_tokens, byte_fallback))))
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; see `Tokenizer.decode`."""
        if self._plain_pieces:  # the library would give up a whole run of bytes for one that is no UTF-8
            return Tokenizer.decode(self, ids)
        return super().decode(ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids; see `Tokenizer.decode_bytes`."""
        return super().decode_bytes(ids) if self._plain_pieces else self.decode(ids).encode("utf-8")

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one id stands for; see `Tokenizer.token_bytes`."""
        return self._tokens[self._checked([index])[0]]


# ------------------------------------------------------------------------------------------------ training


def _check_special(names: Sequence[str]) -> None:
    face.check_special(names, PRETOKEN.findall)
    if UNKNOWN not in names:
        raise CourseError(f"Unigram needs the special token {UNKNOWN!r}, for characters it does not know.")


def _count_words(texts: Iterable[str]) -> Counter[str]:
    counts = face.count_words(texts)
    if not counts:
        raise CourseError("The texts hold no word to learn from; give some text.")
    for word in counts:
        if not word.isascii():
            face.utf8(word, errors="strict")
    return counts


def _character_counts(words: Counter[str]) -> Counter[str]:
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    return characters


def _alphabet(counts: Counter[str], limit: int) -> list[str]:
    """The most frequent characters; of equally frequent ones, the first in Unicode's order."""
    if limit < 1:
        raise CourseError(f"limit_alphabet is {limit}; keep at least one character.")
    characters = _character_counts(counts)
    return sorted(characters, key=lambda character: (-characters[character], character))[:limit]


def _check_size(vocab_size: int, reserved: int, alphabet: int) -> None:
    if vocab_size < reserved + alphabet:
        raise CourseError(
            f"A vocabulary of {vocab_size} is too small: {reserved} special tokens and bytes, and the text's "
            f"{alphabet} characters, need at least {reserved + alphabet}."
        )
    if vocab_size > face.MAX_VOCAB:
        raise CourseError(f"A vocabulary of {vocab_size} is too large; ask for at most {face.MAX_VOCAB}.")


def _training_words(counts: Counter[str], alphabet: set[str]) -> Counter[str]:
    """The most frequent words; where a character is not in the alphabet, they are cut, and long ones too."""
    words: Counter[str] = Counter()
    for word, count in counts.most_common(MAX_WORDS):
        for known, part in groupby(word, alphabet.__contains__):
            text = "".join(part) if known else ""
            for start in range(0, len(text), MAX_WORD):
                words[text[start : start + MAX_WORD]] += count
    return words


def _seeds(words: Counter[str]) -> Counter[str]:
    """Substrings of two characters and more that come at least twice, and how often.

    A substring that always stands in the same longer one is left out: the longer one says it all.
    """
    seeds: Counter[str] = Counter()
    shorter: Counter[str] = Counter()
    for length in range(2, LONGEST + 1):
        counts: Counter[str] = Counter()
        for word, count in words.items():
            for start in range(len(word) - length + 1):
                if length == 2 or word[start : start + length - 1] in shorter:
                    counts[word[start : start + length]] += count
        counts = Counter({piece: count for piece, count in counts.items() if count > 1})
        for piece, count in counts.items():
            for part in (piece[:-1], piece[1:]):
                if shorter[part] == count:
                    seeds.pop(part, None)
        seeds.update(counts)
        shorter = counts
    return seeds


class _Lattices:
    """The segmentations of many words at once, as arrays: a step treats one position of all words.

    A node is a position of a word, an edge a piece between two of them. The edges are sorted by the position
    of their end, so that what leads to an edge's start is known when the edge comes up.

    Args:
        words: each can be segmented.
        ids: piece → id.
        whole: whether a word may be one piece.
    """

    def __init__(self, words: Sequence[str], ids: Mapping[str, int], whole: bool = True):
        longest = max(map(len, ids))
        starts, ends, positions, pieces = array("q"), array("q"), array("q"), array("q")
        base = 0
        finals = array("q")
        for word in words:
            for end in range(1, len(word) + 1):
                for start in range(max(0, end - longest), end):
                    index = ids.get(word[start:end])
                    if index is not None and (whole or end - start < len(word)):
                        starts.append(base + start)
                        ends.append(base + end)
                        positions.append(end)
                        pieces.append(index)
            base += len(word) + 1
            finals.append(base - 1)
        self.num_nodes = base
        self.finals = np.array(finals)  # (words,) the last node of each
        order = np.argsort(np.array(positions), kind="stable")
        self.starts, self.ends = np.array(starts)[order], np.array(ends)[order]  # (edges,) nodes
        self.positions, self.pieces = np.array(positions)[order], np.array(pieces)[order]  # (edges,)
        self._group()

    def _group(self) -> None:
        """Find where the edges of a step, and in it of a node, begin."""
        first = np.flatnonzero(np.diff(self.ends, prepend=-1))  # (nodes with edges,)
        last = self.positions[-1] if len(self.positions) else 0
        bounds = np.searchsorted(self.positions, np.arange(1, last + 2))
        self._steps = []
        for low, high in pairwise(bounds):
            begins = first[np.searchsorted(first, low) : np.searchsorted(first, high)]
            self._steps.append((slice(low, high), begins - low, self.ends[begins]))

    def renumber(self, new: np.ndarray, words: np.ndarray | None = None) -> None:
        """Give the pieces new ids: `new[id]` is −1 for one that is gone, with its edges.

        Args:
            new: (pieces,) ids.
            words: (words,) false for one that goes too; all stay without it.
        """
        ids = new[self.pieces]
        kept = ids >= 0
        if words is not None:
            kept &= words[np.searchsorted(self.finals, self.ends)]
            self.finals = self.finals[words]
        self.starts, self.ends, self.positions = self.starts[kept], self.ends[kept], self.positions[kept]
        self.pieces = ids[kept]
        self._group()

    def expected(self, scores: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, float]:
        """The E step: how often each piece is expected, over all segmentations.

        Args:
            scores: (pieces,) log-probabilities.
            counts: (words,) how often each word comes.

        Returns:
            Expected occurrences (pieces,), and the log-likelihood of all words in nats.
        """
        total = np.zeros(self.num_nodes)  # log of the sum over all ways to a node
        last = np.empty(len(self.pieces))  # probability of an edge, given that its end is passed
        for edges, begins, nodes in self._steps:
            terms = total[self.starts[edges]] + scores[self.pieces[edges]]
            sizes = np.diff(begins, append=len(terms))
            top = np.maximum.reduceat(terms, begins)
            weights = np.exp(terms - top.repeat(sizes))
            sums = np.add.reduceat(weights, begins)
            total[nodes] = top + np.log(sums)
            last[edges] = weights / sums.repeat(sizes)
        passed = np.zeros(self.num_nodes)  # how often a node is expected to be passed
        passed[self.finals] = counts
        for edges, _, _ in reversed(self._steps):
            last[edges] *= passed[self.ends[edges]]
            np.add.at(passed, self.starts[edges], last[edges])
        expected = np.bincount(self.pieces, last, minlength=len(scores))
        return expected, float(counts @ total[self.finals])

    def viterbi(self, scores: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The most probable segmentations, from the back: at each step (indices of words, their pieces)."""
        best = np.zeros(self.num_nodes)
        back = np.zeros(self.num_nodes, dtype=np.int64)  # the edge that the best way to a node ends with
        for edges, begins, nodes in self._steps:
            terms = best[self.starts[edges]] + scores[self.pieces[edges]]
            sizes = np.diff(begins, append=len(terms))
            best[nodes] = np.maximum.reduceat(terms, begins)
            winners = np.where(terms == best[nodes].repeat(sizes), np.arange(len(terms)), len(terms))
            back[nodes] = edges.start + np.minimum.reduceat(winners, begins)
        words, nodes = np.arange(len(self.finals)), self.finals
        while len(words):
            edge = back[nodes]
            yield words, self.pieces[edge]
            nodes = self.starts[edge]
            unfinished = self.positions[edge] > self.ends[edge] - nodes  # the piece is not the word's first
            words, nodes = words[unfinished], nodes[unfinished]


def _fit(
    words: Counter[str], alphabet: Sequence[str], size: int, report: Callable[[float], None]
) -> list[tuple[str, float]]:
    """The pieces and log-probabilities of a vocabulary of `size` pieces.

    Args:
        words: word → how often it comes; made of the alphabet.
        alphabet: characters that stay whatever happens.
        size: pieces, the alphabet included; there are fewer if the words do not have so many substrings.
        report: called with the share of the work that is done.
    """
    seeds = _seeds(words)
    pieces, num_fixed = [*alphabet, *seeds], len(alphabet)
    ids = {piece: index for index, piece in enumerate(pieces)}
    text = _Lattices(list(words), ids)
    alone = _Lattices(list(seeds), ids, whole=False) if len(pieces) > size else None
    counts = np.array(list(words.values()), dtype=float)
    characters = _character_counts(words)
    weights = [characters[c] or 1 for c in alphabet] + [count * len(piece) for piece, count in seeds.items()]
    scores = _log_shares(np.array(weights, dtype=float))
    most = len(pieces)
    while True:
        for _ in range(EM_STEPS):
            expected, _ = text.expected(scores, counts)
            scores = _digamma(np.maximum(expected, RARE)) - _digamma(expected.sum())
        if len(pieces) <= size or alone is None:
            break
        report(math.log(most / len(pieces)) / math.log(most / size))
        loss = _losses(text, alone, scores, counts, num_fixed)
        rare = (expected < RARE) & np.isfinite(loss)
        keep = max(size, min(int(SHRINK * len(pieces)), len(pieces) - int(rare.sum())))
        kept = np.sort(np.argsort(np.where(rare, -math.inf, loss), kind="stable")[::-1][:keep])
        new = np.full(len(pieces), -1)
        new[kept] = np.arange(keep)
        text.renumber(new)
        alone.renumber(new, new[num_fixed:] >= 0)
        pieces, scores = [pieces[index] for index in kept], scores[kept]
    return list(zip(pieces, _log_shares(np.maximum(expected, RARE)).tolist(), strict=True))


def _losses(
    text: _Lattices, alone: _Lattices, scores: np.ndarray, counts: np.ndarray, num_fixed: int
) -> np.ndarray:
    """What the text's log-likelihood loses without each piece, (pieces,) nats; infinite for what must stay.

    Approximated as in SentencePiece: by the best segmentations, and as if each occurrence of the piece became
    the best segmentation of its own characters, all else staying as it is.
    """
    used = np.zeros(len(scores))
    for words, pieces in text.viterbi(scores):
        used += np.bincount(pieces, counts[words], minlength=len(scores))
    own = used[num_fixed:]
    number, logs = np.zeros(len(own)), np.zeros(len(own))  # of the pieces that stand in: how many, Σ log n
    with np.errstate(divide="ignore", invalid="ignore"):
        for words, pieces in alone.viterbi(scores):
            number[words] += 1
            logs[words] += np.log(used[pieces] + own[words])
        before = np.log(own) - np.log(used.sum())
        after = logs - number * np.log(used.sum() + own * (number - 1))
        loss = np.where(own > 0, own * (before - after), 0.0)
    return np.concatenate([np.full(num_fixed, math.inf), loss])


def _log_shares(weights: np.ndarray) -> np.ndarray:
    return np.log(weights) - np.log(weights.sum())


def _digamma(x: np.ndarray) -> np.ndarray:
    """ψ(x), the derivative of log Γ, for x ≥ 0.5 within 1e-8 (Abramowitz & Stegun 1964, 6.3.5 and 6.3.18)."""
    shift = np.zeros_like(x)
    for _ in range(6):
        shift, x = shift + 1 / x, x + 1
    return np.log(x) - 1 / (2 * x) - 1 / (12 * x**2) + 1 / (120 * x**4) - 1 / (252 * x**6) - shift


def _assemble(
    learnt: Sequence[tuple[str, float]], special_tokens: Sequence[str], byte_fallback: bool
) -> tuple[list[tuple[str, float]], dict[str, int], int, bool]:
    """The arguments of `UnigramTokenizer`: special tokens, bytes, then the pieces, the most probable first.

    Scores are rounded to ten places, so that any reader of JSON gets the same number back.
    """
    lowest = round(min(score for _, score in learnt), 10)
    pieces = [(name, 0.0) for name in special_tokens]
    pieces += [(name, lowest) for name in BYTE_PIECES if byte_fallback]
    pieces += [
        (piece, round(score, 10)) for piece, score in sorted(learnt, key=lambda item: (-item[1], item[0]))
    ]
    special = {name: index for index, name in enumerate(special_tokens)}
    return pieces, special, special[UNKNOWN], byte_fallback


# ------------------------------------------------------------------------------------------ tokenizer.json

_WORDS = {"type": "Split", "pattern": {"Regex": PRETOKEN.pattern}, "behavior": "Isolated", "invert": False}
_DECODER = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}


def _document(
    pieces: Sequence[tuple[str, float]], special_tokens: Mapping[str, int], unknown: int, byte_fallback: bool
) -> dict[str, Any]:
    return {
        **face.COMMON,
        "added_tokens": face.added_tokens(special_tokens),
        "pre_tokenizer": _WORDS,
        "decoder": _DECODER,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[piece, score] for piece, score in pieces],
            "byte_fallback": byte_fallback,
        },
    }


def read(document: Mapping[str, Any], path: Path, implementation: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` that holds a Unigram; `tokenizers.load` calls it.

    Raises:
        CourseError: it is damaged, or is none that the implementation can be.
    """
    pieces, special, unknown, byte_fallback = _read_pieces(document, path)
    if implementation == "library":
        return LibraryUnigram(face.read_library(path))
    names = {piece for piece, _ in pieces}
    ours = (
        document.get("normalizer") is None
        and document.get("pre_tokenizer") == _WORDS
        and document.get("decoder") == _DECODER
        and unknown is not None
        and names.issuperset(special)
        and (not byte_fallback or names.issuperset(BYTE_PIECES))
        and all(score <= 0 for _, score in pieces)
        and not any(entry.get(option) for entry in document["added_tokens"] for option in face.MATCHING)
    )
    if unknown is None or not ours:
        raise CourseError(
            f"{path} treats text otherwise than the course's Unigram; load it with implementation='library'."
        )
    return UnigramTokenizer(pieces, special, unknown, byte_fallback)


def _read_pieces(
    document: Mapping[str, Any], path: Path | str
) -> tuple[list[tuple[str, float]], dict[str, int], int | None, bool]:
    """Pieces with their scores, special tokens, id of the unknown piece, byte fallback."""
    model = face.field(document, "model", dict, path)
    pieces = [_read_piece(entry, path) for entry in face.field(model, "vocab", list, path)]
    special = face.read_special(document, path)
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    if len(ids) < len(pieces):
        raise CourseError(f"{path} is damaged: a piece of its vocabulary is there twice.")
    for name, index in special.items():
        if ids.get(name, index) != index:
            raise CourseError(f"{path} is damaged: the special token {name!r} has two ids.")
    face.check_ids({**ids, **special}, path)
    unknown = model.get("unk_id")
    if unknown is not None and (type(unknown) is not int or not 0 <= unknown < len(pieces)):
        raise CourseError(
            f"{path} is damaged: 'unk_id' is {unknown!r}, which is no id of its {len(pieces)} pieces."
        )
    return pieces, special, unknown, model.get("byte_fallback") is True


def _read_piece(entry: object, path: Path | str) -> tuple[str, float]:
    if isinstance(entry, list) and len(entry) == 2:
        piece, score = entry
        if isinstance(piece, str) and piece and type(score) in (int, float) and math.isfinite(score):
            return piece, float(score)
    raise CourseError(f"{path} is damaged: {entry!r} is not a piece and its score.")
