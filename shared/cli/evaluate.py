"""`course evaluate`: what a trained model pays for a text it has not seen."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.cli import streams
from shared.runtime.errors import CourseError

if TYPE_CHECKING:
    import numpy as np

    from shared.data.tokenizers import Tokenizer
    from shared.models.gpt import GPT

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
BATCH_TOKENS = 4096  # read at a time: enough to fill two cores, few enough for 8 GB at 50,000 tokens


@app.command("evaluate")
def evaluate(
    model: Annotated[
        Path, typer.Option(help="Folder with config.json, model.safetensors and tokenizer.json.")
    ],
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A .txt file or a folder of them, read whole.")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The held-out part of python-docs, shakespeare, stories, …"),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(
            help="Share of the corpus that is held out: as data.validation of the model's training."
        ),
    ] = 0.1,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens read together (default: the model's whole context).")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: what is fast on this machine.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """Nats per token, perplexity and bits per byte of a model on a whole text.

    Windows do not overlap, so the stride is the window: every token is predicted once, from what precedes it
    in its window. Only bits per byte can be compared between models with different tokenizers.

    Example: course evaluate --model runs/shakespeare/model --corpus shakespeare
    """
    if (data is None) == (corpus is None) or corpus == "text":
        raise CourseError("Name one text: --data PATH for one of your own, or --corpus NAME.")
    if not 0 < validation < 1:
        raise CourseError(f"--validation is {validation}; it must be a share between 0 and 1.")
    from shared.cli.generate import load_gpt
    from shared.evaluation.metrics import evaluate_lm
    from shared.runtime import scale

    machine = scale.start("auto", quiet=True)
    number_format = _number_format(dtype, machine.dtype)
    gpt, tokenizer = load_gpt(model)
    length = _window(window, gpt.config.context_length)
    texts, described = _texts(data, corpus, validation)
    tokens, num_bytes = _stream(texts, tokenizer)
    started = time.perf_counter()
    with _progress(gpt, len(tokens) - 1):
        score = evaluate_lm(
            gpt.to(machine.device),
            tokens,
            context_length=length,
            batch_size=max(1, BATCH_TOKENS // length),
            dtype=number_format,
        )
    report = {
        "model": str(model),
        "text": described,
        "documents": len(texts),
        "bytes": num_bytes,
        "tokens": score.tokens,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte(num_bytes),
        "window": length,
        "stride": length,
        "dtype": str(number_format).removeprefix("torch."),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if as_json:
        streams.print_json(report)
    else:
        _print(report)


def _number_format(name: str, fast: Any) -> Any:
    import torch

    formats = {"auto": fast, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in formats:
        raise CourseError(f"--dtype is {name!r}; choose one of {', '.join(formats)}.")
    return formats[name]


def _window(wanted: int | None, context: int) -> int:
    if wanted is not None and wanted > context:
        raise CourseError(f"--window is {wanted} and the model's context {context}; choose at most that.")
    return wanted or context


def _texts(data: Path | None, corpus: str | None, validation: float) -> tuple[list[str], str]:
    """The documents' texts, and what they are in words."""
    from shared.data import corpora

    if corpus is None:
        return [document.text for document in corpora.load("text", path=data).documents], str(data)
    held_out = corpora.load(corpus).split(validation)[1]
    if not held_out:
        raise CourseError(f"Nothing of {corpus} is held out at {validation:g}; raise --validation.")
    return [document.text for document in held_out], f"the {validation:.1%} of {corpus} that is held out"


def _stream(texts: list[str], tokenizer: "Tokenizer") -> "tuple[np.ndarray, int]":
    """Token ids as in training, and the UTF-8 bytes of those that are predicted.

    An end-of-text token in front, where the tokenizer has one, lets the first token of the text be predicted.
    """
    import numpy as np

    from shared.data.preprocessing import tokenize
    from shared.data.tokenizers import END_OF_TEXT

    tokens = tokenize(texts, tokenizer)
    num_bytes = sum(len(text.encode()) for text in texts)
    end = tokenizer.special_tokens.get(END_OF_TEXT)
    if end is not None:
        tokens = np.concatenate([np.array([end]), tokens])
    else:
        num_bytes -= len(tokenizer.token_bytes(int(tokens[0])))
    if len(tokens) < 2:
        raise CourseError("The text is a single token and there is nothing to predict; give a longer one.")
    return tokens, num_bytes


@contextmanager
def _progress(gpt: "GPT", total: int) -> Iterator[None]:
    """A progress bar on standard error that counts the tokens that go through the model."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from shared.cli import display

    console = display.stderr()
    columns = (TextColumn("Evaluating"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        hook = gpt.register_forward_hook(lambda _, inputs, __: bar.advance(task, inputs[0].numel()))
        try:
            yield
        finally:
            hook.remove()


def _print(report: dict[str, Any]) -> None:
    print(
        f"{report['nats_per_token']:.4f} nats per token, perplexity {report['perplexity']:.2f}, "
        f"{report['bits_per_byte']:.4f} bits per byte"
    )
    print(
        f"{report['text']}: {report['tokens']:,} tokens, {report['bytes']:,} bytes; windows of "
        f"{report['window']} tokens, stride {report['stride']}; {report['dtype']}"
    )
    print(f"{report['seconds']:.1f} s", file=sys.stderr)
