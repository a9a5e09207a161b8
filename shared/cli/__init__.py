"""The command line, `course`: one module a group of commands, each imported when it is called.

Results go to standard output, progress to standard error. Bad input is answered by one sentence and status 2,
failed claims or exercises by status 1, Ctrl-C by 130.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from shared.cli import course
from shared.runtime.errors import CourseError

# Groups that import torch and more; `course --help` shows these lines without importing them.
LATER = {
    "tokenizer": "Train a tokenizer, encode, decode and compare.",
    "train": "Train a model from a configuration file.",
    "evaluate": "What a trained model pays for a text: nats per token, perplexity, bits per byte.",
    "generate": "Continue a text with a trained model.",
    "chat": "Talk to a model in the terminal.",
    "checkpoints": "List, verify and prune the checkpoints of a run.",
    "bench": "Measure speed and memory, always as a ratio within one run.",
}


class CourseGroup(TyperGroup):
    """The commands of `course.py`, and those of `LATER` once they are called."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """Names in the order of the help."""
        return [*super().list_commands(ctx), *LATER]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        """A command; for one of `LATER` only its name and line of help."""
        if cmd_name in LATER:
            return TyperCommand(cmd_name, help=LATER[cmd_name])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:
        """The command that is called, imported now."""
        if args and args[0] in LATER:
            command = typer.main.get_command(importlib.import_module(f"shared.cli.{args[0]}").app)
            return args[0], command, args[1:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=CourseGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Twenty weeks from attention to a production RAG system, as a course that runs.",
)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error. Goes anywhere."),
) -> None:
    pass


course.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `course`.

    Args:
        arguments: those after `course`; the process's own by default.

    Returns:
        the exit status: 0, 1 for failed claims, notebooks or exercises, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        status = typer.main.get_command(app)(args=arguments, prog_name="course", standalone_mode=False)
        sys.stdout.flush()  # a full disk shows here, not after the end
    except (CourseError, typer.TyperException) as error:
        if debug:
            raise
        return _complain(error)
    except typer.Abort:
        status = 130
    except BrokenPipeError:  # the reader of a pipe has closed it
        _discard_what_cannot_be_printed()
        return 1
    except OSError as error:  # the commands say more about their own files; this is /tmp full, and the like
        if debug:
            raise
        _discard_what_cannot_be_printed()
        where = f" ({error.filename})" if error.filename else ""
        reason = " ".join((error.strerror or str(error)).split()) or type(error).__name__
        return _complain(CourseError(f"{reason}{where}; --debug shows where it happened."))
    if status == 130:
        print("Interrupted.", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _discard_what_cannot_be_printed() -> None:
    """Python would try once more at its end, and complain in its own way."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: Exception) -> int:
    if isinstance(error, CourseError):
        print(f"course: {error}", file=sys.stderr)
        return 2
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "course"
    print(f"course: {message}; see `{where} --help`.", file=sys.stderr)
    return 2
