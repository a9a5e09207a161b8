"""What a reader has done so far: notebooks run, exercises solved, artefacts built."""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from shared.curriculum import exercises, runner, weeks
from shared.curriculum.exercises import Verdict
from shared.curriculum.runner import Entry
from shared.runtime import artifacts, files
from shared.runtime.errors import CourseError


@dataclass(frozen=True)
class NotebookState:
    """A notebook and its last run; `stale` if something that the result depends on has changed since."""

    key: str
    entry: Entry | None
    stale: bool


@dataclass(frozen=True)
class ExerciseState:
    """How many of a week's exercises passed when they were last checked."""

    week: str
    solved: int
    total: int


@dataclass(frozen=True)
class ArtefactState:
    """How many artefacts of a kind there are, and their size in MB (10⁶ bytes)."""

    kind: str
    count: int
    megabytes: float


@dataclass(frozen=True)
class State:
    """Everything that `course status` shows; `home` is where artefacts are."""

    notebooks: list[NotebookState]
    exercises: list[ExerciseState]
    artefacts: list[ArtefactState]
    home: str


def collect(root: Path | None = None) -> State:
    """Look at results, exercises and artefacts.

    Raises:
        CourseError: a file of the course is not readable.
    """
    root = root or files.repository_root()
    entries = runner.load_results()
    ready = [week for week in weeks.discover(root) if week.status == weeks.READY]
    return State(
        notebooks=[_notebook(book, entries.get(book.key), root) for week in ready for book in week.notebooks],
        exercises=[_exercises(week) for week in ready if (week.folder / exercises.STUBS).exists()],
        artefacts=_artefacts(),
        home=str(artifacts.home()),
    )


def _notebook(book: weeks.Notebook, entry: Entry | None, root: Path) -> NotebookState:
    if entry is None:
        return NotebookState(book.key, None, False)
    stale = runner.fingerprint(book, entry.scale, entry.seed, root) != entry.fingerprint
    return NotebookState(book.key, entry, stale)


def _exercises_path() -> Path:
    return runner.results_path().parent / "exercises.json"


def _solved() -> dict[str, dict[str, str]]:
    path = _exercises_path()
    if not path.exists():
        return {}
    try:
        return {week: dict(verdicts) for week, verdicts in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CourseError(f"{path} is not readable; remove it and check the exercises again.") from error


def record_exercises(week: str, verdicts: Sequence[Verdict]) -> None:
    """Keep the verdicts of a check in `exercises.json`: week → exercise → verdict.

    Raises:
        CourseError: the file cannot be written.
    """
    path = _exercises_path()
    with files.explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # two checks may end at once
            known = _solved()
            known.setdefault(week, {}).update({one.exercise.name: one.status for one in verdicts})
            files.atomic_write(path, json.dumps(known, indent=2) + "\n")


def _exercises(week: weeks.Week) -> ExerciseState:
    """Stubs are counted in the text: importing them would import torch."""
    stubs = (week.folder / exercises.STUBS).read_text(encoding="utf-8")
    names = re.findall(r"^@exercise\(.*?^(?:def|class) (\w+)", stubs, re.MULTILINE | re.DOTALL)
    verdicts = _solved().get(week.slug, {})
    return ExerciseState(week.slug, sum(verdicts.get(n) == exercises.PASSED for n in names), len(names))


def _artefacts() -> list[ArtefactState]:
    home = artifacts.home()
    kinds: dict[str, list[float]] = {}
    for folder, _, names in sorted(os.walk(home)):  # what vanishes meanwhile is passed over
        if artifacts.LINEAGE in names and not Path(folder).name.startswith("."):  # hidden: still being built
            kinds.setdefault(Path(folder).parent.relative_to(home).as_posix(), []).append(_megabytes(folder))
    return [ArtefactState(kind, len(sizes), round(sum(sizes), 1)) for kind, sizes in kinds.items()]


def _megabytes(folder: str) -> float:
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size / 1e6
