"""The trainer: one update equals a hand-written one, runs resume bit for bit, bad ends are orderly."""

import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.runtime.errors import CourseError
from shared.training import checkpointing
from shared.training.trainer import Stage, TrainConfig, Trainer

VOCAB, B, T = 11, 4, 6


class TinyLM(nn.Module):
    """A bigram model with a hidden layer and dropout: the smallest thing with all that a trainer handles."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.hidden = nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(8, VOCAB, bias=False)
        self.lm_head.weight = self.embedding.weight  # tied, as in GPT-2

    def forward(self, ids, targets):
        logits = self.lm_head(self.dropout(torch.tanh(self.hidden(self.embedding(ids)))))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tiny(seed: int = 0, dropout: float = 0.0) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM(dropout)


def batches(micro_step: int, batch_size: int = B):
    generator = torch.Generator().manual_seed(1000 + micro_step)
    ids = torch.randint(VOCAB, (batch_size, T + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 6, "batch_size": B, "context_length": T, "log_interval": 1, **changes})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_run_equals_a_bare_loop_with_torchs_own_pieces():
    trained, expected = tiny(), tiny()
    settings = config(schedule="constant", fused=False, clip=0.5, weight_decay=0.0, learning_rate=0.01)
    Trainer(trained, settings, batches, progress=False).fit()

    optimizer = torch.optim.AdamW(expected.parameters(), 0.01, betas=settings.betas, weight_decay=0.0)
    for step in range(settings.steps):
        optimizer.zero_grad()
        expected(*batches(step))[1].backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(weights(trained), weights(expected), rtol=0, atol=1e-7)


def test_accumulated_micro_batches_give_the_gradient_of_the_big_batch():
    whole = [torch.cat(parts) for parts in zip(*(batches(i) for i in range(3)), strict=True)]
    big, small = tiny(), tiny()
    big(*whole)[1].backward()
    trainer = Trainer(small, config(accumulation=3), batches, progress=False)
    loss = trainer._backward()
    torch.testing.assert_close(loss, big(*whole)[1].detach())
    for expected, got in zip(big.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-7)


def test_micro_batches_of_different_lengths_are_weighted_by_their_tokens():
    whole = [torch.cat(parts) for parts in zip(*(batches(i, i + 1) for i in range(3)), strict=True)]
    big, small = tiny(), tiny()
    big(*whole)[1].backward()

    def counted(model, batch):
        return model(*batch)[1], batch[1].numel()

    trainer = Trainer(small, config(accumulation=3), lambda i: batches(i, i + 1), counted, progress=False)
    trainer._backward()
    for expected, got in zip(big.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, optimizer, dtype):
    settings = config(optimizer=optimizer, dtype=dtype, checkpoint_interval=3, keep=9, accumulation=2)
    straight = tiny(dropout=0.5)
    history = Trainer(straight, settings, batches, directory=tmp_path / "a", progress=False).fit()

    first = tiny(dropout=0.5)
    Trainer(first, settings, batches, directory=tmp_path / "b", progress=False).fit()
    (tmp_path / "b" / "step-00000006").rename(tmp_path / "gone")  # as if it had been killed after step 3
    second = tiny(seed=5, dropout=0.5)
    torch.manual_seed(77)
    resumed = Trainer(second, settings, batches, directory=tmp_path / "b", progress=False).fit(resume=True)

    assert torch.equal(weights(second), weights(straight))
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "lr", "grad_norm", "tokens"):
        assert [entry[key] for entry in resumed] == [entry[key] for entry in history]


def test_dropout_makes_the_resume_test_depend_on_the_generators():
    results = []
    for seed in (1, 2):
        model = tiny(dropout=0.5)
        torch.manual_seed(seed)
        Trainer(model, config(), batches, progress=False).fit()
        results.append(weights(model))
    assert not torch.equal(*results)


def test_evaluation_changes_nothing_in_the_training():
    results = []
    for interval in (0, 2):
        model = tiny(dropout=0.5)
        torch.manual_seed(1)
        evaluate = lambda m: {"loss": float(torch.rand(()))}  # noqa: E731
        Trainer(model, config(eval_interval=interval), batches, evaluate=evaluate, progress=False).fit()
        results.append(weights(model))
    assert torch.equal(*results)


def test_history_holds_the_evaluations_and_the_model_trains_on_in_training_mode():
    modes = []

    def evaluate(model):
        modes.append(model.training)
        return {"loss": 1.5}

    model = tiny()
    history = Trainer(
        model, config(eval_interval=4, log_interval=3), batches, evaluate=evaluate, progress=False
    ).fit()
    assert [(h["step"], h.get("val_loss")) for h in history] == [(3, None), (4, 1.5), (6, 1.5)]
    assert modes == [False, False]
    assert model.training
    assert history[-1]["tokens"] == 6 * B * T


def test_an_evaluation_may_return_tensors(tmp_path):
    trainer = Trainer(
        tiny(),
        config(steps=1),
        batches,
        evaluate=lambda m: {"loss": torch.tensor(1.5)},
        directory=tmp_path,
        progress=False,
    )
    assert trainer.fit()[-1]["val_loss"] == 1.5
    assert json.loads((tmp_path / "history.json").read_text())[-1]["val_loss"] == 1.5


def test_stages_change_the_sizes_where_they_say():
    stages = (Stage(start=0, batch_size=2, context_length=3), Stage(start=4, batch_size=5, context_length=6))
    settings = config(stages=stages)
    sizes = [(settings.stage_at(s).batch_size, settings.stage_at(s).context_length) for s in range(6)]
    assert sizes == [(2, 3)] * 4 + [(5, 6)] * 2
    assert settings.tokens_by_context(world_size=3) == [(3, 3 * 4 * 6), (6, 3 * 2 * 30)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_weights(bad):
    model = tiny()

    def loss_fn(model, batch):
        loss = model(*batch)[1]
        return loss * bad if trainer.step == 2 else loss

    trainer = Trainer(model, config(), batches, loss_fn, progress=False)
    with pytest.raises(CourseError, match="at step 2;"):
        trainer.fit()
    assert torch.isfinite(weights(model)).all()


def test_ctrl_c_finishes_the_update_saves_and_can_be_resumed(tmp_path):
    def interrupting(micro_step):
        if micro_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(micro_step)

    before = signal.getsignal(signal.SIGINT)
    interrupted, straight = tiny(), tiny()
    trainer = Trainer(interrupted, config(), interrupting, directory=tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt, match="step 3 of 6"):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpointing.latest_checkpoint(tmp_path).name == "step-00000003"

    resumed = tiny(seed=3)
    Trainer(resumed, config(), batches, directory=tmp_path, progress=False).fit(resume=True)
    Trainer(straight, config(), batches, progress=False).fit()
    assert torch.equal(weights(resumed), weights(straight))


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path):
    Trainer(tiny(), config(), batches, directory=tmp_path, progress=False).fit()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CourseError, match="already holds a run"):
        Trainer(tiny(), config(), batches, directory=tmp_path, progress=False).fit()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(CourseError, match="No checkpoint"):
        Trainer(tiny(), config(), batches, directory=tmp_path, progress=False).fit(resume=True)


def test_resuming_with_another_configuration_names_the_key(tmp_path):
    Trainer(tiny(), config(), batches, directory=tmp_path, progress=False).fit()
    other = Trainer(tiny(), config(learning_rate=0.5), batches, directory=tmp_path, progress=False)
    with pytest.raises(CourseError, match=r"learning_rate = 0.001 and this run has 0.5"):
        other.fit(resume=True)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    real = checkpointing.safetensors.torch.save_file

    def full(tensors, path):
        if "step-00000004" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    monkeypatch.setattr(checkpointing.safetensors.torch, "save_file", full)
    trainer = Trainer(tiny(), config(checkpoint_interval=2), batches, directory=tmp_path, progress=False)
    with pytest.raises(CourseError, match=r"step 4 was not saved.*disk is full.*step-00000002, is intact"):
        trainer.fit()
    assert [p.name for p in tmp_path.iterdir() if "step" in p.name] == ["step-00000002"]
    assert checkpointing.load_checkpoint(tmp_path).step == 2


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="Cannot write"):
        Trainer(tiny(), config(), batches, directory=tmp_path / "file" / "run", progress=False).fit()


def test_history_and_tensorboard_log_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = Trainer(tiny(), config(), batches, directory=tmp_path, progress=False).fit()
    assert json.loads((tmp_path / "history.json").read_text()) == history
    log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = [(event.step, event.value) for event in log.Scalars("loss")]
    assert logged == [(h["step"], pytest.approx(h["loss"], abs=1e-6)) for h in history]


def test_a_resumed_run_has_each_step_once_in_its_tensorboard_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(checkpoint_interval=3, keep=9)
    Trainer(tiny(), settings, batches, directory=tmp_path, progress=False).fit()
    shutil.rmtree(tmp_path / "step-00000006")  # as if it had been killed between steps 5 and 6
    Trainer(tiny(), settings, batches, directory=tmp_path, progress=False).fit(resume=True)
    log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_autocast_runs_the_model_in_the_dtype_asked_for():
    seen = set()

    def loss_fn(model, batch):
        logits, loss = model(*batch)
        seen.add(logits.dtype)
        return loss

    Trainer(tiny(), config(dtype=torch.bfloat16), batches, loss_fn, progress=False).fit()
    assert seen == {torch.bfloat16}


def test_the_rate_follows_the_schedule():
    settings = config(schedule="wsd", warmup_steps=1, decay_fraction=0.5, min_lr_ratio=0.0, learning_rate=0.1)
    history = Trainer(tiny(), settings, batches, progress=False).fit()
    expected = [0.05, 0.1, 0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3]
    assert [entry["lr"] for entry in history] == pytest.approx(expected)


def test_the_progress_line_ends_with_what_came_out(capsys):
    Trainer(tiny(), config(), batches, progress=True).fit()
    captured = capsys.readouterr()
    assert "6 steps in" in captured.err
    assert captured.out == ""
