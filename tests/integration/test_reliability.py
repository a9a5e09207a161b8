"""Nothing that happens to a run is lost on it: kill -9 at any moment, damage, a full disk, a second training.

Run as a script, this file is a warm process: torch is imported once, and each training is a fork of it, so
that fifty kills take seconds.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.data.shards import open_shards, write_shards
from shared.runtime.errors import CourseError
from shared.runtime.files import repository_root
from shared.training.checkpointing import list_checkpoints, load_checkpoint
from shared.training.trainer import Terminated, TrainConfig, Trainer, token_batches

pytestmark = pytest.mark.slow
VOCAB, STEPS, KILLS = 17, 24, 50
TOKENS = np.random.default_rng(3).integers(0, VOCAB, 400)  # an epoch is 24 windows: 3 updates


class TinyLM(nn.Module):
    """Matrices for Muon, a norm, tied embeddings, and dropout: resuming must restore the generators, too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.hidden = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids, targets):
        x = self.norm(torch.tanh(self.hidden(self.embedding(ids))))
        logits = self.head(F.dropout(x, 0.2, self.training))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def config(optimizer: str, **changes) -> TrainConfig:
    settings = {
        "steps": STEPS,
        "batch_size": 5,
        "context_length": 16,
        "accumulation": 2,
        "optimizer": optimizer,
        "checkpoint_interval": 2,
        "eval_interval": 6,
        "log_interval": 3,
        "tracker": "none",
    }
    return TrainConfig(**settings | changes)


def train(directory: str, optimizer: str = "adamw", pause: float = 0.0, **changes) -> nn.Module:
    """Start a run, or go on with it; `pause` seconds a micro-batch leave time for a signal."""
    resume = bool(list_checkpoints(directory))
    torch.manual_seed(99 if resume else 1)  # what a resumed run draws must come from the checkpoint
    model, settings = TinyLM(), config(optimizer, **changes)
    batches = token_batches(TOKENS, settings)

    def slowly(micro_step):
        Path(directory + ".started").touch()
        time.sleep(pause)
        return batches(micro_step)

    def evaluate(model):
        return {"loss": float(model(*batches(1000))[1])}

    Trainer(model, settings, slowly, evaluate=evaluate, directory=directory, progress=False).fit(
        resume=resume
    )
    return model


# ------------------------------------------------------------------------------ a warm process to fork


def serve() -> None:
    """Fork a training for each line of standard input; say how it ended on standard output."""
    torch.set_num_threads(1)
    for optimizer in ("adamw", "muon"):  # whatever is imported at the first update, is imported now
        with tempfile.TemporaryDirectory() as folder:
            train(folder + "/run", optimizer, steps=2)
    print("warm", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        number, delay = order.pop("signal", None), order.pop("delay", 0.0)
        started = Path(order["directory"] + ".started") if order.pop("started", False) else None
        error_file = Path(order["directory"] + ".error")
        child = os.fork()
        if child == 0:
            _child(order, error_file)
        if number is not None:
            while started and not started.exists():
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(child, number)  # the child is not waited for yet, so that its id is its own
        _, status = os.waitpid(child, 0)
        said = error_file.read_text() if error_file.exists() else ""
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "said": said}), flush=True)


def _child(order: dict, error_file: Path) -> None:
    status = 0
    try:
        error_file.unlink(missing_ok=True)
        train(**order)
    except Terminated as end:
        error_file.write_text(str(end))
        status = end.exit_status
    except CourseError as error:
        error_file.write_text(str(error))
        status = 2
    except BaseException:
        error_file.write_text(traceback.format_exc())
        status = 1
    os._exit(status)


class Warm:
    """The other end of `serve`."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository_root())}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self.process.stdout.readline() == "warm\n"

    def run(self, directory: Path, **order) -> tuple[int, str]:
        """Exit status (negative: the signal that ended it) and what it said."""
        self.process.stdin.write(json.dumps({"directory": str(directory), **order}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["said"]


@pytest.fixture(autouse=True)
def one_thread():
    """As the warm process has it: sums in another order would end in other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def warm():
    warm = Warm()
    yield warm
    warm.process.stdin.close()
    warm.process.wait(30)


@pytest.fixture(scope="module")
def straight(warm, tmp_path_factory):
    """For each optimiser: the uninterrupted run's weights, and the seconds it took."""
    results = {}
    for optimizer in ("adamw", "muon"):
        directory = tmp_path_factory.mktemp("straight") / optimizer
        began = time.perf_counter()
        assert warm.run(directory, optimizer=optimizer) == (0, "")
        results[optimizer] = (final_weights(directory), time.perf_counter() - began)
    return results


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(directory / f"step-{STEPS:08d}").model


def assert_same_weights(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    got = final_weights(directory)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    history = json.loads((directory / "history.json").read_text())
    assert [entry["step"] for entry in history] == list(range(3, STEPS + 1, 3))


# --------------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_at_random_moments_a_run_ends_with_the_weights_of_the_uninterrupted_one(
    warm, straight, tmp_path, optimizer
):
    expected, seconds = straight[optimizer]
    moments = random.Random(optimizer)
    kills = in_writing = runs = 0
    while kills < KILLS // 2:
        runs += 1
        directory = tmp_path / f"run-{runs}"
        status = None
        while status != 0:
            # Long enough to save something now and then, short enough to be killed many times in a run.
            delay = moments.uniform(0.0, 0.5 * seconds)
            kill = {"signal": signal.SIGKILL, "delay": delay} if kills < KILLS // 2 else {}
            status, said = warm.run(directory, optimizer=optimizer, **kill)
            assert status in (0, -signal.SIGKILL), said
            kills += status != 0
            if status and directory.exists():
                in_writing += any(directory.glob(".*.tmp"))
                for checkpoint in list_checkpoints(directory):  # what bears the name is whole
                    assert load_checkpoint(checkpoint.path).step == checkpoint.step
        assert_same_weights(directory, expected)
        assert not list(directory.glob(".*.tmp"))
    assert in_writing >= 3  # the kills did come while checkpoints were being written


def test_runs_that_start_different_end_different(warm, straight, tmp_path):
    """Otherwise equal weights would prove nothing."""
    assert warm.run(tmp_path / "run", optimizer="adamw", seed=5)[0] == 0
    got, expected = final_weights(tmp_path / "run"), straight["adamw"][0]
    assert not torch.equal(got["hidden.weight"], expected["hidden.weight"])


def test_sigterm_finishes_the_update_saves_and_can_be_resumed(warm, straight, tmp_path):
    directory = tmp_path / "run"
    status, said = warm.run(
        directory, optimizer="muon", pause=0.01, signal=signal.SIGTERM, started=True, checkpoint_interval=0
    )
    assert status == 143, said
    assert "Interrupted at step" in said
    assert len(list_checkpoints(directory)) == 1
    assert warm.run(directory, optimizer="muon", checkpoint_interval=0) == (0, "")
    assert_same_weights(directory, straight["muon"][0])


# -------------------------------------------------------------------------------------- damage on disk


def test_a_flipped_byte_anywhere_is_named_and_the_checkpoint_before_is_used(straight, tmp_path, capsys):
    expected, _ = straight["adamw"]
    train(str(tmp_path / "whole"), keep=3)
    moments = random.Random(7)
    for attempt in range(8):
        directory = tmp_path / f"run-{attempt}"
        shutil.copytree(tmp_path / "whole", directory)
        newest = list_checkpoints(directory)[-1].path
        file = sorted(newest.iterdir())[attempt % 4]
        content = bytearray(file.read_bytes())
        content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        file.write_bytes(content)
        with pytest.raises(CourseError, match=f"{newest} is damaged"):
            load_checkpoint(newest)
        train(str(directory), keep=3)
        said = capsys.readouterr().err
        assert f"{newest} is damaged" in said
        assert said.rstrip().endswith(f"Going on from step-{STEPS - 2:08d}.")
        assert_same_weights(directory, expected)


def test_when_all_checkpoints_are_damaged_the_newest_is_named(tmp_path):
    train(str(tmp_path / "run"))
    for checkpoint in list_checkpoints(tmp_path / "run"):
        (checkpoint.path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CourseError, match=f"step-{STEPS:08d} is damaged .model.safetensors has 0 of"):
        train(str(tmp_path / "run"))


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint_and_says_how_much_is_missing(tmp_path):
    script = f"""
mount -t tmpfs -o size=64k none {tmp_path} || exit 77
export PYTHONPATH={repository_root()}
{sys.executable} - <<'END'
import runpy, sys
module = runpy.run_path({__file__!r}, run_name="tests")
try:
    module["train"]({str(tmp_path / "run")!r}, checkpoint_interval=2, keep=9)
except module["CourseError"] as error:
    print(error)
    newest = module["list_checkpoints"]({str(tmp_path / "run")!r})[-1]
    print("left:", module["load_checkpoint"](newest.path).step, newest.problem)
END
"""
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script]
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("a disk of a size of its own needs Linux's unshare")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode in (1, 77) and "left:" not in done.stdout and "Traceback" not in done.stderr:
        pytest.skip("this machine lets nobody mount a disk of a size of its own")
    said, left = done.stdout.strip().splitlines()
    assert "was not saved (the disk is full: it needs 0.0 MB and 0.0 MB are free" in said, said
    assert "is intact" in said
    assert left.startswith("left: ")
    assert left.endswith(" None")


# --------------------------------------------------------------------------------- two at once; bad data


def test_a_second_training_into_the_same_folder_is_refused_until_the_first_is_gone(warm, tmp_path):
    directory = tmp_path / "run"
    other = Warm()
    other.process.stdin.write(
        json.dumps({"directory": str(directory), "pause": 0.5, "signal": signal.SIGKILL, "delay": 4.0}) + "\n"
    )
    other.process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list_checkpoints(directory) and time.monotonic() < deadline:
        time.sleep(0.01)
    status, said = warm.run(directory)
    assert status == 2
    assert "Another process is training in" in said
    assert json.loads(other.process.stdout.readline())["status"] == -signal.SIGKILL
    other.process.stdin.close()
    other.process.wait(30)
    assert warm.run(directory) == (0, "")  # the kill has released it


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_at_its_step_and_the_checkpoint_before_stays(tmp_path, bad):
    def loss_fn(model, batch):
        return model(*batch)[1] * (bad if trainer.step == 5 else 1.0)

    settings = config("adamw")
    trainer = Trainer(
        TinyLM(), settings, token_batches(TOKENS, settings), loss_fn, directory=tmp_path, progress=False
    )
    with pytest.raises(CourseError, match="at step 5;"):
        trainer.fit()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [2, 4]


def test_tokens_that_the_model_does_not_know_are_named():
    from shared.models.gpt import GPT, GPTConfig

    settings = config("adamw")
    model = GPT(GPTConfig(VOCAB - 3, 16, 1, 1, 8))
    with pytest.raises(CourseError, match="token 16 and the model's vocabulary has 14 entries"):
        Trainer(model, settings, token_batches(TOKENS, settings), progress=False).fit()


def test_an_empty_shard_and_one_with_a_wrong_checksum_are_named(tmp_path):
    write_shards(tmp_path / "empty.tokens", [], VOCAB)
    settings = config("adamw")
    batches = token_batches(open_shards(tmp_path / "empty.tokens").tokens, settings)
    with pytest.raises(CourseError, match="The text has 0 tokens"):
        Trainer(TinyLM(), settings, batches, progress=False).fit()
    write_shards(tmp_path / "ids.tokens", [TOKENS], VOCAB)
    content = bytearray((tmp_path / "ids.tokens").read_bytes())
    content[-2] ^= 1
    (tmp_path / "ids.tokens").write_bytes(content)
    with pytest.raises(CourseError, match=r"ids.tokens is damaged: its ids do not match its checksum"):
        open_shards(tmp_path / "ids.tokens").verify()


def test_damaged_token_data_is_refused_before_training(tmp_path, monkeypatch):
    from shared.recipes import pretraining
    from shared.training.config import DataConfig

    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    (tmp_path / "story.txt").write_text("to be, or not to be: that is the question.\n" * 30)
    settings = DataConfig(corpus="text", path=str(tmp_path / "story.txt"), tokenizer="char")
    shard = pretraining.token_data(settings).path / pretraining.TRAINING
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CourseError, match=r"training.tokens is damaged: its ids do not match"):
        pretraining.token_data(settings)


if __name__ == "__main__":
    serve()
