"""Exercises: cards, and verdicts that tell a reader what is wrong."""

import pytest
from course_root import WEEK

from shared.curriculum import exercises
from shared.runtime.errors import CourseError

CARD = '@exercise(minutes=5, difficulty=1, teaches="sums", hint="Use +.")\n'
STUBS = f"""\
from shared.curriculum.exercises import exercise

{CARD}def add(a, b):
    raise NotImplementedError

{CARD}def add_three(a, b, c):
    raise NotImplementedError
"""
SOLUTIONS = """\
def add(a, b):
    return a + b

def add_three(a, b, c):
    return a + b + c

WRONG_ANSWERS = {
    "add": [lambda a, b: a - b, lambda a, b: a + b],
    "add_three": [lambda a, b, c: a + b, lambda a, b, c: 1 / 0],
}
"""
TESTS = """\
import pytest

@pytest.mark.parametrize("b", [0, 2])
def test_add_gives_the_sum(answers, b):
    assert answers.add(1, b) == 1 + b, f"1 + {b} gave {answers.add(1, b)}"

def test_add_three_gives_the_sum(answers):
    assert answers.add_three(1, 2, 4) == 7
"""


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / WEEK
    folder.mkdir(parents=True)
    (folder / exercises.STUBS).write_text(STUBS)
    (folder / exercises.SOLUTIONS).write_text(SOLUTIONS)
    (folder / exercises.TESTS).write_text(TESTS)
    return tmp_path


def answer(root, old, new):
    path = root / WEEK / exercises.STUBS
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def verdicts(root, *names, **options):
    return {
        verdict.exercise.name: verdict for verdict in exercises.check("week1", names, root=root, **options)
    }


def test_the_decorator_leaves_the_stub_alone_and_keeps_its_card():
    @exercises.exercise(minutes=10, difficulty=3, teaches="doubling", hint="Twice.")
    def double(x):
        return 2 * x

    assert double(3) == 6
    assert double.__exercise__ == exercises.Exercise("double", 10, 3, "doubling", "Twice.")


@pytest.mark.parametrize("change", [{"minutes": 0}, {"difficulty": 0}, {"difficulty": 6}, {"hint": " "}])
def test_a_card_that_says_nothing_is_refused(change):
    with pytest.raises(ValueError, match="an exercise needs"):
        exercises.exercise(**({"minutes": 5, "difficulty": 1, "teaches": "x", "hint": "y"} | change))


def test_a_test_belongs_to_the_longest_exercise_name_that_it_starts_with():
    names = ["add", "add_three"]
    assert exercises.exercise_of("test_add_gives_the_sum", names) == "add"
    assert exercises.exercise_of("test_add_three_gives_the_sum", names) == "add_three"
    assert exercises.exercise_of("test_adder", names) is None


def test_stubs_are_not_started_and_solutions_pass(root):
    assert {verdict.status for verdict in verdicts(root).values()} == {exercises.NOT_STARTED}
    solved = verdicts(root, answers="solutions")
    assert {verdict.status for verdict in solved.values()} == {exercises.PASSED}
    assert (solved["add"].passed, solved["add"].total) == (2, 2)


def test_a_failing_answer_is_told_what_is_wrong(root):
    answer(root, "def add(a, b):\n    raise NotImplementedError", "def add(a, b):\n    return a - b")
    found = verdicts(root)
    assert found["add"].status == exercises.FAILING
    assert found["add"].message == "1 + 2 gave -1"
    assert (found["add"].passed, found["add"].total) == (1, 2)
    assert found["add_three"].status == exercises.NOT_STARTED


def test_an_answer_that_raises_is_told_where(root):
    answer(root, "    raise NotImplementedError", "    return a + undefined")
    message = verdicts(root, "add")["add"].message
    assert message == "NameError: name 'undefined' is not defined (exercises.py, line 5)"


def test_only_the_named_exercise_is_checked(root):
    assert list(verdicts(root, "add_three")) == ["add_three"]


def test_an_endless_loop_is_stopped_and_the_others_are_still_checked(root, monkeypatch):
    monkeypatch.setattr(exercises, "TEST_SECONDS", 1)
    answer(root, "    raise NotImplementedError", "    while True: pass")
    answer(root, "    raise NotImplementedError", "    return a + b + c")
    found = verdicts(root)
    assert found["add"].status == exercises.TOO_SLOW
    assert "endless loop" in found["add"].message
    assert found["add_three"].status == exercises.PASSED


@pytest.mark.parametrize("end", ["abort()", "_exit(0)"])
def test_an_answer_that_ends_python_is_named_and_no_other_is_said_to_lack_tests(root, end):
    answer(root, "    raise NotImplementedError", f"    import os; os.{end}")
    found = verdicts(root)
    assert found["add"].status == exercises.FAILING
    assert "It ended Python itself" in found["add"].message
    assert found["add_three"].status == exercises.FAILING
    assert "Not tested" in found["add_three"].message


def test_tests_that_never_end_together_are_stopped(root, monkeypatch):
    monkeypatch.setattr(exercises, "TOTAL_SECONDS", 3)
    answer(root, "    raise NotImplementedError", "    while True: pass")
    found = verdicts(root)
    assert [found[name].status for name in ("add", "add_three")] == [exercises.TOO_SLOW] * 2
    assert found["add"].message == "It did not come to an end."


def test_a_skipped_test_is_not_passed(root):
    answer(root, "    raise NotImplementedError", "    import pytest; pytest.skip('later')")
    verdict = verdicts(root, "add")["add"]
    assert (verdict.status, verdict.passed) == (exercises.FAILING, 0)
    assert "Skipped: later" in verdict.message


def test_a_wrong_answer_is_tested_in_the_place_of_its_solution(root):
    _, results = exercises.run_tests("week1", ["wrong"], root=root)
    errors = {(result.exercise, result.answers): [] for result in results}
    for result in results:
        errors[result.exercise, result.answers].append(result.error)
    assert errors == {
        ("add", "wrong 1"): [None, "assertion"],
        ("add", "wrong 2"): [None, None],  # it is right: nothing catches it
        ("add_three", "wrong 1"): ["assertion"],
        ("add_three", "wrong 2"): ["ZeroDivisionError"],
    }


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        (exercises.STUBS, "def add(:\n", r"exercises.py does not load: SyntaxError.*\(line 1\)"),
        (exercises.STUBS, "x = 1\n", "exercises.py defines no exercise"),
        (exercises.TESTS, "def test_subtract(answers): pass\n", "test_subtract names no exercise"),
        (exercises.TESTS, "import nothing_of_the_kind\n", "The tests of week1 could not be run"),
        (exercises.SOLUTIONS, "def add(a, b): return a + b\n", "solutions.py does not solve 'add_three'"),
        (exercises.SOLUTIONS, SOLUTIONS.replace('"add":', '"sub":'), "WRONG_ANSWERS names 'sub'"),
    ],
)
def test_week_files_that_do_not_fit_are_reported_in_one_sentence(root, file, text, complaint):
    (root / WEEK / file).write_text(text)
    with pytest.raises(CourseError, match=complaint) as caught:
        exercises.check("week1", answers="solutions", root=root)
    assert "\n" not in str(caught.value)


def test_an_unknown_exercise_is_refused_with_those_there_are(root):
    with pytest.raises(CourseError, match=r"no exercise 'sub' in .*; it has add, add_three\."):
        exercises.check("week1", ["sub"], root=root)


def test_a_week_without_exercises_says_so(root):
    with pytest.raises(CourseError, match="week2 has no exercises yet"):
        exercises.check("week2", root=root)
