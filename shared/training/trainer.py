"""A compact training loop: accumulation, clipping, autocast, schedule, evaluation, checkpoints, resume.

What one update does is in `Trainer.train_step`, which reads top to bottom. The rest is what turns a loop into
a run: history, evaluation on a held-out set, checkpoints from which it goes on bit for bit (on several
processes without dropout: only rank 0's generators are saved), an orderly end on Ctrl-C and SIGTERM, a guard
against spikes, and the same code on several processes when torch.distributed is initialised.
"""

import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.runtime import files
from shared.runtime.errors import CourseError
from shared.training import checkpointing, sharding
from shared.training.config import Stage, TrainConfig
from shared.training.guards import SpikeGuard
from shared.training.optimization import build_optimizer, build_schedule, clip_gradients, set_learning_rate
from shared.training.progress import Progress
from shared.training.trackers import Metrics, NoTracker, Tracker, open_tracker

__all__ = ["Stage", "Terminated", "TrainConfig", "Trainer", "lm_evaluator", "lm_loss", "token_batches"]

Batch = Sequence[Tensor]
Loss = Tensor | tuple[Tensor, float]
History = list[dict[str, float]]
HISTORY = "history.json"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """Raised in place of KeyboardInterrupt where SIGTERM, not Ctrl-C, asked for the end."""

    exit_status = 128 + signal.SIGTERM


def lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats per token of a language model; `batch` is (inputs, targets), each (B, T)."""
    inputs, targets = batch
    return model(inputs, targets)[1]


def token_batches(
    tokens: Any, config: TrainConfig, rank: int = 0, world_size: int = 1
) -> Callable[[int], Batch]:
    """(inputs, targets) of micro-step m, sized by `config`'s stages: a pure function of seed, m and rank.

    Args:
        tokens: what `TokenLoader` takes: an array of ids or an open shard.
    """
    from shared.data.datasets import TokenLoader

    loaders: dict[tuple[int, int], TokenLoader] = {}

    def batch(micro_step: int) -> Batch:
        stage = config.stage_at(micro_step // config.accumulation)
        size = (stage.batch_size, stage.context_length)
        if size not in loaders:
            loaders[size] = TokenLoader(
                tokens, *size, config.seed, rank, world_size, sampling=config.sampling
            )
        return loaders[size].batch(micro_step)

    return batch


def lm_evaluator(
    tokens: Any, context_length: int, batch_size: int = 32, dtype: torch.dtype = torch.float32
) -> Callable[[nn.Module], dict[str, float]]:
    """An `evaluate` for the trainer: nats per token over all of `tokens`, every token predicted once."""
    from shared.evaluation.metrics import evaluate_lm

    def evaluate(model: nn.Module) -> dict[str, float]:
        score = evaluate_lm(model, tokens, context_length=context_length, batch_size=batch_size, dtype=dtype)
        return {"loss": score.nats_per_token}

    return evaluate


def divide_gradients(parameters: Sequence[nn.Parameter], total: Tensor) -> None:
    """Divide every gradient by `total` in place: gradients of sums become the gradient of the mean."""
    gradients = [sharding.local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, 1.0 / total)


class Trainer:
    """Trains `model` on `batches` as `config` says.

    Args:
        model: on the device it is to be trained on.
        config: sizes, optimiser, schedule, intervals.
        batches: micro-batch of micro-step m = step · accumulation + i; must depend on m alone, or resume and
            a rerun would see other data.
        loss_fn: mean loss of a micro-batch, or (mean, count): micro-batches, and processes, are then weighted
            by their counts, so that padded batches of different lengths give the big batch's gradient.
        evaluate: called every `eval_interval` updates and after the last; its numbers become `val_…`.
        directory: where checkpoints, history.json and the tracker's log go; None: nothing is written.
        progress: show a progress line on stderr, or in the notebook.
        bytes_per_token: of the text in UTF-8, so that the tracker can show bits per byte.

    With torch.distributed initialised, gradients are averaged by DistributedDataParallel, or the model's
    parameters become shards (`config.parallel`); `batches` must then give each rank its own share, and rank 0
    alone writes, shows progress and, but for shards, evaluates.

    Attributes:
        step, tokens, seconds: updates made, tokens seen by all processes, training time.
        history: as `fit` returns it.
        stopped_early: `config.patience` ended the run.

    Raises:
        CourseError: the model cannot do what the configuration asks for.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        batches: Callable[[int], Batch],
        loss_fn: Callable[[nn.Module, Batch], Loss] = lm_loss,
        *,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        directory: Path | str | None = None,
        progress: bool = True,
        bytes_per_token: float | None = None,
    ) -> None:
        self.model, self.config, self.batches, self.loss_fn = model, config, batches, loss_fn
        self.evaluate, self.directory = evaluate, Path(directory) if directory else None
        self.rank, self.world_size = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        self.progress = progress and self.rank == 0
        self.bytes_per_token = bytes_per_token
        if config.activation_checkpointing:
            _recompute_activations(model)
        self.sharded = self.world_size > 1 and config.parallel == "fsdp2"
        if self.sharded:
            sharding.shard(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer, self.schedule = build_optimizer(model, config), build_schedule(config)
        self.module = model
        if self.world_size > 1 and not self.sharded:
            self.module = _data_parallel(model, self.device)
        if config.compile:  # a wrapper of its own, so that the model keeps its names
            self.module = torch.compile(self.module)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.dtype == "float16" else None
        self.guard = SpikeGuard(config.guard, config.guard_window) if config.guard else None
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.rollbacks = 0  # times the guard went back
        self.passed_over = 0  # updates whose batches were left behind by that
        self.history: History = []
        self.best = math.inf  # the lowest val_loss that a checkpoint was saved at
        self.interrupted = self.stopped_early = self._skipped = False
        self._signalled = 0
        self._tracker: Tracker = NoTracker()
        self._metrics: Metrics | None = None
        self._bar: Progress | None = None

    def fit(self, *, resume: bool = False) -> History:
        """Train to `config.steps` updates.

        Args:
            resume: go on from the newest checkpoint in `directory` that is whole; what is damaged is named.

        Returns:
            One dict for every `log_interval` updates and each evaluation: step (updates made), loss (nats, of
            that update), lr, grad_norm (before clipping), tokens (so far), seconds (training time so far,
            without evaluation and saving), and `val_…` where evaluated. With a guard also skipped and
            rollbacks (both so far), and each skipped update has its entry; in float16 those that overflowed
            do. Numbers of such an entry that are not finite are left out.

        Raises:
            CourseError: the loss is not finite (step named), or the guard has gone back too often;
                `directory` holds a run and `resume` is false; another process trains into it; there is
                nothing to resume, or it belongs to another configuration; a checkpoint cannot be written.
            KeyboardInterrupt: after Ctrl-C, once the update in flight is done and a checkpoint is saved.
            Terminated: the same after SIGTERM.
        """
        with self._locked():
            self._begin(resume)
            self.model.train()
            with (
                self._finish_update_on_interrupt(),
                self._tracking(),
                self._compiler_explained(),
                Progress(self.config.steps, self.step, self.progress) as self._bar,
            ):
                self._train()
        if self.interrupted:
            end = Terminated if self._signalled == signal.SIGTERM else KeyboardInterrupt
            raise end(self._interrupt_message())
        return self.history

    def _train(self) -> None:
        loss = next((entry["loss"] for entry in reversed(self.history) if "loss" in entry), math.nan)
        validation = None
        while self.step < self.config.steps and not (self.interrupted or self.stopped_early):
            loss, record = self._timed_step()
            validation = record.get("val_loss", validation)
            if len(record) > 1:
                self._log(record)
            if self.guard and self.guard.streak >= self.config.guard_patience:
                self._roll_back()
            elif self._is_to_save(record):
                self._save()
            self._bar.update(self.step, loss, validation)
        self._bar.finish(self.step, loss, validation)

    def train_step(self) -> tuple[float, float]:
        """One update: gradients of all micro-batches, clipping, optimiser.

        Returns:
            Loss in nats and gradient norm before clipping, both before the update.

        Raises:
            CourseError: one of them is not finite, and neither a guard nor float16's scale takes care of it;
                the weights have not been touched.
        """
        set_learning_rate(self.optimizer, self.schedule(self.step))
        mean_loss = self._backward()
        if self.scaler:
            self._unscale()
        norm = clip_gradients(self.parameters, self.config.clip)
        loss, grad_norm = torch.stack((mean_loss, norm)).tolist()  # one transfer, not two
        suspect = self.guard or not (math.isfinite(loss) and math.isfinite(grad_norm))
        self._skipped = bool(suspect) and self._is_to_skip(loss, grad_norm)
        if not self._skipped:
            self.optimizer.step()
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return loss, grad_norm

    def _is_to_skip(self, loss: float, grad_norm: float) -> bool:
        """Of an update that is not finite, or that the guard is to judge."""
        if self.scaler and math.isfinite(loss) and not math.isfinite(grad_norm):
            if self.scaler.get_scale() > 1.0:
                return True  # an overflow: the scale halves, nothing is wrong
            raise CourseError(f"Gradients overflow float16 even unscaled at step {self.step}; use bfloat16.")
        reason = self.guard.objection(loss, grad_norm) if self.guard else None
        if reason and self._bar:
            self._bar.note(f"step {self.step}: {reason}; the update is skipped.")
        if not self.guard and not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise CourseError(
                f"The loss is {loss} and the gradient norm {grad_norm} at step {self.step}; lower the "
                "learning rate, warm up longer, or look at this step's batch."
            )
        return reason is not None

    def _unscale(self) -> None:
        """Divide the gradients by the scale of the loss."""
        for optimizer in getattr(self.optimizer, "optimizers", (self.optimizer,)):
            self.scaler.unscale_(optimizer)

    def _backward(self) -> Tensor:
        """Accumulate the gradient of the mean loss over all micro-batches and processes; return that loss."""
        first = (self.step + self.passed_over) * self.config.accumulation
        micro_batches = range(first, first + self.config.accumulation)
        if len(micro_batches) == self.world_size == 1:  # nothing to weigh
            loss, _ = self._micro_loss(micro_batches[0])
            self._scaled(loss).backward()
            return loss.detach()
        sums = torch.zeros(3, device=self.device)  # loss · count, count, ranks that were interrupted
        for micro_step in micro_batches:
            alone = self.world_size == 1 or micro_step == micro_batches[-1]
            with nullcontext() if alone else self._unsynchronised():
                loss, count = self._micro_loss(micro_step)
                self._scaled(loss * count).backward()
            sums[0] += loss.detach() * count
            sums[1] += count
        sums[2] = float(self._signalled > 0)
        if self.world_size > 1:
            dist.all_reduce(sums)
            self.interrupted = bool(sums[2] > 0)  # agreed: all stop after the same update
        divide_gradients(
            self.parameters, sums[1] / self.world_size
        )  # DDP has divided by the processes already
        return sums[0] / sums[1]

    def _scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss) if self.scaler else loss

    def _unsynchronised(self) -> AbstractContextManager:
        """Backward inside adds to this process's gradients and sends nothing."""
        return sharding.unsynchronised(self.model) if self.sharded else self.module.no_sync()

    def _micro_loss(self, micro_step: int) -> tuple[Tensor, float]:
        batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in self.batches(micro_step))
        self.tokens += batch[-1].numel() * self.world_size
        try:
            with self._autocast():
                loss = self.loss_fn(self.module, batch)
        except IndexError as error:
            self._check_vocabulary(batch, error)
            raise
        return loss if isinstance(loss, tuple) else (loss, 1.0)

    def _check_vocabulary(self, batch: Batch, error: IndexError) -> None:
        """Say so if it was a token that the model does not know."""
        size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        ids = [tensor for tensor in batch if tensor.numel() and not tensor.is_floating_point()]
        largest = max((int(tensor.max()) for tensor in ids), default=0)
        if size is not None and largest >= size:
            raise CourseError(
                f"The batch of step {self.step} holds token {largest:,} and the model's vocabulary has "
                f"{size:,} entries; train it on ids of its own tokenizer."
            ) from error

    def _autocast(self) -> AbstractContextManager:
        if self.config.torch_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.config.torch_dtype)

    def _timed_step(self) -> tuple[float, dict[str, float]]:
        """One update and, where due, its record; a record of one entry is not worth keeping."""
        began = time.perf_counter()
        lr = self.schedule(self.step) * self.optimizer.param_groups[-1]["base_lr"]
        loss, grad_norm = self.train_step()
        self.seconds += time.perf_counter() - began
        if self.world_size == 1:  # several processes agree on it while they add up the loss
            self.interrupted = self._signalled > 0
        record: dict[str, float] = {"step": self.step}
        logged = self.step % self.config.log_interval == 0 or self._due(self.config.eval_interval)
        if logged or self._skipped:
            record |= {"loss": loss, "lr": lr, "grad_norm": grad_norm}
            record |= {"tokens": self.tokens, "seconds": self.seconds}
            if self.guard:
                record |= {"skipped": self.guard.skipped, "rollbacks": self.rollbacks}
            if self._skipped:
                record = {name: value for name, value in record.items() if math.isfinite(value)}
        if self.evaluate and self._due(self.config.eval_interval):
            record |= self._validate()
        return loss, record

    def _due(self, interval: int) -> bool:
        return self.step == self.config.steps or (interval > 0 and self.step % interval == 0)

    def _is_to_save(self, record: dict[str, float]) -> bool:
        if self.interrupted or self.stopped_early or self.step == self.config.steps:
            return True
        if self.guard and self.guard.streak:  # not something to go back to
            return False
        best = self.config.save_best and self._is_best(record)
        return best or self._due(self.config.checkpoint_interval)

    def _is_best(self, record: dict[str, float]) -> bool:
        return record.get("val_loss", math.inf) < self.best

    def _out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before them."""
        losses = [entry["val_loss"] for entry in self.history if "val_loss" in entry]
        if not losses or not self.config.patience:
            return False
        return len(losses) - losses.index(min(losses)) > self.config.patience

    def _roll_back(self) -> None:
        """Go back to the last checkpoint, and on with the batches that come after those seen by now."""
        if self.rollbacks == self.config.guard_rollbacks or not self._has_checkpoint():
            raise CourseError(
                f"The last {self.guard.streak} updates up to step {self.step} were skipped as spikes, and "
                f"the run has gone back {self.rollbacks} times; lower the learning rate, or raise "
                "training.guard."
            )
        reached = self.step + self.passed_over
        skipped, rollbacks = self.guard.skipped, self.rollbacks + 1
        self._load(self.directory)
        self.passed_over = reached - self.step
        self.guard.skipped, self.rollbacks = skipped, rollbacks
        self._bar.note(f"{self.config.guard_patience} updates skipped in a row: back to step {self.step}.")
        self._tracker.close()
        self._open_tracker()

    def _has_checkpoint(self) -> bool:
        return bool(self.directory) and checkpointing.latest_checkpoint(self.directory) is not None

    def _validate(self) -> dict[str, float]:
        """`evaluate`'s numbers; its random draws, if any, leave the training's untouched."""
        result: dict[str, float] = {}
        if self.rank == 0 or self.sharded:  # shards have to be gathered by all
            self.model.eval()
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices):
                result = {f"val_{name}": float(value) for name, value in self.evaluate(self.model).items()}
            self.model.train()
        if self.world_size > 1:  # all decide alike whether it was the best, and whether to stop
            loss = torch.tensor(result.get("val_loss", math.nan), dtype=torch.float64, device=self.device)
            dist.broadcast(loss, 0)
            result = result | ({} if math.isnan(loss) else {"val_loss": loss.item()})
        return result

    def _log(self, record: dict[str, float]) -> None:
        self.history.append(record)
        if "val_loss" in record:
            self.stopped_early = self._out_of_patience()
        if self._metrics:
            context_length = self.config.stage_at(self.step - 1).context_length
            self._tracker.log(self.step, self._metrics.of(record, context_length))

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and this run must agree on: training configuration, model, processes."""
        choices = getattr(self.model, "config", None)
        model = dataclasses.asdict(choices) if dataclasses.is_dataclass(choices) else {}
        model = {f"model.{name}": value for name, value in model.items()}
        return self.config.identity() | model | {"processes": self.world_size}

    def _locked(self) -> AbstractContextManager:
        return checkpointing.lock(self.directory) if self.directory and self.rank == 0 else nullcontext()

    def _begin(self, resume: bool) -> None:
        """Check the folder; load the newest checkpoint, or seed the processes apart."""
        existing = self._has_checkpoint()
        if resume and not self.directory:
            raise ValueError("resume needs a directory")
        if existing and not resume and self.step == 0:
            raise CourseError(f"{self.directory} already holds a run; resume it or name another folder.")
        if resume:
            self._load(self.directory)
        if self.rank:  # each process draws its own dropout masks
            torch.manual_seed(self.config.seed + 1_000_003 * self.rank + self.step)
        if self.directory and self.rank == 0:
            self._tidy_up(resume)

    def _tidy_up(self, resume: bool) -> None:
        """Remove what a killed run was writing, and do what it had no time for after its last checkpoint."""
        for name in ("step-*", HISTORY, checkpointing.LATEST, checkpointing.BEST):
            files.remove_leftovers(self.directory / name)
        if resume:
            path = checkpointing.checkpoint_path(self.directory, self.step)
            best = self._record().get("val_loss") == self.best
            checkpointing.settle(path, self.config.keep, self.config.keep_every, best=best)
            self._write_history()

    def _write_history(self) -> None:
        files.atomic_write(self.directory / HISTORY, json.dumps(self.history, indent=1) + "\n")

    def _record(self) -> dict[str, float]:
        """The history's entry of the last update, if it has one."""
        return self.history[-1] if self.history and self.history[-1]["step"] == self.step else {}

    def _load(self, directory: Path) -> None:
        checkpoint, problems = checkpointing.load_newest(directory)
        for problem in problems if self.rank == 0 else ():
            print(f"{problem} Going on from {checkpoint.path.name}.", file=sys.stderr)
        checkpointing.restore(checkpoint, self.model, self.optimizer, self._identity())
        extra = checkpoint.extra
        self.step, self.history = checkpoint.step, extra["history"]
        self.tokens, self.seconds = extra["tokens"], extra["seconds"]
        self.best = extra.get("best", math.inf)
        self.passed_over, self.rollbacks = extra.get("passed_over", 0), extra.get("rollbacks", 0)
        for part, name in ((self.guard, "guard"), (self.scaler, "scaler")):
            if part:
                part.load_state_dict(extra[name])
        self.stopped_early = self._out_of_patience()

    def _save(self) -> None:
        best = self._is_best(self._record())
        if best:
            self.best = self._record()["val_loss"]
        model, optimizer = self.model, self.optimizer
        if self.sharded and self.directory:
            model, optimizer = sharding.gather_model(model), sharding.gather_optimizer(optimizer)
        if self.directory and self.rank == 0:
            extra = {"history": self.history, "tokens": self.tokens, "seconds": self.seconds}
            if self.best < math.inf:
                extra["best"] = self.best
            if self.guard:
                extra |= {"guard": self.guard.state_dict(), "rollbacks": self.rollbacks}
                extra |= {"passed_over": self.passed_over}
            if self.scaler:
                extra["scaler"] = self.scaler.state_dict()
            checkpointing.save_checkpoint(
                self.directory,
                self.step,
                model,
                optimizer,
                self._identity(),
                extra=extra,
                keep=self.config.keep,
                keep_every=self.config.keep_every,
                best=best,
            )
            self._write_history()
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def _finish_update_on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM is noted and acted on between two updates; a second stops at once."""
        self.interrupted, self._signalled = False, 0
        if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
            yield
            return

        def note(number: int, frame: Any) -> None:
            self._signalled = number
            signal.signal(number, previous[number])

        previous = {number: signal.signal(number, note) or signal.SIG_DFL for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def _compiler_explained(self) -> Iterator[None]:
        """torch.compile works at the first update, and needs a C++ compiler (on CPU) or Triton (on a GPU)."""
        try:
            yield
        except Exception as error:
            if self.config.compile and type(error).__module__.startswith(
                ("torch._dynamo", "torch._inductor")
            ):
                reason = " ".join(str(error).strip().splitlines()[:2]).rstrip(".")
                raise CourseError(
                    f"torch.compile failed ({reason}); set training.compile to false."
                ) from error
            raise

    def _interrupt_message(self) -> str:
        at = f"Interrupted at step {self.step} of {self.config.steps}"
        return f"{at}; saved in {self.directory}, resume to go on." if self.directory else f"{at}."

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        self._open_tracker()
        try:
            yield
        finally:
            self._tracker.close()

    def _open_tracker(self) -> None:
        directory = self.directory if self.rank == 0 else None
        self._tracker = open_tracker(self.config.tracker, directory, self._identity(), self.step)
        if not isinstance(self._tracker, NoTracker):
            self._metrics = Metrics(
                self.model,
                self.device,
                self.config.torch_dtype,
                bytes_per_token=self.bytes_per_token,
                peak_tflops=self.config.peak_tflops,
                world_size=self.world_size,
            )
            self._metrics.start(self.tokens, self.seconds)


def _recompute_activations(model: nn.Module) -> None:
    if not hasattr(model, "checkpointing"):
        raise CourseError(
            f"{type(model).__name__} cannot compute activations again; leave out activation_checkpointing."
        )
    model.checkpointing = True


def _data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)
