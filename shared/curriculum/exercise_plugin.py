"""The pytest plugin behind `course check`: the fixture `answers`, and each result as a line of JSON.

$COURSE_EXERCISES holds the request as JSON: folder, answers, names, report (a path).
"""

import json
import os
import traceback
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.curriculum import exercises, weeks
from shared.runtime.errors import CourseError

_MESSAGE_LINES = 5


class _Session:
    def __init__(self, request: dict[str, Any]) -> None:
        self.folder, self.wanted, self.names = Path(request["folder"]), request["answers"], request["names"]
        self.report = Path(request["report"])
        self.stubs = weeks.import_file(self.folder / exercises.STUBS, "course_exercises")
        needs_solutions = set(self.wanted) - {"exercises"}
        self.solutions = (
            weeks.import_file(self.folder / exercises.SOLUTIONS, "course_solutions")
            if needs_solutions
            else None
        )
        self.all_cards = exercises.cards(self.stubs)
        self.cards = [card for card in self.all_cards if not self.names or card.name in self.names]
        self._check_names()
        self.write(exercises=[asdict(card) for card in self.cards])

    def _check_names(self) -> None:
        known = [card.name for card in self.all_cards]
        shown = f"{self.folder.name}/{exercises.STUBS}"
        if not known:
            raise CourseError(f"{shown} defines no exercise; mark its functions with @exercise(...).")
        for name in self.names:
            if name not in known:
                raise CourseError(f"There is no exercise {name!r} in {shown}; it has {', '.join(known)}.")
        wrong = getattr(self.solutions, "WRONG_ANSWERS", {})
        for name in wrong:
            if name not in known:
                raise CourseError(f"WRONG_ANSWERS names {name!r}, which is no exercise of {shown}.")
        for name in known:
            if self.solutions is not None and not hasattr(self.solutions, name):
                raise CourseError(f"{self.folder.name}/{exercises.SOLUTIONS} does not solve {name!r}.")

    def write(self, **record: Any) -> None:
        with self.report.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def variants(self, name: str) -> list[str]:
        """The answers to test for one exercise."""
        wrong = getattr(self.solutions, "WRONG_ANSWERS", {}).get(name, ())
        chosen = [variant for variant in ("exercises", "solutions") if variant in self.wanted]
        return chosen + [f"wrong {n + 1}" for n in range(len(wrong)) if "wrong" in self.wanted]

    def answers(self, name: str, variant: str) -> Any:
        """What the fixture holds: the reader's module, the solutions, or these with one wrong answer."""
        if variant == "exercises":
            return self.stubs
        if variant == "solutions":
            return self.solutions
        wrong = self.solutions.WRONG_ANSWERS[name][int(variant.split()[1]) - 1]
        return SimpleNamespace(**{**vars(self.solutions), name: wrong})


def pytest_configure(config: pytest.Config) -> None:
    """Load the week's files; a problem with them is written to the report and ends pytest."""
    request = json.loads(os.environ["COURSE_EXERCISES"])
    try:
        config.course_session = _Session(request)
    except CourseError as error:
        line = json.dumps({"problem": str(error)})
        Path(request["report"]).write_text(line + "\n", encoding="utf-8")
        pytest.exit(str(error), returncode=4)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run of a test for each set of answers that is asked for."""
    if "answers" not in metafunc.fixturenames:
        return
    session: _Session = metafunc.config.course_session
    name = exercises.exercise_of(metafunc.function.__name__, [card.name for card in session.all_cards])
    if name is None:
        problem = f"{metafunc.function.__name__} names no exercise; call it test_<exercise>_…"
        session.write(problem=f"{session.folder.name}/{exercises.TESTS}: {problem}.")
        pytest.exit(problem, returncode=4)
    wanted = session.variants(name) if name in {card.name for card in session.cards} else []
    metafunc.parametrize("answers", [(name, variant) for variant in wanted], indirect=True, ids=wanted)


@pytest.fixture
def answers(request: pytest.FixtureRequest) -> Any:
    """The functions under test, as attributes."""
    return request.config.course_session.answers(*request.param)


def _identity(item: pytest.Item) -> dict[str, str] | None:
    parameters = getattr(item, "callspec", None)
    chosen = parameters.params.get("answers") if parameters is not None else None
    if not isinstance(
        chosen, tuple
    ):  # no fixture `answers`, or nothing to test with this one: pytest skips it
        return None
    name, variant = chosen
    return {"exercise": name, "test": item.nodeid.split("::", 1)[1], "answers": variant}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note which test is running, for the case that it never ends."""
    if identity := _identity(item):
        item.config.course_session.write(started=identity)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    """Write how a test ended."""
    report = yield
    identity = _identity(item)
    if identity and (report.when == "call" or not report.passed):
        session: _Session = item.config.course_session
        error, message = (None, "")
        if not report.passed:  # skipped is not passed
            error, message = _explain(call.excinfo.value, session.folder)
        session.write(result={**identity, "error": error, "message": message})
    return report


def _explain(error: BaseException, folder: Path) -> tuple[str, str]:
    """The kind of a failure, and what to tell the reader."""
    text = str(error)
    if text.startswith("Timeout"):
        return (
            "timeout",
            f"It ran for more than {exercises.TEST_SECONDS} s and was stopped; is there an endless loop?",
        )
    if isinstance(error, AssertionError | pytest.fail.Exception):
        said = text.split("\nassert ")[0]  # what follows is pytest's own account of the expression
        lines = [line.rstrip() for line in said.splitlines() if line.strip()]
        return "assertion", "\n".join(lines[:_MESSAGE_LINES]) or "A check failed without a message."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == folder]
    own = [frame for frame in frames if Path(frame.filename).name != exercises.TESTS]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    first_line = text.strip().splitlines()[0] if text.strip() else ""
    return type(error).__name__, f"{type(error).__name__}: {first_line}{where}".replace(": (", " (")
