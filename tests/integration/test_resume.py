"""A run that is killed at any moment goes on as if nothing had happened; `course train` from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shared.runtime.files import repository_root
from shared.training.checkpointing import list_checkpoints, load_checkpoint

pytestmark = pytest.mark.slow

CONFIG = """
data: {corpus: stories, tokenizer: char}
model: {num_layers: 1, num_heads: 2, d_model: 16}
training:
  {steps: 60, batch_size: 2, context_length: 16, checkpoint_interval: 5, keep: 3, eval_interval: 30,
   optimizer: muon, dtype: float32}
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "artifacts"))
    monkeypatch.setenv("COURSE_THREADS", "1")
    (tmp_path / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def command(workplace: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "shared", "train", "--config", str(workplace / "tiny.yaml"), *words]


def train(workplace: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workplace, *words), cwd=repository_root(), capture_output=True, text=True, timeout=300
    )


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(directory / "step-00000060").model


def assert_same_weights(one: Path, other: Path) -> None:
    expected, got = final_weights(one), final_weights(other)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def interrupt(workplace: Path, out: Path, number: int) -> subprocess.Popen:
    """Start a run and send it a signal once it has saved something."""
    slow = ["--set", "training.eval_interval=1"]  # so that it is still running when the signal comes
    process = subprocess.Popen(
        command(workplace, "--out", str(out), *slow),
        cwd=repository_root(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not list_checkpoints(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    return process


def test_a_run_reports_its_cost_trains_saves_a_model_and_says_what_came_out(workplace):
    done = train(workplace, "--out", str(workplace / "run"), "--json")
    assert done.returncode == 0, done.stderr
    assert "planned: " in done.stderr
    assert f"{60 * 2 * 16:,} tokens" in done.stderr
    result = json.loads(done.stdout)
    assert result["step"] == 60
    assert 0 < result["val_bits_per_byte"] < 8

    from shared.data import tokenizers
    from shared.models.model_utils import load_model

    model = load_model(result["model"])
    tokenizer = tokenizers.load(Path(result["model"]) / "tokenizer.json")
    assert model.config.vocab_size == tokenizer.vocab_size
    assert torch.equal(model.head.weight, final_weights(workplace / "run")["head.weight"])


def test_kill_9_then_resume_equals_the_uninterrupted_run(workplace):
    straight, killed = workplace / "straight", workplace / "killed"
    assert train(workplace, "--out", str(straight)).returncode == 0
    interrupt(workplace, killed, signal.SIGKILL).wait(60)
    assert list_checkpoints(killed)[-1].name < "step-00000060"
    done = train(workplace, "--out", str(killed), "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_weights(straight, killed)
    assert not list(killed.glob(".*.tmp"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_say_so_and_can_be_resumed(workplace, number, status):
    straight, stopped = workplace / "straight", workplace / "stopped"
    assert train(workplace, "--out", str(straight)).returncode == 0
    process = interrupt(workplace, stopped, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert "Interrupted at step" in said
    assert "resume to go on" in said
    assert "Traceback" not in said
    assert train(workplace, "--out", str(stopped), "--resume").returncode == 0
    assert_same_weights(straight, stopped)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_under_torchrun_train_one_model(workplace, parallel):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [
        "-m",
        "shared",
        "train",
        "--config",
        str(workplace / "tiny.yaml"),
        "--out",
        str(workplace / "run"),
        "--set",
        f"training.parallel={parallel}",
        "--set",
        "training.optimizer=adamw",
    ]
    local = os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    done = subprocess.run(
        [*torchrun, *words, "--json"],
        cwd=repository_root(),
        env=local,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens"] == 2 * 60 * 2 * 16

    from shared.models.model_utils import load_model

    model, saved = load_model(result["model"]), final_weights(workplace / "run")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "none.yaml"], "Cannot read none.yaml"),
        (["--set", "training.steps=0"], "training.steps is 0; it must be at least 1"),
        (["--set", "data.corpus=wikipedia"], "no corpus 'wikipedia'"),
        (["--scale", "tpu"], "Unknown scale 'tpu'"),
        (["--resume"], "No checkpoint"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(workplace, words, said):
    done = train(workplace, "--out", str(workplace / "run"), *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_with_something_in_it_is_left_alone(workplace):
    (workplace / "run").mkdir()
    (workplace / "run" / "diary.txt").write_text("dear diary")
    done = train(workplace, "--out", str(workplace / "run"))
    assert done.returncode == 2
    assert "is not empty; add --resume" in done.stderr
    assert [p.name for p in (workplace / "run").iterdir()] == ["diary.txt"]
