"""`course`: answers at once, says what is wrong in one sentence, and ends with the right status."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from course_root import WEEK, add_claiming_notebook

from shared.cli import LATER, display, main, streams
from shared.curriculum import exercises, runner, status
from shared.runtime import files
from shared.runtime.errors import CourseError

FAULTS = """\
from shared.curriculum.faults import Curve, Fault, replaced

class Model:
    rate = 1.0

def experiment():
    return Curve([0, 1, 2, 3], [4 - Model.rate * x for x in range(4)])

def fault(name, rate):
    plant = lambda: replaced(Model, "rate", rate)
    seen_by = "tests/unit/test_x.py::test_y"
    return Fault(name, f"The slope is {rate}.", f"Look at its slope, {name[0]}.", seen_by, plant, experiment)

FAULTS = [fault("too_slow", 0.1), fault("wrong_sign", -1.0)]
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A course of its own with one week, faults, exercises and no results."""
    monkeypatch.setattr(files, "repository_root", lambda: tmp_path)
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "artifacts"))
    add_claiming_notebook(tmp_path, "01_good", "good", "0.75")
    (tmp_path / WEEK / "faults.py").write_text(FAULTS)
    (tmp_path / WEEK / "exercises.py").write_text(
        "from shared.curriculum.exercises import exercise\n\n"
        '@exercise(minutes=5, difficulty=1, teaches="sums", hint="Use +.")\n'
        "def add(a, b):\n    raise NotImplementedError\n"
    )
    (tmp_path / WEEK / "test_exercises.py").write_text(
        "def test_add_gives_the_sum(answers):\n    assert answers.add(1, 2) == 3, 'not 3'\n"
    )
    return tmp_path


def fresh(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["run", "--help"]])
def test_help_and_list_import_nothing_heavy(arguments):
    code = (
        "import sys; from shared.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'transformers', 'papermill', 'psutil', 'matplotlib'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr)"
    )
    assert fresh("-c", code, *arguments).stderr.strip() == "[]"


def test_python_m_shared_is_course():
    done = fresh("-m", "shared", "list", "--json")
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) == 18


COMMANDS = ["list", "run", "check", "debug", "status", "calibrate", "devlog", *LATER]
IN_GROUPS = [["tokenizer", name] for name in ("train", "inspect", "encode", "decode")]


@pytest.mark.parametrize("command", [[name] for name in COMMANDS if name != "tokenizer"] + IN_GROUPS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_help_with_an_example(command, option, capsys):
    assert main([*command, option]) == 0
    assert f"Example: course {' '.join(command)}" in capsys.readouterr().out


def test_the_help_lists_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"│ {command} " in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run", "week99"], "There is no week 'week99'"),
        (["run", "week3"], "week3 is planned and not written yet; ready: week1"),
        (["run", "week1/07"], "There is no notebook '07' in week1; it has 01_good"),
        (["run", "--scale", "tpu"], "Unknown scale 'tpu'"),
        (["run", "--scale", "h100x2"], "Scale 'h100x2' needs two GPUs"),
        (["run", "--jobs", "0"], "--jobs"),
        (["run", "--seed", "x"], "--seed"),
        (["run", "--nonsense"], "--nonsense"),
        (["check"], "WEEK"),
        (["check", "week1", "nope"], "There is no exercise 'nope'"),
        (["check", "week2"], "week2 has no exercises yet"),
        (["debug", "week2"], "week2 is planned and not written yet"),
        (["debug", "week1", "--fault", "9"], "week1 has 2 cases; choose --fault 1 to 2"),
        (["debug", "week1", "--answer", "too_slow"], "Say which case"),
        (["debug", "week1", "--fault", "1", "--answer", "nope"], "There is no fault 'nope'"),
        (["devlog"], "There is no devlog template"),
        (["devlog", "week1"], "There is no docs/weekly-logs/week-01.template.md"),
        (["calibrate", "week9"], "week9 is planned"),
    ],
)
def test_bad_input_gets_one_sentence_and_status_two(root, arguments, complaint, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert shown.err.startswith("course: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_malformed_claims_stop_a_run_before_it_starts(root, capsys):
    path = root / WEEK / "claims.yaml"
    path.write_text(path.read_text().replace("null: 0.0", "null: 0.9"))
    assert main(["run"]) == 2
    assert "week1-attention/claims.yaml, claim 'good': key 'null'" in capsys.readouterr().err
    assert not runner.results_path().exists()


def test_results_that_are_no_results_are_reported(root, capsys):
    path = runner.results_path()
    path.parent.mkdir(parents=True)
    path.write_text("[{]")
    assert main(["status"]) == 2
    assert "is not readable as results; remove it" in capsys.readouterr().err


def test_debug_shows_the_traceback(root):
    with pytest.raises(CourseError, match="no week"):
        main(["run", "week99", "--debug"])


def test_ctrl_c_is_status_130(root, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "collect", interrupted)
    assert main(["status"]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_results_that_cannot_be_printed_are_one_sentence():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "shared", "list", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "course: No space left on device; --debug shows where it happened.\n"


def test_a_reader_that_closes_the_pipe_is_no_error_message():
    command = [sys.executable, "-m", "shared", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_numbers_that_are_not_finite_are_null_for_programs(capsys):
    streams.print_json({"loss": [float("nan"), (1.5, float("inf"))], "kind": "größer"})
    assert json.loads(capsys.readouterr().out) == {"loss": [None, [1.5, None]], "kind": "größer"}


def test_a_run_that_cannot_go_on_shows_what_has_ended(root, monkeypatch, capsys):
    def one_and_a_full_disk(planned, **_):
        yield runner.Entry("01_good", "week1", "cpu", 0, "passed", 1.0, 100.0)
        raise CourseError("the disk is full")

    monkeypatch.setattr(runner, "run", one_and_a_full_disk)
    assert main(["run"]) == 2
    shown = capsys.readouterr()
    assert "01_good" in shown.out
    assert shown.err.strip() == "course: the disk is full"


def test_two_checks_that_end_at_once_are_both_remembered(root):
    def solved(name):
        card = exercises.Exercise(name, 5, 1, "x", "y")
        return exercises.Verdict(card, exercises.PASSED, "", 1, 1)

    names = [f"e{number}" for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda name: status.record_exercises("week1", [solved(name)]), names))
    assert sorted(status._solved()["week1"]) == sorted(names)


@pytest.mark.parametrize("content", ["", "[]", '{"week1": 3}'])
def test_verdicts_that_are_none_are_reported(root, content, capsys):
    path = status._exercises_path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert main(["status"]) == 2
    assert "exercises.json is not readable; remove it" in capsys.readouterr().err


def test_brackets_in_a_fault_are_shown(root, capsys):
    path = root / WEEK / "faults.py"
    path.write_text(FAULTS.replace("::test_y", "::test_y[plain]"))
    assert main(["debug", "week1", "--fault", "2", "--answer", "wrong_sign"]) == 0
    assert "::test_y[plain]" in capsys.readouterr().out


def test_the_clinic_confirms_the_right_answer_and_names_the_check(root, capsys):
    assert main(["debug", "week1", "--fault", "2", "--answer", "wrong_sign"]) == 0
    shown = capsys.readouterr().out
    assert "Right: wrong sign. The slope is -1.0." in shown
    assert "tests/unit/test_x.py::test_y" in shown
    assert "● healthy" in shown
    assert "× with the fault" in shown


def test_the_clinic_answers_a_wrong_guess_with_a_hint(root, capsys):
    assert main(["debug", "week1", "--fault", "2", "--answer", "too_slow"]) == 1
    shown = capsys.readouterr().out
    assert "Look at its slope, w." in shown
    assert "The slope is -1.0." not in shown


def test_the_clinic_asks_again_after_a_wrong_guess(root, monkeypatch, capsys):
    guesses = iter(["7", "too slow", "2"])
    monkeypatch.setattr("typer.prompt", lambda text: next(guesses))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert main(["debug", "week1", "--fault", "2"]) == 0
    assert "Please give a number from 1 to 2" in capsys.readouterr().out


def test_check_gives_a_verdict_and_remembers_what_is_solved(root, capsys):
    assert main(["check", "week1"]) == 1
    assert "not started" in capsys.readouterr().out
    path = root / WEEK / exercises.STUBS
    path.write_text(path.read_text().replace("raise NotImplementedError", "return a - b"))
    assert main(["check", "week1", "add"]) == 1
    shown = capsys.readouterr().out
    assert "not 3" in shown
    assert "Hint: Use +." in shown
    path.write_text(path.read_text().replace("a - b", "a + b"))
    assert main(["check", "week1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["status"] == "passed"
    assert main(["status", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["exercises"] == [{"week": "week1", "solved": 1, "total": 1}]
    assert state["notebooks"] == [{"key": "week1/01_good", "entry": None, "stale": False}]


def test_status_counts_what_is_built(root, capsys):
    from shared.runtime import artifacts

    artifacts.build(
        "models/tiny", {"a": 1}, lambda folder: (folder / "x.bin").write_bytes(bytes(2_000_000)) and None
    )
    unfinished = artifacts.home() / "models" / "tiny" / ".abc.xyz.tmp"
    unfinished.mkdir()
    (unfinished / "lineage.json").write_text("{}")
    assert main(["status", "--json"]) == 0
    assert [kind["count"] for kind in json.loads(capsys.readouterr().out)["artefacts"]] == [1]
    assert main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "models/tiny" in shown
    assert "2 MB" in shown
    assert "never run" in shown


def test_list_says_which_weeks_are_ready(root, capsys):
    assert main(["list", "--json"]) == 0
    found = {week["week"]: week for week in json.loads(capsys.readouterr().out)}
    assert found["week1"]["status"] == "ready"
    assert found["week1"]["notebooks"] == ["01_good"]
    assert found["week2"]["status"] == "planned"
    assert found["week17-18"]["numbers"] == [17, 18]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min")],
)
def test_durations_read_well(seconds, shown):
    assert display.duration(seconds) == shown


def test_a_plot_carries_its_numbers_and_leaves_out_what_is_not_finite():
    text = display.plot(
        {"a": ([0, 1, 2], [1.0, 2.0, 3.0]), "b": ([0, 1, 2], [3.0, float("nan"), float("inf")])},
        x_label="step",
        y_label="loss (nats)",
        width=20,
        height=5,
    ).plain
    lines = text.splitlines()
    assert lines[0] == "loss (nats)"
    assert lines[1].split("┤")[0].strip() == "3"
    assert lines[3].split("┤")[0].strip() == "2"
    assert lines[5].split("┤")[0].strip() == "1"
    assert lines[1].endswith("●")
    assert lines[1].split("┤")[1].startswith("×")
    assert lines[5].split("┤")[1].startswith("●")
    with pytest.raises(ValueError, match="nothing to plot"):
        display.plot({"a": ([0], [float("nan")])}, x_label="x", y_label="y")
