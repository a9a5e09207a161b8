"""Which weeks there are, which of them are written, and what a reader means by "week2" or "2/03".

The plan of all twenty weeks is `plan.yaml`. A week is ready when its folder holds notebooks; nothing else
has to be registered anywhere.
"""

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.runtime import files
from shared.runtime.errors import CourseError

READY, PLANNED = "ready", "planned"


@dataclass(frozen=True)
class Notebook:
    """One numbered notebook of a week.

    Attributes:
        week: slug of its week, such as "week1".
        name: file name without `.ipynb`, such as "01_attention_mechanisms".
        path: the `.ipynb` file.
    """

    week: str
    name: str
    path: Path

    @property
    def key(self) -> str:
        """How a reader names it: "week1/01_attention_mechanisms"."""
        return f"{self.week}/{self.name}"


@dataclass(frozen=True)
class Week:
    """One row of the plan, and its folder.

    Attributes:
        numbers: the week's number, or both where two weeks share a folder.
        title: two or three words.
        question: what the week answers, one line.
        phase: number of the phase, from 1.
        phase_name: its name.
        folder: where the week lives (it may not exist yet).
    """

    numbers: tuple[int, ...]
    title: str
    question: str
    phase: int
    phase_name: str
    folder: Path

    @property
    def slug(self) -> str:
        """ "week1", or "week17-18" where two weeks share a folder."""
        return "week" + "-".join(map(str, self.numbers))

    @cached_property
    def notebooks(self) -> tuple[Notebook, ...]:
        """The week's notebooks in order of their names; empty while the week is planned."""
        return tuple(Notebook(self.slug, path.stem, path) for path in sorted(self.folder.glob("*.ipynb")))

    @property
    def status(self) -> str:
        """ "ready" or "planned"."""
        return READY if self.notebooks else PLANNED

    @property
    def label(self) -> str:
        """The number as a reader says it: "1", "17–18"."""
        return "–".join(map(str, self.numbers))


def _plan() -> list[dict[str, Any]]:
    import yaml

    text = (Path(__file__).parent / "plan.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["phases"]


def discover(root: Path | None = None) -> list[Week]:
    """All weeks of the plan, in order.

    Args:
        root: the course's folder; the repository by default.

    Raises:
        CourseError: a folder with notebooks is not in the plan (a misspelt name would go unseen).
    """
    root = files.repository_root() if root is None else Path(root)
    weeks = [
        Week(
            tuple(entry["numbers"]),
            entry["title"],
            entry["question"],
            number,
            phase["name"],
            root / phase["folder"] / entry["folder"],
        )
        for number, phase in enumerate(_plan(), start=1)
        for entry in phase["weeks"]
    ]
    known = {week.folder for week in weeks}
    for folder in sorted(root.glob("phase*/*")):
        if folder not in known and any(folder.glob("*.ipynb")):
            raise CourseError(
                f"{folder.relative_to(root)} holds notebooks but is not in the plan; rename the folder, "
                "or add the week to shared/curriculum/plan.yaml."
            )
    return weeks


def find(name: str, root: Path | None = None) -> Week:
    """The week that `name` means: "week2", "2", "week02", or "18" for "week17-18".

    Raises:
        CourseError: there is no such week.
    """
    weeks = discover(root)
    text = name.strip().strip("/").lower().removeprefix("week").lstrip(" -")
    for week in weeks:
        numbers = [str(number) for number in week.numbers]
        if text.lstrip("0") in numbers or text in ("-".join(numbers), week.label):
            return week
        if name.strip("/") in (week.folder.name, f"{week.folder.parent.name}/{week.folder.name}"):
            return week
    raise CourseError(f"There is no week {name!r}; the course has {weeks[0].slug} to {weeks[-1].slug}.")


def find_ready(name: str, root: Path | None = None) -> Week:
    """As `find`, for a week that is written.

    Raises:
        CourseError: there is no such week, or it is only planned.
    """
    week = find(name, root)
    if week.status == PLANNED:
        raise CourseError(f"{week.slug} is planned and not written yet; ready: {_ready_names(root)}.")
    return week


def _ready_names(root: Path | None) -> str:
    return ", ".join(week.slug for week in discover(root) if week.status == READY) or "none yet"


def find_notebook(name: str, root: Path | None = None) -> Notebook:
    """The notebook that `name` means: "week1/01_attention_mechanisms", "1/01", or a path to the file.

    Raises:
        CourseError: no such week or notebook, or several that start like this.
    """
    path = Path(name)
    if path.suffix == ".ipynb" and path.parent.name:
        name = f"{path.parent.name}/{path.stem}"
    week_name, _, notebook_name = name.partition("/")
    week = find_ready(week_name, root)
    exact = [notebook for notebook in week.notebooks if notebook.name == notebook_name]
    found = exact or [notebook for notebook in week.notebooks if notebook.name.startswith(notebook_name)]
    if len(found) != 1:
        there = ", ".join(notebook.name for notebook in week.notebooks)
        problem = "Several notebooks start with" if found else "There is no notebook"
        raise CourseError(f"{problem} {notebook_name!r} in {week.slug}; it has {there}.")
    return found[0]


def select(names: Sequence[str], root: Path | None = None) -> list[Notebook]:
    """The notebooks that `names` mean, each once, in the order of the course; no names: all there are.

    Raises:
        CourseError: a name means nothing, or its week is only planned.
    """
    everything = [notebook for week in discover(root) for notebook in week.notebooks]
    if not names:
        if not everything:
            raise CourseError("No week is ready: no week folder of the plan holds a notebook.")
        return everything
    chosen: set[str] = set()
    for name in names:
        if re.fullmatch(r"[^/]+/?|phase[^/]+/[^/.]+/?", name) and not name.endswith(".ipynb"):
            chosen.update(notebook.key for notebook in find_ready(name, root).notebooks)
        else:
            chosen.add(find_notebook(name, root).key)
    return [notebook for notebook in everything if notebook.key in chosen]


def import_file(path: Path, name: str) -> ModuleType:
    """Import a Python file that belongs to no package, under `name`; a fresh copy each time.

    Raises:
        CourseError: it does not exist or does not load.
    """
    shown = f"{path.parent.name}/{path.name}"
    if not path.exists():
        raise CourseError(f"There is no {shown}.")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling by name look it up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = _line_in(path, error)
        where = f" (line {line})" if line else ""
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise CourseError(f"{shown} does not load: {type(error).__name__}: {reason}{where}.") from error
    return module


def _line_in(path: Path, error: BaseException) -> int | None:
    if isinstance(error, SyntaxError):
        return error.lineno
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
