"""Notebooks that behave badly, run for real: each test starts kernels."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from course_root import WEEK, add_claiming_notebook, add_notebook

from shared.cli import main
from shared.curriculum import execution, notebooks, runner, weeks
from shared.runtime import files

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A course of its own, with its own artefacts."""
    monkeypatch.setattr(files, "repository_root", lambda: tmp_path)
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "artifacts"))
    return tmp_path


def results(root):
    path = root / "artifacts" / "runs" / "course" / "results.json"
    return {entry["notebook"]: entry for entry in json.loads(path.read_text())}


def test_a_notebook_that_keeps_its_claim_passes_and_is_recorded(root, capsys):
    add_claiming_notebook(root, "01_good", "good", "0.75")
    assert main(["run", "week1"]) == 0
    entry = results(root)["01_good"]
    assert entry["status"] == "passed"
    assert entry["week"] == "week1"
    assert (entry["scale"], entry["seed"]) == ("cpu", 0)
    assert entry["seconds"] > 0
    assert 50 < entry["peak_rss_mb"] < 4000
    assert entry["error"] is None
    wanted = {"name": "good", "measured": 0.75, "unit": "fraction", "min": 0.5, "max": None, "holds": True}
    assert {key: entry["claims"][0][key] for key in wanted} == wanted
    assert "1/1" in capsys.readouterr().out


def test_the_scale_and_the_seed_reach_the_notebook(root):
    add_claiming_notebook(root, "01_seed", "good", 'float(scale == "cpu" and seed == 7)')
    assert main(["run", "--scale", "cpu", "--seed", "7"]) == 0
    assert results(root)["01_seed"]["seed"] == 7


def test_bad_notebooks_are_named_with_their_cell_and_the_others_still_run(root, capsys):
    add_claiming_notebook(
        root, "01_raises", "raised", "1.0", "x = 1", "print('so far')\nraise KeyError('gone')"
    )
    add_notebook(
        root, "02_hangs", "print('about to hang', flush=True)\nimport time\nwhile True: time.sleep(0.1)"
    )
    add_notebook(
        root,
        "03_eats",
        "print('hungry', flush=True)\nkept = []\nwhile True: kept.append(bytearray(50_000_000))",
    )
    add_claiming_notebook(root, "04_good", "good", "0.75")
    add_notebook(root, "05_dies", "import os\nprint('last words', flush=True)\nos._exit(3)")
    assert main(["run", "--timeout", "40", "--memory-limit", "1.0", "--jobs", "2"]) == 1
    entries = results(root)
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "01_raises": "error",
        "02_hangs": "timeout",
        "03_eats": "memory",
        "04_good": "passed",
        "05_dies": "error",
    }
    raised = entries["01_raises"]["error"]
    assert raised["cell"] == 4
    assert raised["message"] == "KeyError: 'gone'"
    assert "raise KeyError('gone')" in "\n".join(raised["last_lines"])
    assert "In[4]" in "\n".join(raised["last_lines"])  # as in the reader's own notebook
    assert entries["01_raises"]["claims"][0] | {"as_stated": None} == {
        "name": "raised",
        "measured": None,
        "unit": "fraction",
        "min": 0.5,
        "max": None,
        "holds": False,
        "as_stated": None,
    }
    assert entries["02_hangs"]["error"]["cell"] == 2
    assert entries["02_hangs"]["error"]["last_lines"] == ["about to hang"]
    assert entries["03_eats"]["error"]["last_lines"] == ["hungry"]
    assert entries["03_eats"]["peak_rss_mb"] > 1000
    assert "kernel died" in entries["05_dies"]["error"]["message"]
    shown = capsys.readouterr().out
    for expected in ("week1/02_hangs, cell [2]", "It did not end within 40 s", "KeyError: 'gone'"):
        assert expected in shown
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(root) in " ".join(p.info["cmdline"] or [])]


def test_a_claim_that_fails_or_is_never_measured_is_status_one(root, capsys):
    add_claiming_notebook(root, "01_low", "low", "0.25")
    add_claiming_notebook(root, "02_silent", "silent", "0.75")
    path = root / WEEK / "02_silent.ipynb"
    path.write_text(path.read_text().replace('claims.measure(\\"silent\\", 0.75)', "pass"))
    assert main(["run"]) == 1
    assert [entry["status"] for entry in results(root).values()] == ["failed", "failed"]
    shown = capsys.readouterr().out
    assert "low does not hold: measured 0.25, bound ≥ 0.5" in shown
    assert "silent does not hold: never measured" in shown


def test_what_has_not_changed_is_not_run_again(root, capsys):
    path = add_claiming_notebook(root, "01_good", "good", "0.75")
    assert main(["run"]) == 0
    first = results(root)["01_good"]
    assert main(["run"]) == 0
    assert results(root)["01_good"] == first
    assert "not changed since" in capsys.readouterr().out
    path.write_text(path.read_text().replace("0.75", "0.8"))
    assert main(["run"]) == 0
    assert results(root)["01_good"]["claims"][0]["measured"] == 0.8


def test_another_notebooks_result_is_kept(root):
    add_claiming_notebook(root, "01_good", "good", "0.75")
    add_claiming_notebook(root, "02_better", "better", "0.85")
    assert main(["run", "week1/01_good"]) == 0
    first = results(root)["01_good"]
    assert main(["run", "1/02"]) == 0
    assert results(root)["01_good"] == first
    assert results(root)["02_better"]["status"] == "passed"


def test_a_saved_notebook_holds_its_outputs_and_nothing_of_the_machine(root):
    path = add_claiming_notebook(
        root, "01_good", "good", "0.75", "import os\nprint(os.getcwd())\nprint(os.path.expanduser('~/x'))"
    )
    before = notebooks.read(path)
    assert main(["run", "--save"]) == 0
    after = notebooks.read(path)
    assert [cell["source"] for cell in after["cells"]] == [cell["source"] for cell in before["cells"]]
    assert [cell["execution_count"] for cell in after["cells"]] == [1, 2, 3, 4, 5]
    assert after["metadata"]["course"]["source_sha256"] == notebooks.source_sha256(before)
    assert notebooks.measured(after) == {"good": 0.75}
    text = path.read_text()
    assert str(root) not in text
    assert "papermill" not in text
    assert after["cells"][2]["outputs"][0]["text"] == [f"./{WEEK}\n", "~/x\n"]
    execution_problems = [p for p in notebooks.problems(after) if "eight steps" not in p]
    assert execution_problems == []


def test_a_notebook_that_fails_is_not_saved(root):
    path = add_claiming_notebook(root, "01_low", "low", "0.25")
    before = path.read_bytes()
    assert main(["run", "--save"]) == 1
    assert path.read_bytes() == before


def test_saving_with_another_seed_is_refused(root, capsys):
    add_claiming_notebook(root, "01_good", "good", "0.75")
    assert main(["run", "--save", "--seed", "3"]) == 2
    assert "seed 0" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_said_before_anything_runs(root, monkeypatch, capsys):
    add_claiming_notebook(root, "01_good", "good", "0.75")
    (root / "a-file").write_text("")
    monkeypatch.setenv("COURSE_HOME", str(root / "a-file"))
    assert main(["run"]) == 2
    complaint = capsys.readouterr().err
    assert "Cannot write the results" in complaint
    assert complaint.count("\n") == 1


def test_calibration_writes_the_spread_and_keeps_the_rest_of_the_file(root, capsys):
    add_claiming_notebook(root, "01_spread", "spread", "0.6 + 0.1 * seed")
    path = root / WEEK / "claims.yaml"
    before = path.read_text()
    assert main(["calibrate", "week1", "--seeds", "3", "--jobs", "2"]) == 0
    after = path.read_text()
    assert after.startswith(before)
    assert "calibrated: {seeds: 3, mean: 0.7, sd: 0.1, min: 0.6, max: 0.8, on:" in after
    assert "as stated" in capsys.readouterr().out


def test_calibration_reports_a_seed_that_breaks_the_bound(root, capsys):
    add_claiming_notebook(root, "01_spread", "spread", "0.6 - 0.2 * seed")
    assert main(["calibrate", "week1", "--seeds", "2"]) == 1
    assert "not as stated with seed 1" in capsys.readouterr().out
    assert "seeds: 2, mean: 0.5" in (root / WEEK / "claims.yaml").read_text()


def test_an_edit_while_the_notebook_runs_is_kept_and_the_others_still_run(root, capsys):
    path = root / WEEK / "01_edited.ipynb"
    edit = (
        f"p = __import__('pathlib').Path({str(path)!r})\np.write_text(p.read_text().replace('0.75', '0.8'))"
    )
    add_claiming_notebook(root, "01_edited", "edited", "0.75", edit)
    add_claiming_notebook(root, "02_good", "good", "0.75")
    assert main(["run", "--save"]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == (
        "course: Edited while running and so not saved: week1/01_edited; run again."
    )
    assert "02_good" in shown.out
    assert [entry["status"] for entry in results(root).values()] == ["passed", "passed"]
    assert notebooks.claims_record(notebooks.read(path)) is None
    assert notebooks.measured(notebooks.read(root / WEEK / "02_good.ipynb")) == {"good": 0.75}


def test_a_relative_course_home_means_the_same_folder_in_a_notebook(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setenv("COURSE_HOME", "artifacts")
    same = f"float(str(artifacts.home()) == {str(root / 'artifacts')!r})"
    add_claiming_notebook(root, "01_home", "home", same, "from shared.runtime import artifacts")
    assert main(["run"]) == 0


def test_the_fingerprint_covers_the_samples(root, monkeypatch):
    add_claiming_notebook(root, "01_good", "good", "0.75")
    samples = root / "shared" / "data" / "samples"
    samples.mkdir(parents=True)
    monkeypatch.setattr(runner, "__file__", str(root / "shared" / "curriculum" / "runner.py"))
    [book] = weeks.select([], root)
    seen = {runner.fingerprint(book, "cpu", 0, root)}
    for text in ("one", "two"):
        (samples / "story.txt").write_text(text)
        seen.add(runner.fingerprint(book, "cpu", 0, root))
    assert len(seen) == 3


def test_a_copy_that_was_cut_off_is_no_copy(root, tmp_path):
    path = add_notebook(root, "01_cut", "1")
    job = execution.Job(weeks.Notebook("week1", "01_cut", path), "cpu", 0)
    one = execution._Running(job, execution.Limits(), tmp_path, 1, notebooks.read(path))
    (tmp_path / "executed.ipynb").write_bytes(path.read_bytes()[:50])
    one._process = subprocess.Popen([sys.executable, "-c", ""])
    assert one._outcome(execution.MEMORY, 1.0, None).executed is None


def test_a_kernel_whose_runner_has_gone_before_it_looked_ends_itself(root, tmp_path):
    path = add_notebook(root, "01_orphan", "1")
    request = {"notebook": str(path), "cwd": str(root), "parameters": {}, "runner": os.getppid()}
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "shared.curriculum.kernel", str(tmp_path / "request.json")]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 1
    assert not (tmp_path / "result.json").exists()


def start_run(root, *arguments):
    """`course run` in a process of its own, on the course in `root`."""
    script = (
        "import sys; from pathlib import Path; from shared.runtime import files; "
        "from shared.cli import main; "
        f"files.repository_root = lambda: Path({str(root)!r}); sys.exit(main(['run', *sys.argv[1:]]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COURSE_HOME": str(root / "artifacts")},
        cwd=Path(__file__).parents[2],
    )


def wait_for(condition, seconds=90):
    """Poll until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture
def hanging(root):
    """A course whose first notebook passes and whose second writes a file and hangs."""
    add_claiming_notebook(root, "01_good", "good", "0.75")
    started = root / "started"
    write = f"import os, pathlib\npathlib.Path({str(started)!r}).write_text(str(os.getpid()))"
    add_notebook(root, "02_hangs", write, "import time\nwhile True: time.sleep(0.1)")
    return started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_kernels_and_keeps_what_is_finished(root, hanging, number):
    process = start_run(root)
    wait_for(lambda: hanging.exists() and hanging.read_text())
    kernel = int(hanging.read_text())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in err
    assert "01_good" in out
    assert not psutil.pid_exists(kernel)
    assert list(results(root)) == ["01_good"]


def test_kill_nine_leaves_old_results_whole_and_no_kernel_behind(root, hanging):
    assert main(["run", "week1/01_good"]) == 0
    path = runner.results_path()
    before = path.read_bytes()
    process = start_run(root, "week1/02_hangs")
    wait_for(lambda: hanging.exists() and hanging.read_text())
    kernel = int(hanging.read_text())
    process.kill()
    process.wait()
    assert path.read_bytes() == before
    wait_for(lambda: not psutil.pid_exists(kernel), seconds=20)
    assert main(["run", "week1/01_good", "--force"]) == 0
