"""Exercises: a stub to fill in, tests that say what is wrong with it, a hint, a solution, and wrong answers.

A week folder holds three files. `exercises.py` has the stubs:

    @exercise(minutes=10, difficulty=2, teaches="what a causal mask is", hint="torch.tril keeps a triangle.")
    def causal_mask(T: int) -> torch.Tensor:
        \"\"\"Which position may attend to which: (T, T), bool, True where it may.\"\"\"
        raise NotImplementedError

`solutions.py` has functions of the same names, and `WRONG_ANSWERS = {"causal_mask": [transposed, shifted]}`,
two or more an exercise, which the tests must catch. `test_exercises.py` tests what fixture `answers` holds:

    def test_causal_mask_lets_no_position_see_later_ones(answers):
        mask = answers.causal_mask(4)
        assert not mask.triu(1).any(), f"position 0 sees position {int(mask[0].nonzero().max())}"

A test belongs to the exercise whose name its own starts with, after `test_`; the message of its assertion is
what the reader is told, so it says what is wrong.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shared.curriculum import weeks
from shared.runtime import artifacts
from shared.runtime.errors import CourseError

STUBS, SOLUTIONS, TESTS = "exercises.py", "solutions.py", "test_exercises.py"
PASSED, NOT_STARTED, FAILING, TOO_SLOW = "passed", "not started", "failing", "too slow"
TEST_SECONDS = 20  # one test; a reader's loop may never end
TOTAL_SECONDS = 600
_PYTEST_PROBLEMS = (2, 3, 4, 5)  # interrupted, internal error, wrong usage, no test
_ORDER = (
    NOT_STARTED,
    TOO_SLOW,
    FAILING,
    PASSED,
)  # the first that any test of an exercise shows is its status

Answer = TypeVar("Answer", bound=Callable[..., Any])


@dataclass(frozen=True)
class Exercise:
    """The card of one exercise.

    Attributes:
        name: the function (or class) to write.
        minutes: how long it takes, about.
        difficulty: 1 (a line) to 5 (an evening).
        teaches: what it is good for, half a sentence.
        hint: shown with a failing verdict.
    """

    name: str
    minutes: int
    difficulty: int
    teaches: str
    hint: str


@dataclass(frozen=True)
class TestResult:
    """How one test of an exercise ended with one set of answers.

    Attributes:
        answers: "exercises", "solutions", or "wrong 1", "wrong 2", … for the n-th wrong answer.
        error: None, "assertion", "timeout", or the name of another exception.
        message: what the failed check said.
    """

    __test__ = False  # pytest would take the class for a group of tests

    exercise: str
    test: str
    answers: str
    error: str | None = None
    message: str = ""

    @property
    def status(self) -> str:
        """ "passed", "not started", "too slow" or "failing"."""
        return {None: PASSED, "NotImplementedError": NOT_STARTED, "timeout": TOO_SLOW}.get(
            self.error, FAILING
        )


@dataclass(frozen=True)
class Verdict:
    """What `course check` says about one exercise; `message` is empty unless it is failing or too slow."""

    exercise: Exercise
    status: str
    message: str
    passed: int
    total: int


def exercise(*, minutes: int, difficulty: int, teaches: str, hint: str) -> Callable[[Answer], Answer]:
    """Mark a stub as an exercise; the stub itself is unchanged.

    Raises:
        ValueError: `minutes` is not positive, `difficulty` is not 1 to 5, or a text is empty.
    """
    if minutes < 1 or difficulty not in range(1, 6) or not teaches.strip() or not hint.strip():
        raise ValueError("an exercise needs minutes ≥ 1, difficulty 1 to 5, teaches and hint")

    def mark(answer: Answer) -> Answer:
        answer.__exercise__ = Exercise(answer.__name__, minutes, difficulty, teaches, hint)
        return answer

    return mark


def cards(module: Any) -> tuple[Exercise, ...]:
    """The cards of the exercises that a loaded `exercises.py` defines."""
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    return tuple(value.__exercise__ for value in own if hasattr(value, "__exercise__"))


def exercise_of(test_name: str, names: Sequence[str]) -> str | None:
    """Which of the exercises `names` a test belongs to: the longest that follows `test_`."""
    rest = test_name.removeprefix("test_")
    fitting = [name for name in names if rest == name or rest.startswith(f"{name}_")]
    return max(fitting, key=len, default=None)


def run_tests(
    week: str, answers: Sequence[str], names: Sequence[str] = (), root: Path | None = None
) -> tuple[list[Exercise], list[TestResult]]:
    """Run a week's `test_exercises.py` in a process of its own.

    Args:
        week: such as "week2".
        answers: which answers to test: any of "exercises", "solutions", "wrong" (every wrong answer).
        names: exercises to test; all for none.
        root: the course's folder; the repository by default.

    Returns:
        the cards of the exercises tested, and one result a test and answer.

    Raises:
        CourseError: no such week or exercise, a file is missing or does not load, or the tests cannot be run.
    """
    found = weeks.find(week, root)
    for name in (STUBS, SOLUTIONS, TESTS) if set(answers) - {"exercises"} else (STUBS, TESTS):
        if not (found.folder / name).exists():
            raise CourseError(f"{found.slug} has no exercises yet: there is no {found.folder.name}/{name}.")
    with tempfile.TemporaryDirectory(prefix="course-check-") as temporary:
        report = Path(temporary) / "report.jsonl"
        request = {"folder": str(found.folder), "answers": list(answers), "names": list(names)}
        code, output = _pytest(found.folder / TESTS, {**request, "report": str(report)}, Path(temporary))
        lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    return _read_report(found, [json.loads(line) for line in lines], code, output)


def _pytest(tests: Path, request: dict[str, Any], folder: Path) -> tuple[int | None, str]:
    """Run pytest over `tests`: its exit status, None if it had to be ended, and what it printed."""
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "--tb=no", "-c", os.devnull]
    command += ["-p", "shared.curriculum.exercise_plugin", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    command += [f"--rootdir={tests.parent}", f"--timeout={TEST_SECONDS}"]
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
    )
    environment = {
        **os.environ,
        **artifacts.environment(),
        "COURSE_EXERCISES": json.dumps(request),
        "PYTHONPATH": path,
    }
    environment |= {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    try:
        ended = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOTAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return ended.returncode, ended.stdout + ended.stderr


def _read_report(
    week: weeks.Week, records: list[dict[str, Any]], code: int | None, output: str
) -> tuple[list[Exercise], list[TestResult]]:
    problem = next((record["problem"] for record in records if "problem" in record), None)
    if problem:
        raise CourseError(problem)
    exercises = [Exercise(**card) for record in records for card in record.get("exercises", ())]
    if code in _PYTEST_PROBLEMS or not exercises:
        last = [
            line for line in output.splitlines() if line.strip().startswith(("E ", "ERROR", "INTERNALERROR"))
        ]
        reason = last[-1].strip() if last else (output.strip().splitlines() or ["pytest gave no output"])[-1]
        raise CourseError(f"The tests of {week.slug} could not be run: {reason}")
    lost = {"error": "crash", "message": "It ended Python itself: a crash in native code, or an exit."}
    if code is None:
        lost = {"error": "timeout", "message": "It did not come to an end."}
    results: dict[tuple[str, str], TestResult] = {}
    for record in records:
        if "started" in record:  # stands if the process ended while this test ran
            result = TestResult(**record["started"], **lost)
            results[result.test, result.answers] = result
        if "result" in record:
            result = TestResult(**record["result"])
            results[result.test, result.answers] = result
    found = list(results.values())
    if any(result.error == lost["error"] for result in found):
        tested = {result.exercise for result in found}
        lost["message"] = "Not tested: an earlier test ended the process, or was ended with it."
        found += [TestResult(card.name, "", "", **lost) for card in exercises if card.name not in tested]
    return exercises, found


def check(
    week: str, names: Sequence[str] = (), *, answers: str = "exercises", root: Path | None = None
) -> list[Verdict]:
    """Test a reader's answers, or the solutions.

    Args:
        week: such as "week2".
        names: exercises to check; all for none.
        answers: "exercises" or "solutions".
        root: the course's folder; the repository by default.

    Raises:
        CourseError: as `run_tests`.
    """
    exercises, results = run_tests(week, [answers], names, root)
    return [
        _verdict(card, [result for result in results if result.exercise == card.name]) for card in exercises
    ]


def _verdict(card: Exercise, results: Sequence[TestResult]) -> Verdict:
    if not results:
        return Verdict(card, FAILING, f"{TESTS} has no test for it.", 0, 0)
    worst = min(results, key=lambda result: _ORDER.index(result.status))
    passed = sum(result.status == PASSED for result in results)
    message = worst.message if worst.status in (FAILING, TOO_SLOW) else ""
    return Verdict(card, worst.status, message, passed, len(results))
