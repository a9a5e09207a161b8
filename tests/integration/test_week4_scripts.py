"""Week 4's `train_gpt.py` as a reader starts it: planned first, refused if too large, on two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from shared.models.model_utils import load_model
from shared.runtime.files import repository_root

pytestmark = pytest.mark.slow
ROOT = repository_root()
SCRIPT = ROOT / "phase1-fundamentals" / "week4-nanogpt" / "train_gpt.py"
# Without biases, whose gradient is rounding error for the keys, and with an epsilon above such errors: AdamW
# would make whole updates of them.
CONFIG = """
data: {corpus: stories, vocab_size: 320}
model: {num_layers: 2, num_heads: 2, d_model: 16, bias: false}
training: {steps: 6, batch_size: 8, context_length: 16, accumulation: 2, warmup_steps: 2, clip: 0.5,
           epsilon: 1.0e-6, dtype: float32, tracker: none}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder for runs, beside a configuration of a model that trains in a second."""
    folder = tmp_path_factory.mktemp("week4")
    (folder / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    return folder


def train(workplace, *words, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"COURSE_HOME": str(workplace / "artifacts"), "COURSE_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [*launcher, str(SCRIPT), "--config", str(workplace / "tiny.yaml"), "--scale", "cpu", *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def trained(workplace, out, *settings, processes=1):
    """The weights and the last history entry of a run."""
    changes = [word for setting in settings for word in ("--set", setting)]
    done = train(workplace, "--out", str(workplace / out), "--json", *changes, processes=processes)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # nothing else is on standard output
    return load_model(result["model"]).state_dict(), result, done.stderr


@pytest.fixture(scope="module")
def alone(workplace):
    return trained(workplace, "alone")


def test_the_plan_comes_first_and_is_the_run_that_follows(alone):
    weights, result, said = alone
    assert said.index("Parameters") < said.index("run folder:")
    assert f"{result['tokens']:,} in 6 updates" in said
    names = set(weights) - {"head.weight"}  # the token embedding under another name
    planned = next(line.split()[1] for line in said.splitlines() if line.startswith("Parameters"))
    assert planned == f"{sum(weights[name].numel() for name in names):,}"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_end_with_the_weights_of_one(workplace, alone, parallel):
    expected, result, _ = alone
    weights, shared_out, said = trained(
        workplace, parallel, f"training.parallel={parallel}", "training.batch_size=4", processes=2
    )
    assert said.count("2 × 1/2 of CPU") == 1  # planned for both processes, by one of them
    assert {"ddp": "DDP", "fsdp2": "FSDP2"}[parallel] in said
    assert shared_out["tokens"] == result["tokens"]
    assert shared_out["val_loss"] == pytest.approx(result["val_loss"], abs=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)


def test_another_seed_would_have_ended_elsewhere(workplace, alone):
    """Otherwise equal weights would prove nothing."""
    weights, _, _ = trained(workplace, "other", "training.seed=1")
    assert max((weights[name] - tensor).abs().max() for name, tensor in alone[0].items()) > 1e-3


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_cannot_fit_is_refused_before_anything_is_touched(workplace, processes):
    out = workplace / f"refused-{processes}"
    done = train(workplace, "--out", str(out), "--set", "training.batch_size=1000000", processes=processes)
    assert done.returncode == (2 if processes == 1 else 1)  # torchrun's own
    assert done.stdout == ""
    assert done.stderr.count("course: The run needs") == 1  # said once, not by every process
    assert "it would fit with training.batch_size=" in done.stderr
    assert not out.exists()


def test_a_dry_run_prints_the_plan_as_a_result_and_trains_nothing(workplace):
    out = workplace / "dry"
    done = train(workplace, "--out", str(out), "--dry-run", "--gpus", "2", "--gpu", "h100", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["machine"], plan["devices"], plan["fits"]) == ("H100 80 GB", 2, True)
    assert not out.exists()
