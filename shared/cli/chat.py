"""`course chat`: talk to a model in the terminal, or through a pipe."""

import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from shared.runtime.errors import CourseError

if TYPE_CHECKING:
    from shared.data.tokenizers import Tokenizer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = "/reset starts anew, /quit or Ctrl-D ends, Ctrl-C stops an answer"
TEMPLATE_FILE = "chat_template.jinja"


@app.command("chat")
def chat(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder with config.json, model.safetensors and tokenizer.json; the course's base model "
            "if not given."
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation (chat models).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
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
        int | None,
        typer.Option(min=0, help="Makes the answers repeatable; one is drawn and shown otherwise."),
    ] = None,
) -> None:
    """Talk to a model: each line is a message, the answer comes token by token.

    A model whose tokenizer has a chat template is spoken to through it. A base model has none: it continues
    your text as it would any text. What no longer fits into its context is forgotten, oldest first. Through a
    pipe, each line of standard input is a message, and standard output holds the answers alone.

    Example: course chat --model runs/python-docs/model
    """
    from shared.cli.generate import load_gpt
    from shared.inference.generation import Sampling
    from shared.runtime import scale

    if model is None:
        from shared.recipes.base_model import shipped_model

        model = shipped_model()
    sampling = Sampling(temperature, top_k, top_p, min_p)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    machine = scale.start("auto", seed, quiet=True)
    gpt, tokenizer = load_gpt(model)
    gpt = gpt.to(machine.device)
    context = gpt.config.context_length
    longest = min(
        max_new_tokens, max(1, context // 2)
    )  # half of the context at least is for the conversation
    conversation = _conversation(model, tokenizer, system, context - longest)
    _note(f"{model}: {gpt.num_parameters():,} parameters, context of {context} tokens, seed {seed}")
    _note(conversation.explanation)
    _note(COMMANDS)

    def answer(prompt: list[int], turn: int) -> Iterator[int]:
        from shared.inference import generation

        return generation.stream(
            gpt,
            prompt,
            longest,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop_ids=tuple(tokenizer.special_tokens.values()),
            seed=(seed + turn) % 2**32,
        )

    _talk(conversation, tokenizer, answer)


class _Conversation(Protocol):
    """What has been said, as token ids."""

    explanation: str

    def ask(self, message: str) -> list[int]:
        """The prompt that the answer to `message` continues.

        Raises:
            CourseError: the message alone is too long, or cannot be encoded.
        """

    def keep(self, tokens: Sequence[int]) -> None:
        """Remember the message and its answer."""

    def reset(self) -> None:
        """Forget everything."""


class Continuation:
    """A conversation with a base model: one text, to which both add lines.

    Args:
        tokenizer: the model's.
        room: tokens that a prompt may have.
    """

    explanation = (
        "It has no chat template, so it is no chat model: it continues your text as it would any text."
    )

    def __init__(self, tokenizer: "Tokenizer", room: int):
        self._tokenizer, self._room = tokenizer, room
        self._ids: list[int] = []
        self._asked: list[int] = []

    def ask(self, message: str) -> list[int]:
        """The text so far with `message` on a new line; its oldest tokens go when it is too long."""
        new = self._tokenizer.encode("\n" + message if self._ids else message)
        _check_room(len(new), self._room)
        self._asked = (self._ids + new)[-self._room :]
        return self._asked

    def keep(self, tokens: Sequence[int]) -> None:
        """Add the message and the model's part."""
        self._ids = self._asked + list(tokens)

    def reset(self) -> None:
        """Start with an empty text."""
        self._ids = []


class Dialogue:
    """A conversation with a chat model, written down by its chat template.

    Args:
        tokenizer: the model's.
        room: tokens that a prompt may have.
        render: messages → the text that the template makes of them, up to where the answer begins.
        system: the system message, if any.
    """

    explanation = "It is spoken to through its chat template."

    def __init__(
        self,
        tokenizer: "Tokenizer",
        room: int,
        render: Callable[[list[dict[str, str]]], str],
        system: str | None = None,
    ):
        self._tokenizer, self._room, self._render = tokenizer, room, render
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._asked: list[dict[str, str]] = []

    def ask(self, message: str) -> list[int]:
        """The template's text with `message` last; the oldest exchanges go when it is too long."""
        turns = [*self._turns, {"role": "user", "content": message}]
        ids = self._encode(turns)
        while len(ids) > self._room and len(turns) > 2:
            turns = turns[2:]  # a question and its answer
            ids = self._encode(turns)
        _check_room(len(ids), self._room)
        self._asked = turns
        return ids

    def keep(self, tokens: Sequence[int]) -> None:
        """Add the message and the model's answer."""
        answer = {"role": "assistant", "content": self._tokenizer.decode(tokens)}
        self._turns = [*self._asked, answer]

    def reset(self) -> None:
        """Keep the system message only."""
        self._turns = []

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        """Special tokens are read as such where the template wrote them, and as plain text in messages."""
        names = sorted(self._tokenizer.special_tokens, key=len, reverse=True)
        written = re.compile("|".join(map(re.escape, names)) or "(?!)")

        def marked(message: dict[str, str]) -> dict[str, str]:
            content = re.sub("[\ue000\ue001]", "", message["content"])
            content = written.sub(lambda found: f"\ue000{names.index(found[0])}\ue001", content)
            return message | {"content": content}

        text = self._render([marked(message) for message in self._system + turns])
        ids: list[int] = []
        for number, piece in enumerate(re.split("\ue000(\\d+)\ue001", text)):
            if number % 2:
                ids += self._tokenizer.encode(names[int(piece)])
            else:
                ids += self._tokenizer.encode(piece, allow_special=True)
        return ids


def _check_room(tokens: int, room: int) -> None:
    if tokens > room:
        raise CourseError(f"The message takes {tokens} tokens and there is room for {room}; shorten it.")


def _conversation(folder: Path, tokenizer: "Tokenizer", system: str | None, room: int) -> _Conversation:
    template, names = _chat_template(folder)
    if template is not None:
        return Dialogue(tokenizer, room, lambda messages: _render(folder, template, names, messages), system)
    if system is not None:
        raise CourseError(f"{folder} has no chat template and so no place for --system; leave it out.")
    return Continuation(tokenizer, room)


def _chat_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The template as `transformers` saves it, or None; and the special tokens it may name."""
    from shared.models.model_utils import TOKENIZER_CONFIG
    from shared.runtime import files

    path, own = folder / TOKENIZER_CONFIG, folder / TEMPLATE_FILE
    settings: Any = {}
    if path.exists():
        try:
            settings = json.loads(files.read_text(path))
        except ValueError as error:
            if isinstance(error, CourseError):
                raise
            raise CourseError(f"{path} is damaged or not JSON; save the model again.") from error
        if not isinstance(settings, dict):
            raise CourseError(f"{path} does not hold a tokenizer's settings; save the model again.")
    template = files.read_text(own) if own.exists() else settings.get("chat_template")
    if isinstance(template, list):  # several with names, as old versions of transformers wrote them
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CourseError(f"The chat_template in {path} is not a text; save the tokenizer again.")
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    contents = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()
    }
    return template, {name: value for name, value in contents.items() if isinstance(value, str)}


def _render(folder: Path, template: str, names: dict[str, str], messages: list[dict[str, str]]) -> str:
    """The conversation as the template writes it, in `transformers`' sandbox."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True, **names
        )
    except (jinja2.TemplateError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CourseError(f"The chat template in {folder} cannot write this down: {reason}.") from error
    return rendered[0]


def _talk(
    conversation: _Conversation, tokenizer: "Tokenizer", answer: Callable[[list[int], int], Iterator[int]]
) -> None:
    at_terminal = sys.stdin.isatty()
    turn = 0
    for message in _typed() if at_terminal else _piped():
        if message == "/quit":
            return
        if message == "/reset":
            conversation.reset()
            _note("The conversation starts anew.")
        elif message.startswith("/"):
            _note(f"There is no command {message.split()[0]}; {COMMANDS}.")
        elif message:
            try:
                prompt = conversation.ask(message)
            except CourseError as error:
                if not at_terminal:
                    raise
                _note(str(error))
                continue
            conversation.keep(_say(tokenizer, answer(prompt, turn), at_terminal))
            turn += 1


def _say(tokenizer: "Tokenizer", tokens: Iterator[int], at_terminal: bool) -> list[int]:
    """Print the answer as it comes; Ctrl-C ends it there. Returns its tokens."""
    from shared.cli.generate import text_pieces

    said: list[int] = []
    started = time.perf_counter()
    try:
        for piece in text_pieces(tokenizer, tokens, said):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not at_terminal:
            raise
        sys.stdout.write(" …")
    print(flush=True)
    if at_terminal:
        _note(f"{len(said)} tokens, {len(said) / (time.perf_counter() - started):.0f} a second")
    return said


def _typed() -> Iterator[str]:
    """Lines from the terminal, with editing and history where Python has readline, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() its editing
    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # nothing to stop: the line typed so far is dropped
            print()
            _note(COMMANDS)


def _piped() -> Iterator[str]:
    """Lines from a file or another program."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise CourseError(f"Line {number} of standard input is not UTF-8; convert it first.") from error


def _note(text: str) -> None:
    """What is not the model's, on standard error, dimmed in a terminal."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
