"""What a run tells its tracker, and what happens where the tracker's package is missing."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shared.models.gpt import GPT, GPTConfig
from shared.runtime.errors import CourseError
from shared.training import trackers
from shared.training.trackers import Metrics, NoTracker, open_tracker
from shared.training.trainer import TrainConfig, Trainer, token_batches

VOCAB, T = 11, 6
TOKENS = torch.randint(VOCAB, (200,), generator=torch.Generator().manual_seed(0)).numpy()


def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB, T, 1, 1, 8))


def settings(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 4, "batch_size": 2, "context_length": T, "log_interval": 2, **changes})


def train(directory, **changes) -> list[dict]:
    config = settings(**changes)
    trainer = Trainer(
        tiny(),
        config,
        token_batches(TOKENS, config),
        evaluate=lambda model: {"loss": 1.5, "bits_per_byte": 0.5},
        directory=directory,
        progress=False,
        bytes_per_token=2.0,
    )
    return trainer.fit()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what it is told."""
    fake = SimpleNamespace(runs=[])

    def init(**options):
        run = SimpleNamespace(options=options, logged=[], finished=False)
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda: setattr(run, "finished", True)
        fake.runs.append(run)
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trackers.netrc, "netrc", lambda: SimpleNamespace(authenticators=lambda host: None))
    return fake


def test_metrics_follow_from_the_record():
    model = tiny()
    metrics = Metrics(
        model,
        torch.device("cpu"),
        torch.float32,
        bytes_per_token=3.0,
        peak_tflops=0.5,
        world_size=2,
    )
    metrics.start(tokens=100, seconds=1.0)
    record = {"step": 7, "loss": math.log(8.0), "lr": 0.1, "grad_norm": 0.3, "tokens": 1100, "seconds": 3.0}
    values = metrics.of(record, T)
    assert "step" not in values
    assert values["perplexity"] == pytest.approx(8.0)
    assert values["bits_per_byte"] == pytest.approx(1.0)  # 3 bits a token of 3 bytes
    assert values["tokens_per_second"] == 500.0
    assert values["mfu"] == pytest.approx(500.0 * model.flops_per_token(T) / (2 * 0.5e12))
    assert 0.01 < values["memory_gb"] < 100
    later = metrics.of(record | {"tokens": 1200, "seconds": 3.5}, T)
    assert later["tokens_per_second"] == 200.0  # since the entry before, not since the start


def test_a_model_without_a_flop_count_has_no_mfu_and_a_skipped_update_no_perplexity():
    metrics = Metrics(nn.Linear(1, 1), torch.device("cpu"), torch.float32, peak_tflops=1.0)
    values = metrics.of({"step": 1, "tokens": 10, "seconds": 1.0}, T)
    assert values["tokens_per_second"] == 10.0
    assert not values.keys() & {"mfu", "perplexity", "bits_per_byte"}


def test_the_peak_is_measured_and_a_training_cannot_exceed_it(tmp_path, wandb):
    peak = trackers.matmul_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e14
    train(tmp_path, tracker="wandb")
    assert all(0.0 < values["mfu"] < 1.0 for _, values in wandb.runs[0].logged)


def test_measuring_the_peak_draws_nothing_from_the_generators():
    trackers.matmul_peak.cache_clear()
    before = torch.get_rng_state()
    trackers.matmul_peak(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_and_biases_is_told_the_same_as_the_history(tmp_path, wandb):
    history = train(tmp_path, tracker="wandb")
    (run,) = wandb.runs
    assert run.finished
    assert run.options["mode"] == "offline"  # nobody is logged in
    assert run.options["dir"] == str(tmp_path)
    assert run.options["config"]["learning_rate"] == 1e-3
    assert [step for step, _ in run.logged] == [2, 4]
    for (_, values), entry in zip(run.logged, history, strict=True):
        assert values.items() >= {k: v for k, v in entry.items() if k != "step"}.items()
    assert run.logged[-1][1]["val_bits_per_byte"] == 0.5
    expected = history[-1]["loss"] / math.log(2) / 2.0
    assert run.logged[-1][1]["bits_per_byte"] == pytest.approx(expected)
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_goes_on_under_its_own_id(tmp_path, wandb):
    for _ in range(2):
        open_tracker("wandb", tmp_path, {}, 0)
    first, second = (run.options["id"] for run in wandb.runs)
    assert first == second
    open_tracker("wandb", tmp_path / "other", {}, 0)
    assert wandb.runs[-1].options["id"] != first


@pytest.mark.parametrize(
    ("variable", "value", "mode"), [("WANDB_API_KEY", "k", "online"), ("WANDB_MODE", "disabled", "disabled")]
)
def test_a_key_or_the_mode_in_the_environment_decides(tmp_path, wandb, monkeypatch, variable, value, mode):
    monkeypatch.setenv(variable, value)
    open_tracker("wandb", tmp_path, {}, 0)
    assert wandb.runs[-1].options["mode"] == mode


def test_without_wandb_the_run_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails
    with pytest.raises(CourseError, match=r"'wandb', which is not installed; pip install wandb"):
        train(tmp_path, tracker="wandb")


def test_without_tensorboard_the_run_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert len(train(tmp_path)) == 2
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1


def test_tensorboard_holds_every_metric(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train(tmp_path)
    log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    wanted = [
        "loss",
        "perplexity",
        "bits_per_byte",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "memory_gb",
        "val_loss",
    ]
    assert set(wanted) <= set(log.Tags()["scalars"])
    perplexities = [event.value for event in log.Scalars("perplexity")]
    assert perplexities == pytest.approx([math.exp(entry["loss"]) for entry in history])


def test_no_tracker_and_no_folder_write_nothing(tmp_path):
    train(tmp_path, tracker="none")
    assert not (tmp_path / "tensorboard").exists()
    assert isinstance(open_tracker("tensorboard", None, {}, 0), NoTracker)
