"""`course generate`: continue a text with a trained model."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.cli import streams
from shared.runtime.errors import CourseError

if TYPE_CHECKING:
    from shared.data.tokenizers import Tokenizer
    from shared.models.gpt import GPT

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("generate")
def generate(
    model: Annotated[
        Path, typer.Option(help="Folder with config.json, model.safetensors and tokenizer.json.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the most probable token every time.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k most probable tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from the fewest tokens with this probability together."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from tokens at least this fraction as probable as the best."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Makes the text repeatable; one is drawn and printed otherwise.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print each token as soon as it is there.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """Continue a text with a trained model: the prompt and what follows, on standard output.

    Example: course generate --model runs/shakespeare/model --prompt "ROMEO:" --temperature 0.8 --seed 1
    """
    import random

    from shared.inference import generation
    from shared.runtime import scale

    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    machine = scale.start("auto", seed, quiet=True)
    text = streams.text_argument(prompt)
    gpt, tokenizer = load_gpt(model)
    ids = tokenizer.encode(text)
    started = time.perf_counter()
    tokens = generation.stream(
        gpt.to(machine.device),
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_ids=tuple(tokenizer.special_tokens.values()),
        seed=seed,
    )
    new: list[int] = []
    pieces = text_pieces(tokenizer, tokens, new)
    if as_json or not stream:
        completion = "".join(pieces)
    else:
        _print_as_it_comes(text, pieces)
    seconds = time.perf_counter() - started
    if as_json:
        report = {"prompt": text, "completion": completion, "tokens": len(new), "seed": seed}
        streams.print_json(report | {"seconds": round(seconds, 3)})
    elif not stream:
        print(text + completion)
    print(f"{len(new)} tokens in {seconds:.2f} s, seed {seed}", file=sys.stderr)


def load_gpt(folder: Path) -> "tuple[GPT, Tokenizer]":
    from shared.data import tokenizers
    from shared.models.gpt import GPT
    from shared.models.model_utils import load_model

    model = load_model(folder)
    if not isinstance(model, GPT):
        kind = type(model).__name__
        raise CourseError(f"{folder} holds a {kind}, which does not continue text; give the folder of a GPT.")
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CourseError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; put the tokenizer there that the model was trained with."
        )
    return model, tokenizer


def text_pieces(tokenizer: "Tokenizer", tokens: Iterator[int], kept: list[int]) -> Iterator[str]:
    """Text as it becomes complete, for a token may end inside a character; tokens are added to `kept`."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        kept.append(token)
        if piece := decoder.decode(tokenizer.token_bytes(token)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def _print_as_it_comes(prompt: str, pieces: Iterator[str]) -> None:
    first = next(pieces, "")  # a prompt that cannot be continued says so before anything is printed
    sys.stdout.write(prompt + first)
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
