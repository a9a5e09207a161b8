"""What the processes of week 2's notebook 04 run."""

import os

import pytest
import torch

from shared.curriculum.faults import ENVIRONMENT
from shared.runtime.files import repository_root
from shared.training.distributed_utils import launch

pytestmark = pytest.mark.slow
SCRIPT = repository_root() / "phase1-fundamentals" / "week2-gpt" / "multi_gpu_experiments.py"
CONFIG = {"vocab_size": 13, "context_length": 8, "num_layers": 1, "num_heads": 2, "d_model": 16}


def run(function, processes, **inputs):
    return launch(f"{SCRIPT}:{function}", processes, config=CONFIG, **inputs)


def test_two_processes_have_the_gradient_of_one():
    ids = torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous(), "seed": 3}
    one = run("gradients", 1, method="none", **batch)[0]["gradient"]
    # A fault that this test is to catch has to be planted where the gradients are averaged.
    fault = os.environ.get(ENVIRONMENT, "")
    for result in run("gradients", 2, method="scratch", fault=fault, **batch):
        assert result["apart"] > 1e-3
        assert result["disagreement"] == 0
        torch.testing.assert_close(result["gradient"], one, atol=1e-6, rtol=0)


def test_without_communication_the_gradients_differ():
    ids = torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    result = run("gradients", 2, method="none", inputs=inputs, targets=targets, seed=3)[0]
    assert result["disagreement"] > 1e-3


def test_two_processes_see_the_losses_of_one_and_stay_together():
    tokens = torch.randint(13, (400,), generator=torch.Generator().manual_seed(0))
    training = {"steps": 5, "batch_size": 4, "context_length": 8}
    inputs = {"training": training, "tokens": tokens, "seed": 0, "threads": 1}
    one, two = run("train", 1, **inputs), run("train", 2, **inputs)
    assert two[0]["losses"] == pytest.approx(one[0]["losses"], abs=1e-5)
    assert torch.equal(two[0]["weights"], two[1]["weights"])
