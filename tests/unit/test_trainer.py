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
from shared.training.trainer import Stage, Terminated, TrainConfig, Trainer

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


# ------------------------------------------------------------------------------ float16 and its scale


def test_float16_scales_the_loss_and_trains_like_float32():
    low, full = tiny(), tiny()
    settings = {"learning_rate": 0.01, "schedule": "constant", "steps": 12}
    same = lambda micro_step: batches(0)  # noqa: E731
    trainer = Trainer(low, config(dtype=torch.float16, **settings), same, progress=False)
    history = trainer.fit()
    expected = Trainer(full, config(**settings), same, progress=False).fit()
    assert trainer.scaler.get_scale() == 2.0**16
    for got, right in zip(history, expected, strict=True):
        assert got["loss"] == pytest.approx(right["loss"], abs=3e-3)
        assert got["grad_norm"] == pytest.approx(right["grad_norm"], rel=2e-2)  # of the unscaled gradients
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.02  # so that agreeing means something


def overflowing(steps, by=1e36):
    """A loss whose gradient overflows at some updates, until the scale has come down far enough."""

    def loss_fn(model, batch):
        loss = model(*batch)[1]
        return loss + (loss - loss.detach()) * by if trainer_of["it"].step in steps else loss

    trainer_of = {}
    return loss_fn, trainer_of


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_in_float16_skips_the_update_halves_the_scale_and_is_logged(optimizer):
    loss_fn, trainer_of = overflowing({2})
    model, before = tiny(), {}

    def watching(micro_step):
        before[micro_step] = weights(model).clone()
        return batches(micro_step)

    settings = config(dtype=torch.float16, optimizer=optimizer, log_interval=4)
    trainer_of["it"] = trainer = Trainer(model, settings, watching, loss_fn, progress=False)
    history = trainer.fit()
    assert torch.equal(before[2], before[3])
    assert not torch.equal(before[3], before[4])
    assert trainer.scaler.get_scale() == 2.0**15
    assert [entry["step"] for entry in history] == [3, 4, 6]
    assert "grad_norm" not in history[0]  # it was infinite, which JSON does not know
    assert math.isfinite(history[0]["loss"])


def test_gradients_that_overflow_at_every_scale_end_the_run():
    loss_fn, trainer_of = overflowing(range(100), by=math.inf)
    trainer_of["it"] = Trainer(
        tiny(), config(dtype=torch.float16, steps=40), batches, loss_fn, progress=False
    )
    with pytest.raises(CourseError, match="loss is nan"):  # 0 · inf: no scale would help
        trainer_of["it"].fit()
    loss_fn, trainer_of = overflowing(range(100), by=3e38)
    trainer_of["it"] = trainer = Trainer(
        tiny(), config(dtype=torch.float16, steps=40), batches, loss_fn, progress=False
    )
    with pytest.raises(CourseError, match="overflow float16 even unscaled at step 16"):
        trainer.fit()


def test_a_resumed_run_in_float16_has_its_scale(tmp_path):
    settings = config(dtype=torch.float16, checkpoint_interval=3, keep=9)
    loss_fn, trainer_of = overflowing({1})
    straight = tiny()
    trainer_of["it"] = Trainer(straight, settings, batches, loss_fn, directory=tmp_path, progress=False)
    trainer_of["it"].fit()
    shutil.rmtree(tmp_path / "step-00000006")
    resumed = tiny(seed=4)
    trainer_of["it"] = Trainer(resumed, settings, batches, loss_fn, directory=tmp_path, progress=False)
    trainer_of["it"].fit(resume=True)
    assert trainer_of["it"].scaler.get_scale() == 2.0**15
    assert torch.equal(weights(resumed), weights(straight))


# ------------------------------------------------------------------------------------------- guards


GUARD = {"guard": 6.0, "guard_window": 8, "guard_patience": 3, "steps": 30, "checkpoint_interval": 5}


def spiky(bad_batches):
    """A loss a thousand times too high on some batches, known by their number."""

    def loss_fn(model, batch):
        loss = model(*batch[:2])[1]
        return loss * 1000.0 if int(batch[2]) in bad_batches else loss

    return loss_fn


def numbered(micro_step):
    return *batches(micro_step), torch.tensor(micro_step)


def test_an_update_that_spikes_is_skipped_and_logged(tmp_path):
    model, seen = tiny(), {}

    def watching(micro_step):
        seen[micro_step] = weights(model).clone()
        return numbered(micro_step)

    trainer = Trainer(
        model,
        config(**GUARD | {"log_interval": 10}),
        watching,
        spiky({12}),
        directory=tmp_path,
        progress=False,
    )
    history = trainer.fit()
    assert torch.equal(seen[12], seen[13])
    assert not torch.equal(seen[13], seen[14])
    assert [(entry["step"], entry["skipped"]) for entry in history] == [(10, 0), (13, 1), (20, 1), (30, 1)]
    assert trainer.rollbacks == 0


def test_without_a_guard_the_same_spike_goes_into_the_weights():
    guarded, bare = tiny(), tiny()
    Trainer(guarded, config(**GUARD), numbered, spiky({12}), progress=False).fit()
    Trainer(bare, config(steps=30), numbered, spiky({12}), progress=False).fit()
    assert not torch.equal(weights(guarded), weights(bare))
    quiet, unguarded = tiny(), tiny()  # and without a spike the guard changes nothing
    Trainer(quiet, config(**GUARD), numbered, spiky(()), progress=False).fit()
    Trainer(unguarded, config(steps=30), numbered, spiky(()), progress=False).fit()
    assert torch.equal(weights(quiet), weights(unguarded))


def test_a_guard_skips_a_loss_that_is_not_finite():
    loss_fn = lambda model, batch: model(*batch[:2])[1] * (math.nan if int(batch[2]) == 3 else 1.0)  # noqa: E731
    model = tiny()
    history = Trainer(model, config(**GUARD), numbered, loss_fn, progress=False).fit()
    assert torch.isfinite(weights(model)).all()
    assert "loss" not in history[3]
    assert history[3]["skipped"] == 1


def test_skips_in_a_row_go_back_to_the_last_checkpoint_and_on_with_later_batches(tmp_path, capsys):
    bad, seen = {12, 13, 14}, []

    def watching(micro_step):
        seen.append(micro_step)
        return numbered(micro_step)

    trainer = Trainer(tiny(), config(**GUARD), watching, spiky(bad), directory=tmp_path, progress=True)
    history = trainer.fit()
    assert seen == [*range(15), *range(15, 35)]  # back at update 10, whose batch is now number 15
    assert (trainer.rollbacks, trainer.passed_over) == (1, 5)
    assert [entry["step"] for entry in history] == list(range(1, 31))
    said = capsys.readouterr().err
    assert "step 12: the loss is" in said
    assert "3 updates skipped in a row: back to step 10." in said


def test_a_run_that_keeps_spiking_stops_after_its_last_rollback(tmp_path):
    trainer = Trainer(
        tiny(),
        config(**GUARD, guard_rollbacks=2),
        numbered,
        spiky(range(12, 1000)),
        directory=tmp_path,
        progress=False,
    )
    with pytest.raises(CourseError, match=r"last 3 updates up to step 13 were skipped.*gone back 2 times"):
        trainer.fit()
    assert checkpointing.latest_checkpoint(tmp_path).name == "step-00000010"


def test_without_a_checkpoint_to_go_back_to_the_run_stops():
    trainer = Trainer(tiny(), config(**GUARD), numbered, spiky(range(12, 1000)), progress=False)
    with pytest.raises(CourseError, match="gone back 0 times"):
        trainer.fit()


def test_a_guarded_run_resumes_bit_for_bit_after_a_rollback(tmp_path):
    loss_fn, settings = spiky({12, 13, 14, 23}), config(**GUARD, keep=9)
    straight = tiny(dropout=0.5)
    history = Trainer(straight, settings, numbered, loss_fn, directory=tmp_path, progress=False).fit()
    for step in (20, 25, 30):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    resumed = tiny(seed=8, dropout=0.5)
    trainer = Trainer(resumed, settings, numbered, loss_fn, directory=tmp_path, progress=False)
    again = trainer.fit(resume=True)
    assert torch.equal(weights(resumed), weights(straight))
    assert trainer.rollbacks == 1
    assert [entry["skipped"] for entry in again] == [entry["skipped"] for entry in history]
    assert [entry.get("loss") for entry in again] == [entry.get("loss") for entry in history]


# ----------------------------------------------------------------------- evaluations that decide something


def scripted(losses):
    """An evaluation that gives these, one after the other."""
    values = iter(losses)
    return lambda model: {"loss": next(values)}


def test_a_run_stops_when_patience_is_over(tmp_path):
    settings = config(steps=40, eval_interval=2, patience=2, log_interval=50)
    evaluate = scripted([3.0, 2.0, 2.5, 1.9, 1.9, 2.1, 0.1])
    trainer = Trainer(tiny(), settings, batches, evaluate=evaluate, directory=tmp_path, progress=False)
    history = trainer.fit()
    assert [entry["val_loss"] for entry in history] == [3.0, 2.0, 2.5, 1.9, 1.9, 2.1]
    assert trainer.stopped_early
    assert trainer.step == 12
    assert checkpointing.latest_checkpoint(tmp_path).name == "step-00000012"
    again = Trainer(tiny(), settings, batches, evaluate=evaluate, directory=tmp_path, progress=False)
    assert again.fit(resume=True) == history  # resumed, it has nothing left to do


def test_without_patience_the_same_run_goes_on():
    settings = config(steps=8, eval_interval=2)
    history = Trainer(
        tiny(), settings, batches, evaluate=scripted([1.0, 2.0, 3.0, 4.0]), progress=False
    ).fit()
    assert history[-1]["step"] == 8


def test_the_best_checkpoint_is_marked_and_kept(tmp_path):
    settings = config(steps=12, eval_interval=2, checkpoint_interval=2, keep=2)
    evaluate = scripted([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    Trainer(tiny(), settings, batches, evaluate=evaluate, directory=tmp_path, progress=False).fit()
    assert [found.step for found in checkpointing.list_checkpoints(tmp_path)] == [4, 10, 12]
    assert checkpointing.load_checkpoint(tmp_path / "best").step == 4
    assert checkpointing.load_checkpoint(tmp_path / "latest").step == 12


def test_the_best_stays_the_best_after_a_resume(tmp_path):
    settings = config(steps=6, eval_interval=2, checkpoint_interval=2, keep=9)
    options = {"directory": tmp_path, "progress": False}
    Trainer(tiny(), settings, batches, evaluate=scripted([1.0, 2.0, 3.0]), **options).fit()
    shutil.rmtree(tmp_path / "step-00000006")
    Trainer(tiny(), settings, batches, evaluate=scripted([1.5]), **options).fit(resume=True)
    assert (tmp_path / "best").read_text() == "step-00000002\n"
    shutil.rmtree(tmp_path / "step-00000006")
    Trainer(tiny(), settings, batches, evaluate=scripted([0.5]), **options).fit(resume=True)
    assert (tmp_path / "best").read_text() == "step-00000006\n"


def test_a_checkpoint_is_saved_at_every_best_evaluation_where_asked_for(tmp_path):
    settings = config(steps=10, eval_interval=2, save_best=True, keep=1)
    evaluate = scripted([3.0, 2.0, 2.5, 2.6, 2.7])
    Trainer(tiny(), settings, batches, evaluate=evaluate, directory=tmp_path, progress=False).fit()
    assert [found.step for found in checkpointing.list_checkpoints(tmp_path)] == [4, 10]


def test_every_so_many_updates_a_checkpoint_is_kept_for_good(tmp_path):
    settings = config(steps=9, checkpoint_interval=1, keep=2, keep_every=3)
    Trainer(tiny(), settings, batches, directory=tmp_path, progress=False).fit()
    assert [found.step for found in checkpointing.list_checkpoints(tmp_path)] == [3, 6, 8, 9]


# --------------------------------------------------------------- how the work is done, and where it goes on


def gpt(**changes):
    from shared.models.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB, T, 3, 2, 16, **changes))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "choices",
    [{}, {"position": "rope"}, {"position": "alibi"}, {"norm": "rmsnorm", "qk_norm": True}],
    ids=str,
)
def test_activations_computed_again_give_the_same_losses_and_gradients_to_the_bit(dropout, choices):
    results, calls = [], []
    for again in (False, True):
        model = gpt(dropout=dropout, **choices)
        count = [0]
        model.blocks[0].register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        torch.manual_seed(5)
        settings = config(activation_checkpointing=again, steps=3)
        history = Trainer(model, settings, batches, progress=False).fit()
        results.append(([(h["loss"], h["grad_norm"]) for h in history], weights(model)))
        calls.append(count[0])
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert calls == [3, 6]  # otherwise nothing was computed again


def test_activations_computed_again_take_less_memory():
    sizes = []
    for again in (False, True):
        model = gpt()
        model.checkpointing = again
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            model(*batches(0))
        sizes.append(sum(saved))
    assert sizes[1] < 0.5 * sizes[0]


def test_a_model_that_cannot_compute_activations_again_is_refused():
    with pytest.raises(CourseError, match="TinyLM cannot compute activations again"):
        Trainer(tiny(), config(activation_checkpointing=True), batches, progress=False)


def test_a_compiled_model_is_called_in_training_and_keeps_its_names(tmp_path, monkeypatch):
    real, seen = torch.compile, []

    def compiled(model):
        seen.append(model)
        return real(model, backend="eager")  # generating kernels takes a compiler and half a minute

    monkeypatch.setattr(torch, "compile", compiled)
    model, plain = tiny(), tiny()
    trainer = Trainer(model, config(compile=True, steps=2), batches, directory=tmp_path, progress=False)
    trainer.fit()
    assert seen == [model]
    assert trainer.module is not model
    names = checkpointing.load_checkpoint(tmp_path).model.keys()
    assert names == plain.state_dict().keys()
    Trainer(plain, config(steps=2), batches, progress=False).fit()
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=1e-6)


def test_a_compiler_that_fails_is_one_sentence(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no g++ found")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=broken))
    with pytest.raises(CourseError, match=r"torch.compile failed \(.*no g\+\+ found.*compile to false"):
        Trainer(tiny(), config(compile=True), batches, progress=False).fit()


def test_by_default_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: pytest.fail("compiled"))
    Trainer(tiny(), config(steps=1), batches, progress=False).fit()


def test_sigterm_is_an_orderly_end_with_an_exit_status_of_its_own(tmp_path):
    def terminating(micro_step):
        if micro_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(micro_step)

    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(tiny(), config(), terminating, directory=tmp_path, progress=False)
    with pytest.raises(Terminated, match="step 3 of 6") as caught:
        trainer.fit()
    assert caught.value.exit_status == 143
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpointing.latest_checkpoint(tmp_path).name == "step-00000003"


def test_batches_do_not_depend_on_who_loads_them_or_in_which_order():
    """A loader's position is the micro-step alone: any number of workers gives the same run."""
    from concurrent.futures import ThreadPoolExecutor

    from shared.training.trainer import token_batches

    tokens = torch.randint(VOCAB, (300,), generator=torch.Generator().manual_seed(1)).numpy()
    settings = config(steps=40, accumulation=2)
    alone = [token_batches(tokens, settings)(i) for i in range(80)]  # several epochs of 12 batches
    for workers in (1, 2, 3):
        loaders = [token_batches(tokens, settings) for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(lambda i, of=loaders: of[i % len(of)](i), reversed(range(80))))
        for expected, got in zip(alone, reversed(results), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    middle = token_batches(tokens, settings)(53)  # a resumed run starts there, with no batch before it
    assert all(torch.equal(a, b) for a, b in zip(alone[53], middle, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])


def test_keys_that_do_not_decide_the_weights_may_change_on_resume(tmp_path):
    settings = config(checkpoint_interval=3, keep=9)
    Trainer(tiny(), settings, batches, directory=tmp_path, progress=False).fit()
    shutil.rmtree(tmp_path / "step-00000006")
    other = config(keep_every=2, tracker="none", peak_tflops=1.0, save_best=True, parallel="fsdp2")
    resumed = tiny(seed=3)
    Trainer(resumed, other, batches, directory=tmp_path, progress=False).fit(resume=True)
    straight = tiny()
    Trainer(straight, settings, batches, progress=False).fit()
    assert torch.equal(weights(resumed), weights(straight))
    with pytest.raises(CourseError, match="guard = None and this run has 6.0"):
        Trainer(tiny(), config(guard=6.0), batches, directory=tmp_path, progress=False).fit(resume=True)
