"""`course tokenizer`: train, inspect, encode, decode."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.cli import streams
from shared.runtime.errors import CourseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.data.tokenizers import Tokenizer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Train a tokenizer, encode, decode and compare.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A tokenizer.json.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
SAMPLE_BYTES = 1_000_000  # of the corpus, to measure how many bytes a token covers
SHOWN = 10  # merges and tokens in `inspect`


class Kind(StrEnum):
    """What can be trained."""

    BPE = "bpe"
    WORDPIECE = "wordpiece"
    UNIGRAM = "unigram"


NAMES = {Kind.BPE: "byte-level BPE", Kind.WORDPIECE: "WordPiece", Kind.UNIGRAM: "Unigram"}


@app.command()
def train(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the tokenizer.json goes.")],
    text: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A .txt file or a folder of them, in UTF-8.")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="python-docs, python-code, dates, shakespeare or stories."),
    ] = None,
    kind: Annotated[
        Kind, typer.Option(help="Byte-level BPE as GPT-2 has it, uncased WordPiece as BERT, Unigram as T5.")
    ] = Kind.BPE,
    vocab_size: Annotated[
        int, typer.Option(help="Special tokens + 256 bytes (WordPiece: the alphabet) + what is learnt.")
    ] = 8192,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn a tokenizer from a text or a corpus, with the course's own code.

    Example: course tokenizer train --corpus python-docs --kind bpe --vocab-size 8192 --out docs.json
    """
    if (text is None) == (corpus is None) or corpus == "text":
        raise CourseError("Name one source: --text PATH for texts of your own, or --corpus NAME.")
    if out.exists() and not force:
        raise CourseError(f"{out} already exists; name another file, or replace it with --force.")
    from shared.data import corpora

    trainer = _trainer(kind)
    with _progress() as advance:
        loaded = corpora.load("text", path=text) if text is not None else corpora.load(corpus or "")
        started = time.perf_counter()
        tokenizer = trainer((document.text for document in loaded.documents), vocab_size, progress=advance)
        seconds = time.perf_counter() - started
    tokenizer.save(out)
    result = {
        "path": str(out),
        "kind": NAMES[kind],
        "corpus": loaded.name,
        "bytes": loaded.manifest["bytes"],
        "vocab_size": tokenizer.vocab_size,
        "merges": len(getattr(tokenizer, "merges", [])),
        "bytes_per_token": round(_bytes_per_token(tokenizer, loaded.documents), 3),
        "seconds": round(seconds, 2),
        "fingerprint": tokenizer.fingerprint(),
    }
    if as_json:
        streams.print_json(result)
        return
    if tokenizer.vocab_size < vocab_size:
        print(
            f"The text has no more {'pieces' if kind is Kind.UNIGRAM else 'pairs to merge'}: "
            f"{tokenizer.vocab_size} tokens, not {vocab_size}.",
            file=sys.stderr,
        )
    print(
        f"{out}: {tokenizer.vocab_size} tokens learnt from {result['bytes']:,} bytes in {seconds:.1f} s, "
        f"{result['bytes_per_token']} bytes a token"
    )


@app.command()
def inspect(file: File, as_json: AsJson = False) -> None:
    """What a tokenizer knows: size, special tokens, first merges or best pieces, longest tokens.

    Example: course tokenizer inspect docs.json
    """
    tokenizer = _load(file)
    merges = getattr(tokenizer, "merges", [])
    special = set(tokenizer.special_tokens.values())
    longest = sorted(
        (tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size) if index not in special),
        key=len,
        reverse=True,
    )
    kind = _kind(tokenizer)
    result: dict[str, Any] = {
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": tokenizer.special_tokens,
        "merges": len(merges),
        "first_merges": [[_readable(left), _readable(right)] for left, right in merges[:SHOWN]],
        "longest_tokens": [_readable(token) for token in longest[:SHOWN]],
        "fingerprint": tokenizer.fingerprint(),
    }
    if kind == NAMES[Kind.UNIGRAM]:
        result["best_pieces"] = _best_pieces(tokenizer)
    if as_json:
        streams.print_json(result)
        return
    from rich.text import Text

    from shared.cli import display

    table = display.table("", "")
    table.show_header = False
    rows = {
        "Kind": result["kind"],
        "Tokens": f"{tokenizer.vocab_size:,}",
        "Special": " ".join(f"{name} = {index}" for name, index in tokenizer.special_tokens.items())
        or "none",
        "Merges": f"{len(merges):,}" if merges else "",
        "First merges": "  ".join(f"{left!r}+{right!r}" for left, right in result["first_merges"]),
        "Best pieces": "  ".join(f"{piece!r} {score:.2f}" for piece, score in result.get("best_pieces", [])),
        "Longest tokens": "  ".join(repr(token) for token in result["longest_tokens"]),
        "Fingerprint": result["fingerprint"],
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    display.stdout().print(table)


@app.command()
def encode(
    file: File,
    text: Annotated[str, typer.Argument(help="The text; - reads standard input.")],
    special: Annotated[
        bool, typer.Option("--special", help="Read <|endoftext|> and the like as special tokens.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Token ids of a text, and with --json the text of each.

    Example: course tokenizer encode docs.json "Return the sum."
    """
    tokenizer = _load(file)
    ids = tokenizer.encode(streams.text_argument(text), allow_special=special)
    if as_json:
        streams.print_json({"ids": ids, "tokens": [_readable(tokenizer.token_bytes(index)) for index in ids]})
    else:
        print(*ids)


@app.command()
def decode(
    file: File,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Token ids; - reads standard input.")],
    as_json: AsJson = False,
) -> None:
    """The text of token ids.

    Example: course tokenizer decode docs.json 512 77 301
    """
    words = streams.text_argument("-").split() if ids == ["-"] else ids
    text = _load(file).decode([_number(word) for word in words])
    if as_json:
        streams.print_json({"text": text})
    else:
        print(text)


def _load(file: Path) -> "Tokenizer":
    from shared.data import tokenizers

    return tokenizers.load(file)


def _trainer(kind: Kind) -> "Callable[..., Tokenizer]":
    if kind is Kind.WORDPIECE:
        from shared.data.wordpiece import WordPieceTokenizer

        return WordPieceTokenizer.train
    if kind is Kind.UNIGRAM:
        from shared.data.unigram import UnigramTokenizer

        return UnigramTokenizer.train
    from shared.data.tokenizers import BPETokenizer

    return BPETokenizer.train


def _kind(tokenizer: "Tokenizer") -> str:
    from shared.data.tokenizers import LibraryTokenizer
    from shared.data.unigram import LibraryUnigram
    from shared.data.wordpiece import LibraryWordPiece

    kinds = {LibraryTokenizer: Kind.BPE, LibraryWordPiece: Kind.WORDPIECE, LibraryUnigram: Kind.UNIGRAM}
    kind = kinds.get(type(tokenizer))
    return NAMES[kind] if kind else "characters"


def _best_pieces(tokenizer: Any) -> list[tuple[str, float]]:
    """The most probable pieces, with the natural logarithm of their probability."""
    pieces = [(piece, score) for piece, score in tokenizer.pieces if piece not in tokenizer.special_tokens]
    return sorted(pieces, key=lambda item: -item[1])[:SHOWN]


def _number(word: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise CourseError(
            f"{word[:40]!r} is not a token id; give whole numbers with spaces between them."
        ) from error


def _readable(token: bytes) -> str:
    """UTF-8 where it is some, else as Python escapes: a token may hold half a character."""
    return token.decode("utf-8", errors="backslashreplace")


def _bytes_per_token(tokenizer: "Tokenizer", documents: Any) -> float:
    size = tokens = 0
    for document in documents:
        sample = document.text[:SAMPLE_BYTES]
        size += len(sample.encode())
        tokens += len(tokenizer.encode(sample))
        if size >= SAMPLE_BYTES:
            break
    return size / tokens if tokens else 0.0


@contextmanager
def _progress() -> Iterator["Callable[[int, int], None]"]:
    """A progress bar on standard error: for the reading, of unknown length, then for the learning."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from shared.cli import display

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = display.stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Reading and counting words", total=None)
        yield lambda done, total: bar.update(task, description="Learning tokens", completed=done, total=total)
