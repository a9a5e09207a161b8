"""Benchmarks: the page says what was measured, and the baseline of time-to-loss trains what it should."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from shared.cli import bench
from shared.cli import main as course
from shared.models.gpt import GPT
from shared.runtime.errors import CourseError
from shared.training.trainer import Trainer, token_batches


def test_a_page_has_the_command_the_machine_and_every_number():
    result = {
        "threads": 2,
        "same": True,
        "ours": {"seconds": 1.5, "peak_rss_mb": 7},
        "pairs": [{"seed": 0, "times_faster": 9.5}, {"seed": 1, "times_faster": 8.5}],
    }
    page = bench.render(
        "Title", "What.\n\nMore.\n\nArgs:\n    quick: no.", "course bench x", {"cores": "2"}, result
    )
    assert page.startswith("# Title\n\nWhat.\n\nMore.\n\nRepeat: `course bench x`\n")
    assert "Args" not in page
    for line in ("| cores | 2 |", "| threads | 2 |", "| same | yes |", "| peak rss mb | 7 |", "| 1 | 8.5 |"):
        assert line in page
    assert "| seed | times faster |\n|---|---|\n| 0 | 9.5 |" in page


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_every_benchmark_is_there_and_can_be_quick(name):
    import inspect

    module, function, _ = bench.BENCHMARKS[name]
    assert "quick" in inspect.signature(getattr(bench._module(module), function)).parameters


def test_unknown_names_and_senseless_options_are_one_sentence(capsys):
    for words, said in (
        (["speed"], "no benchmark 'speed'"),
        (["cli", "--pairs", "2"], "has no pairs"),
        (["cli", "--quick", "--write"], "too short to be written down"),
    ):
        assert course(["bench", *words]) == 2
        assert said in capsys.readouterr().err


def test_the_result_can_be_read_by_a_program(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_module", lambda name: type("Module", (), {"run": lambda quick: {"a": 1}}))
    assert course(["bench", "cli", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["a"] == 1


def test_the_baselines_bare_loop_trains_what_its_configuration_says():
    time_to_loss = bench._module("bench_time_to_loss")
    run = time_to_loss._load("nanogpt-shakespeare-cpu", "float32", seed=3)
    config = dataclasses.replace(run.training, steps=4, warmup_steps=2)
    tokens = np.random.default_rng(0).integers(0, 65, 3000).astype(np.uint16)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(GPT(run.model_config(65)))
    start = models[0].head.weight.detach().clone()
    time_to_loss.bare_loop(models[0], config, tokens)
    Trainer(models[1], config, token_batches(tokens, config), progress=False).fit()
    assert not torch.allclose(models[0].head.weight, start, atol=1e-4)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_time_to_loss_without_tiny_shakespeare_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setenv("COURSE_HOME", str(tmp_path))
    with pytest.raises(CourseError, match="COURSE_DATA"):
        bench._module("bench_time_to_loss").run(quick=True)


def test_ablation_variants_keep_the_shape_of_the_schedule():
    time_to_loss = bench._module("bench_time_to_loss")
    config = time_to_loss._load("shakespeare-speedrun", "float32", seed=0).training
    half = time_to_loss._stretched(config, {"optimizer": "adamw"}, config.steps // 2)
    changed = dataclasses.replace(config, **half)
    assert changed.optimizer == "adamw"
    assert changed.steps == config.steps // 2
    assert changed.warmup_steps == pytest.approx(config.warmup_steps / 2, abs=1)
    assert len(changed.stages) == len(config.stages)
