"""Scale, hardware, files and artefacts: the floor that everything else stands on."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shared.runtime import artifacts, files, hardware, scale
from shared.runtime.errors import CourseError


def machine(*gpus: hardware.GPU) -> hardware.Hardware:
    return hardware.Hardware(2, 8.0, gpus, False, "fp32: made up")


H100 = hardware.GPU("H100", 80.0, (9, 0))
RTX = hardware.GPU("RTX", 10.0, (8, 6))


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [((), "cpu"), ((RTX,), "gpu"), ((H100,), "gpu"), ((RTX, RTX), "gpu"), ((H100, H100), "h100x2")],
)
def test_auto_picks_the_largest_scale_that_the_machine_has(gpus, expected):
    name, reason = scale.resolve("auto", machine(*gpus))
    assert name == expected
    assert reason.startswith(expected)


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("tiny", (), "Unknown scale 'tiny'"),
        ("gpu", (), "needs a CUDA device"),
        ("h100x2", (H100,), "this machine has 1"),
    ],
)
def test_a_scale_that_cannot_be_is_refused_in_one_sentence(name, gpus, message):
    with pytest.raises(CourseError, match=message):
        scale.resolve(name, machine(*gpus))


def test_start_seeds_python_numpy_and_torch(capsys):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    chosen = scale.start("cpu", 7)
    first = draw()
    scale.start("cpu", 7, quiet=True)
    assert draw() == first
    scale.start("cpu", 8, quiet=True)
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in chosen.reasons)
    assert chosen.pick(cpu=1, gpu=2, h100x2=3) == 1


@pytest.mark.parametrize("threads", ["0", "-1", "two", ""])
def test_a_bad_course_threads_is_named(monkeypatch, threads):
    monkeypatch.setenv("COURSE_THREADS", threads)
    with pytest.raises(CourseError, match="COURSE_THREADS"):
        scale.choose_threads(2)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(CourseError, match="out of range"):
        scale.seed_everything(seed)


def test_autocast_runs_matrix_products_in_the_chosen_dtype():
    chosen = scale.Scale("cpu", torch.device("cpu"), torch.bfloat16, 1, 0, ())
    with chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    plain = scale.Scale("cpu", torch.device("cpu"), torch.float32, 1, 0, ())
    with plain.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_cores_respect_the_affinity_of_the_process():
    cores = sorted(os.sched_getaffinity(0))
    code = "from shared.runtime.hardware import available_cores; print(available_cores())"
    command = ["taskset", "-c", str(cores[0]), sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "1"


def test_atomic_write_keeps_the_old_content_when_the_disk_is_full(tmp_path, monkeypatch):
    target = tmp_path / "notes.txt"
    files.atomic_write(target, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CourseError, match="the disk is full"):
        files.atomic_write(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_an_unwritable_folder_is_named_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="Cannot write .*file"):
        files.atomic_write(tmp_path / "file" / "below.txt", "x")


def test_atomic_directory_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), files.atomic_directory(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("the block failed")
    assert os.listdir(tmp_path) == []
    with files.atomic_directory(target) as folder:
        (folder / "whole").write_text("x")
    with pytest.raises(CourseError, match="already exists"), files.atomic_directory(target):
        pass
    with files.atomic_directory(target, replace=True) as folder:
        (folder / "second").write_text("y")
    assert os.listdir(target) == ["second"]
    assert os.listdir(tmp_path) == ["model"]


def test_an_interrupt_while_a_folder_is_replaced_keeps_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "model"
    with files.atomic_directory(target) as folder:
        (folder / "old").write_text("x")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(files.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), files.atomic_directory(target, replace=True) as folder:
        (folder / "new").write_text("y")
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_is_replaced_in_one_step_where_the_system_can(tmp_path, monkeypatch):
    target, other = tmp_path / "model", tmp_path / "other"
    target.mkdir()
    other.mkdir()
    if not files._exchange(target, other):
        pytest.skip("two folders cannot change places on this file system")

    def two_steps(*_):
        raise AssertionError("a kill between two renames would lose the folder")

    monkeypatch.setattr(files.os, "rename", two_steps)
    monkeypatch.setattr(files.os, "replace", two_steps)
    with files.atomic_directory(target, replace=True) as folder:
        (folder / "new").write_text("y")
    assert os.listdir(target) == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["model", "other"]


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(CourseError, match="already exists"), files.atomic_directory(target) as folder:
        (folder / "mine").write_text("x")
        target.mkdir()
        (target / "theirs").write_text("y")
    assert os.listdir(target) == ["theirs"]


def test_a_process_in_another_folder_is_given_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_HOME", "mine")
    monkeypatch.delenv("COURSE_DATA", raising=False)
    assert artifacts.environment() == {"COURSE_HOME": str(tmp_path / "mine")}


def test_a_path_that_leads_out_of_its_folder_is_refused(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "link").symlink_to(tmp_path)
    assert files.inside(tmp_path / "inner", "a/b.txt") == (tmp_path / "inner" / "a" / "b.txt").resolve()
    for name in ("../secret", "/etc/passwd", "link/secret"):
        with pytest.raises(CourseError, match="leads out of"):
            files.inside(tmp_path / "inner", name)


@pytest.fixture
def course_home(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_artefact_is_built_once_and_again_when_anything_that_decides_it_changes(course_home):
    calls = []

    def make(folder: Path):
        calls.append(folder)
        (folder / "data").write_text("x")
        return {"size": 1}

    first = artifacts.build("demo", {"a": 1, "b": 2}, make)
    assert artifacts.build("demo", {"b": 2, "a": 1}, make) == first
    assert len(calls) == 1
    record = artifacts.lineage(first)
    assert record["metrics"] == {"size": 1}
    others = {
        artifacts.build("demo", {"a": 1, "b": 3}, make),
        artifacts.build("demo", {"a": 1, "b": 2}, make, scale="gpu"),
        artifacts.build("demo", {"a": 1, "b": 2}, make, parents=[first]),
    }
    assert first not in others
    assert len(others) == 3
    child = artifacts.build("demo", {"a": 1, "b": 2}, make, parents=[first])
    assert artifacts.lineage(child)["parents"] == [record["key"]]


def test_a_build_that_fails_leaves_nothing_and_the_next_one_succeeds(course_home):
    def broken(folder: Path):
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        artifacts.build("demo", {}, broken)
    path = artifacts.build("demo", {}, lambda folder: {"ok": True})
    assert artifacts.lineage(path)["metrics"] == {"ok": True}


def _slow_build(queue):
    def make(folder: Path):
        time.sleep(0.3)
        queue.put("built")

    artifacts.build("demo", {"shared": True}, make)


def test_two_processes_that_ask_at_once_build_once(course_home):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_slow_build, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert queue.get(timeout=1) == "built"
    assert queue.empty()


def test_a_build_that_was_killed_is_cleared_away_by_the_next(course_home):
    script = (
        "import time; from shared.runtime import artifacts\n"
        "def make(folder):\n"
        "    (folder / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
        "artifacts.build('demo', {'k': 1}, make)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(name.endswith(".tmp") for name in os.listdir(course_home / "demo"))
    path = artifacts.build("demo", {"k": 1}, lambda folder: None)
    assert json.loads((path / "lineage.json").read_text())["config"] == {"k": 1}
    assert not any(name.endswith(".tmp") for name in os.listdir(course_home / "demo"))


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_a_folder_without_lineage_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "lineage.json").write_text(content)
    with pytest.raises(CourseError, match=r"not an artefact.*lineage\.json"):
        artifacts.lineage(tmp_path)
