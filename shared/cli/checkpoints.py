"""`course checkpoints`: list, verify and prune the checkpoints of a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.cli import display, streams
from shared.runtime.errors import CourseError

if TYPE_CHECKING:
    from shared.training.checkpointing import CheckpointInfo

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="List, verify and prune the checkpoints of a run.\n\nExample: course checkpoints list runs/story",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run (of `course train`).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


@app.command("list")
def list_(directory: Run, as_json: AsJson = False) -> None:
    """Steps, sizes, and which is the latest and the best. Sizes are compared; `verify` reads every byte.

    Example: course checkpoints list runs/story
    """
    found = _found(directory)
    marked = _marked(directory, found)
    rows = [_row(info, marked) for info in found]
    if as_json:
        streams.print_json(rows)
        return
    from rich.text import Text

    table = display.table("Checkpoint", "Updates", "Size", "Marked", "State", right=("Updates", "Size"))
    for row in rows:
        marks = ", ".join(mark for mark in ("latest", "best") if row[mark])
        table.add_row(
            Path(row["path"]).name,
            f"{row['step']:,}",
            display.memory(row["bytes"] / 1e6),
            marks,
            Text("complete", "green") if row["complete"] else Text(row["problem"], "red"),
        )
    display.stdout().print(table)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, or one checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Read every byte of every checkpoint and compare it with its SHA-256. Status 1 if one is damaged.

    Example: course checkpoints verify runs/story
    """
    from shared.training import checkpointing

    single = (directory / checkpointing.MANIFEST).exists() or checkpointing.NAME.fullmatch(directory.name)
    paths = [directory] if single else [info.path for info in _found(directory)]
    if not directory.is_dir():
        raise CourseError(f"There is no folder {directory}; give the folder of a run or of a checkpoint.")
    results: list[dict[str, Any]] = []
    for path in paths:
        problem = None
        try:
            checkpointing.verify(path)
        except CourseError as error:
            problem = str(error)
        results.append({"path": str(path), "whole": problem is None, "problem": problem})
        if not as_json:
            print(problem or f"{path.name}: every byte is as it was written", flush=True)
    if as_json:
        streams.print_json(results)
    if not all(result["whole"] for result in results):
        raise typer.Exit(1)


@app.command()
def prune(
    directory: Run,
    keep_last: Annotated[int, typer.Option(min=1, help="Leave the newest so many.")] = 2,
    keep_every: Annotated[
        int, typer.Option(min=0, help="Leave every multiple of so many updates, too; 0: none.")
    ] = 0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints, after asking. The latest, the best and damaged ones always stay.

    Example: course checkpoints prune runs/story --keep-last 2 --keep-every 10000
    """
    from shared.training import checkpointing

    found = _found(directory)
    with checkpointing.lock(directory):
        old = checkpointing.prunable(directory, keep_last, keep_every)
        if old and not yes and not _agreed(old, len(found)):
            print("Nothing was removed.", file=sys.stderr)
            return
        removed = set(checkpointing.prune(directory, keep_last, keep_every))
    gone = [info for info in found if info.path in removed]
    size = sum(info.bytes for info in gone)
    if as_json:
        streams.print_json({"removed": [str(info.path) for info in gone], "bytes": size})
    else:
        print(f"{len(gone)} of {len(found)} checkpoints removed, {display.memory(size / 1e6)} freed")


def _found(directory: Path) -> "list[CheckpointInfo]":
    from shared.training import checkpointing

    if not directory.is_dir():
        raise CourseError(f"There is no folder {directory}; give the folder of a run.")
    found = checkpointing.list_checkpoints(directory)
    if not found:
        raise CourseError(f"There is no checkpoint in {directory}; give the folder of a run.")
    return found


def _marked(directory: Path, found: "list[CheckpointInfo]") -> dict[str, Path | None]:
    """The newest complete checkpoint, from which a run would go on, and the one that `best` names."""
    from shared.training import checkpointing

    complete = [info.path for info in found if info.complete]
    return {
        "latest": complete[-1] if complete else None,
        "best": checkpointing.marked_checkpoint(directory, checkpointing.BEST),
    }


def _row(info: "CheckpointInfo", marked: dict[str, Path | None]) -> dict[str, Any]:
    marks = {name: info.path == path for name, path in marked.items()}
    about = {"step": info.step, "path": str(info.path), "bytes": info.bytes}
    return about | {"complete": info.complete, "problem": info.problem} | marks


def _agreed(old: "list[CheckpointInfo]", total: int) -> bool:
    """Ask on standard error; Ctrl-C ends the command."""
    names = ", ".join(info.path.name for info in old)
    size = display.memory(sum(info.bytes for info in old) / 1e6)
    if not sys.stdin.isatty():
        raise CourseError(f"Nobody is there to ask whether {names} may go; add --yes to remove them.")
    return typer.confirm(f"Remove {len(old)} of {total} checkpoints ({names}; {size})?", err=True)
