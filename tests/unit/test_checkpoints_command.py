"""`course checkpoints`: what is there is listed, damage is found, latest and best are never removed."""

import json
import sys

import pytest
import torch
from torch import nn

from shared import cli
from shared.training import checkpointing

STEPS = (100, 200, 300, 400, 500)


def save(folder, step, best=False):
    torch.manual_seed(step)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    checkpointing.save_checkpoint(folder, step, model, optimizer, {}, keep=99, best=best)


@pytest.fixture
def folder(tmp_path):
    for step in STEPS:
        save(tmp_path / "run", step, best=step == 200)
    return tmp_path / "run"


def run(capsys, *arguments):
    status = cli.main(["checkpoints", *map(str, arguments)])
    return status, *capsys.readouterr()


def steps(folder):
    return [info.step for info in checkpointing.list_checkpoints(folder)]


def damage(folder, step, *, truncate=False):
    path = folder / f"step-{step:08d}" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-3] if truncate else content)


def test_the_list_names_the_latest_and_the_best(capsys, folder):
    status, out, _ = run(capsys, "list", folder, "--json")
    rows = json.loads(out)
    assert status == 0
    assert [row["step"] for row in rows] == list(STEPS)
    assert [row["step"] for row in rows if row["latest"]] == [500]
    assert [row["step"] for row in rows if row["best"]] == [200]
    assert all(row["complete"] and row["problem"] is None and row["bytes"] > 500 for row in rows)
    _, out, _ = run(capsys, "list", folder)
    assert [line.split()[0] for line in out.splitlines()[1:]] == [f"step-{step:08d}" for step in STEPS]
    assert "latest" in out.splitlines()[5]
    assert "best" in out.splitlines()[2]


def test_a_truncated_checkpoint_is_listed_as_damaged_and_is_not_the_latest(capsys, folder):
    damage(folder, 500, truncate=True)
    rows = json.loads(run(capsys, "list", folder, "--json")[1])
    assert not rows[-1]["complete"]
    assert "model.safetensors has" in rows[-1]["problem"]
    assert [row["step"] for row in rows if row["latest"]] == [400]


def test_verify_reads_every_byte(capsys, folder):
    assert run(capsys, "verify", folder)[0] == 0
    damage(folder, 300)  # of the right size: the list cannot see it
    assert all(row["complete"] for row in json.loads(run(capsys, "list", folder, "--json")[1]))
    status, out, _ = run(capsys, "verify", folder, "--json")
    results = json.loads(out)
    assert status == 1
    assert [result["whole"] for result in results] == [True, True, False, True, True]
    assert "model.safetensors was altered" in results[2]["problem"]
    status, out, _ = run(capsys, "verify", folder)
    assert (status, len(out.splitlines())) == (1, 5)


def test_one_checkpoint_can_be_verified_alone(capsys, folder):
    damage(folder, 300)
    assert run(capsys, "verify", folder / "step-00000400")[0] == 0
    assert run(capsys, "verify", folder / "step-00000300")[0] == 1


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ((), [200, 400, 500]),
        (("--keep-last", "1"), [200, 500]),
        (("--keep-last", "1", "--keep-every", "300"), [200, 300, 500]),
        (("--keep-last", "9"), list(STEPS)),
    ],
)
def test_prune_leaves_the_latest_the_best_and_what_was_asked_for(capsys, folder, options, left):
    status, out, _ = run(capsys, "prune", folder, *options, "--yes", "--json")
    assert (status, steps(folder)) == (0, left)
    report = json.loads(out)
    assert len(report["removed"]) == len(STEPS) - len(left)
    assert (report["bytes"] > 0) == (len(left) < len(STEPS))


def test_what_is_damaged_stays_and_does_not_count(capsys, folder):
    damage(folder, 500, truncate=True)
    assert run(capsys, "prune", folder, "--keep-last", "1", "--yes")[0] == 0
    assert steps(folder) == [200, 400, 500]


class Keyboard:
    """Standard input of a terminal on which `answer` is typed."""

    def __init__(self, monkeypatch, answer):
        self.asked = []
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

        def confirm(question, **_):
            self.asked.append(question)
            return answer

        monkeypatch.setattr("typer.confirm", confirm)


def test_prune_asks_first_and_names_what_would_go(capsys, folder, monkeypatch):
    keyboard = Keyboard(monkeypatch, answer=False)
    status, out, err = run(capsys, "prune", folder)
    assert (status, out) == (0, "")
    assert "Nothing was removed" in err
    assert steps(folder) == list(STEPS)
    assert "Remove 2 of 5 checkpoints (step-00000100, step-00000300" in keyboard.asked[0]
    Keyboard(monkeypatch, answer=True)
    status, out, _ = run(capsys, "prune", folder)
    assert (status, steps(folder)) == (0, [200, 400, 500])
    assert "2 of 5 checkpoints removed" in out


@pytest.mark.parametrize("keep_last", range(1, 7))
@pytest.mark.parametrize("keep_every", [0, 100, 200, 300])
def test_what_is_prunable_is_what_is_removed(folder, keep_last, keep_every):
    announced = [info.step for info in checkpointing.prunable(folder, keep_last, keep_every)]
    checkpointing.prune(folder, keep_last, keep_every)
    assert steps(folder) == [step for step in STEPS if step not in announced]


def test_where_nobody_can_be_asked_nothing_is_removed(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    status, out, err = run(capsys, "prune", folder)
    assert (status, out) == (2, "")
    assert "add --yes" in err
    assert steps(folder) == list(STEPS)


def test_a_run_that_is_going_on_is_not_pruned(capsys, folder, tmp_path):
    import subprocess

    code = "import sys; from shared.training import checkpointing\n" + (
        "with checkpointing.lock(sys.argv[1]):\n    print('locked', flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"locked\n"
        status, _, err = run(capsys, "prune", folder, "--yes")
        assert status == 2
        assert "Another process is training" in err
        assert steps(folder) == list(STEPS)
    finally:
        other.communicate()


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_a_folder_without_checkpoints_is_one_sentence(capsys, tmp_path, command):
    for path, complaint in ((tmp_path / "nowhere", "There is no folder"), (tmp_path, "no checkpoint in")):
        status, out, err = run(capsys, command, path)
        assert (status, out) == (2, "")
        assert complaint in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_each_command_has_help_with_an_example(capsys, command):
    assert cli.main(["checkpoints", command, "--help"]) == 0
    assert f"Example: course checkpoints {command}" in capsys.readouterr().out
