"""A compact training loop: accumulation, clipping, autocast, schedule, evaluation, checkpoints, resume.

What one update does is in `Trainer.train_step`, which reads top to bottom. The rest is what turns a loop into
a run: history, evaluation on a held-out set, checkpoints from which it goes on bit for bit (on several
processes without dropout: only rank 0's generators are saved), an orderly end on Ctrl-C, and the same code on
several processes when torch.distributed is initialised.
"""

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.runtime import files
from shared.runtime.errors import CourseError
from shared.training import checkpointing
from shared.training.config import Stage, TrainConfig
from shared.training.optimization import build_optimizer, build_schedule, clip_gradients, set_learning_rate
from shared.training.progress import Progress

__all__ = ["Stage", "TrainConfig", "Trainer", "lm_evaluator", "lm_loss", "token_batches"]

Batch = Sequence[Tensor]
Loss = Tensor | tuple[Tensor, float]
History = list[dict[str, float]]
HISTORY = "history.json"


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
    gradients = [p.grad for p in parameters if p.grad is not None]
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
        directory: where checkpoints, history.json and the TensorBoard log go; None: nothing is written.
        progress: show a progress line on stderr, or in the notebook.

    With torch.distributed initialised, gradients are averaged by DistributedDataParallel; `batches` must then
    give each rank its own share, and rank 0 alone evaluates, writes and shows progress.
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
    ) -> None:
        self.model, self.config, self.batches, self.loss_fn = model, config, batches, loss_fn
        self.evaluate, self.directory = evaluate, Path(directory) if directory else None
        self.rank, self.world_size = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        self.progress = progress and self.rank == 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer, self.schedule = build_optimizer(model, config), build_schedule(config)
        self.module = _data_parallel(model, self.device) if self.world_size > 1 else model
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.history: History = []
        self.interrupted = self._signalled = False

    def fit(self, *, resume: bool = False) -> History:
        """Train to `config.steps` updates.

        Args:
            resume: go on from the newest checkpoint in `directory`.

        Returns:
            One dict for every `log_interval` updates and each evaluation: step (updates made), loss (nats, of
            that update), lr, grad_norm (before clipping), tokens (so far), seconds (training time so far,
            without evaluation and saving), and `val_…` where evaluated.

        Raises:
            CourseError: the loss is not finite (step named); `directory` holds a run and `resume` is false;
                there is nothing to resume, or it belongs to another configuration; a checkpoint cannot be
                written.
            KeyboardInterrupt: after Ctrl-C, once the update in flight is done and a checkpoint is saved.
        """
        self._begin(resume)
        self.model.train()
        with (
            self._finish_update_on_interrupt(),
            self._tensorboard() as writer,
            Progress(self.config.steps, self.step, self.progress) as bar,
        ):
            loss, validation = self.history[-1]["loss"] if self.history else math.nan, None
            while self.step < self.config.steps and not self.interrupted:
                loss, record = self._timed_step()
                validation = record.get("val_loss", validation)
                if len(record) > 1:
                    self._log(record, writer)
                if self._due(self.config.checkpoint_interval) or self.interrupted:
                    self._save()
                bar.update(self.step, loss, validation)
            bar.finish(self.step, loss, validation)
        if self.interrupted:
            raise KeyboardInterrupt(self._interrupt_message())
        return self.history

    def train_step(self) -> tuple[float, float]:
        """One update: gradients of all micro-batches, clipping, optimiser.

        Returns:
            Loss in nats and gradient norm before clipping, both before the update.

        Raises:
            CourseError: one of them is not finite; the weights have not been touched.
        """
        set_learning_rate(self.optimizer, self.schedule(self.step))
        mean_loss = self._backward()
        norm = clip_gradients(self.parameters, self.config.clip)
        loss, grad_norm = torch.stack((mean_loss, norm)).tolist()  # one transfer, not two
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise CourseError(
                f"The loss is {loss} and the gradient norm {grad_norm} at step {self.step}; lower the "
                "learning rate, warm up longer, or look at this step's batch."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss, grad_norm

    def _backward(self) -> Tensor:
        """Accumulate the gradient of the mean loss over all micro-batches and processes; return that loss."""
        micro_batches = range(
            self.step * self.config.accumulation, (self.step + 1) * self.config.accumulation
        )
        if len(micro_batches) == self.world_size == 1:  # nothing to weigh
            loss, _ = self._micro_loss(micro_batches[0])
            loss.backward()
            return loss.detach()
        sums = torch.zeros(3, device=self.device)  # loss · count, count, ranks that were interrupted
        for micro_step in micro_batches:
            alone = self.world_size == 1 or micro_step == micro_batches[-1]
            with nullcontext() if alone else self.module.no_sync():
                loss, count = self._micro_loss(micro_step)
                (loss * count).backward()
            sums[0] += loss.detach() * count
            sums[1] += count
        sums[2] = float(self._signalled)
        if self.world_size > 1:
            dist.all_reduce(sums)
            self.interrupted = bool(sums[2] > 0)  # agreed: all stop after the same update
        divide_gradients(
            self.parameters, sums[1] / self.world_size
        )  # DDP has divided by the processes already
        return sums[0] / sums[1]

    def _micro_loss(self, micro_step: int) -> tuple[Tensor, float]:
        batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in self.batches(micro_step))
        self.tokens += batch[-1].numel() * self.world_size
        with self._autocast():
            loss = self.loss_fn(self.module, batch)
        return loss if isinstance(loss, tuple) else (loss, 1.0)

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
            self.interrupted = self._signalled
        record: dict[str, float] = {"step": self.step}
        if self.step % self.config.log_interval == 0 or self._due(self.config.eval_interval):
            record |= {"loss": loss, "lr": lr, "grad_norm": grad_norm}
            record |= {"tokens": self.tokens, "seconds": self.seconds}
        if self.evaluate and self._due(self.config.eval_interval):
            record |= self._validate()
        return loss, record

    def _due(self, interval: int) -> bool:
        return self.step == self.config.steps or (interval > 0 and self.step % interval == 0)

    def _validate(self) -> dict[str, float]:
        """`evaluate`'s numbers; its random draws, if any, leave the training's untouched."""
        result: dict[str, float] = {}
        if self.rank == 0:
            self.model.eval()
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices):
                result = {f"val_{name}": float(value) for name, value in self.evaluate(self.model).items()}
            self.model.train()
        if self.world_size > 1:
            dist.barrier()
        return result

    def _log(self, record: dict[str, float], writer: Any) -> None:
        self.history.append(record)
        if writer:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, self.step)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and this run must agree on: training configuration, model, processes."""
        choices = getattr(self.model, "config", None)
        model = dataclasses.asdict(choices) if dataclasses.is_dataclass(choices) else {}
        model = {f"model.{name}": value for name, value in model.items()}
        return self.config.identity() | model | {"processes": self.world_size}

    def _begin(self, resume: bool) -> None:
        """Check the folder; load the newest checkpoint, or seed the processes apart."""
        if self.directory:
            with files.explained("write", self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
        existing = checkpointing.latest_checkpoint(self.directory) if self.directory else None
        if resume and not self.directory:
            raise ValueError("resume needs a directory")
        if existing and not resume and self.step == 0:
            raise CourseError(f"{self.directory} already holds a run; resume it or name another folder.")
        if resume:
            self._load(self.directory)
        if self.rank:  # each process draws its own dropout masks
            torch.manual_seed(self.config.seed + 1_000_003 * self.rank + self.step)
        if self.directory and self.rank == 0:  # what a killed run was writing
            for name in ("step-*", HISTORY):
                files.remove_leftovers(self.directory / name)

    def _load(self, directory: Path | None) -> None:
        checkpoint = checkpointing.load_checkpoint(directory)
        checkpointing.restore(checkpoint, self.model, self.optimizer, self._identity())
        self.step = checkpoint.step
        self.history = checkpoint.extra["history"]
        self.tokens, self.seconds = checkpoint.extra["tokens"], checkpoint.extra["seconds"]

    def _save(self) -> None:
        if self.directory and self.rank == 0:
            extra = {"history": self.history, "tokens": self.tokens, "seconds": self.seconds}
            checkpointing.save_checkpoint(
                self.directory,
                self.step,
                self.model,
                self.optimizer,
                self._identity(),
                extra=extra,
                keep=self.config.keep,
            )
            files.atomic_write(self.directory / HISTORY, json.dumps(self.history, indent=1) + "\n")
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def _finish_update_on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C is noted and acted on between two updates; a second one stops at once."""
        self.interrupted = self._signalled = False
        if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
            yield
            return

        def note(number: int, frame: Any) -> None:
            self._signalled = True
            signal.signal(signal.SIGINT, previous)

        previous = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _interrupt_message(self) -> str:
        at = f"Interrupted at step {self.step} of {self.config.steps}"
        return f"{at}; saved in {self.directory}, resume to go on." if self.directory else f"{at}."

    @contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        writer = None
        if self.directory and self.rank == 0:
            with suppress(ImportError):  # an extra: without it the history is in history.json all the same
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(str(self.directory / "tensorboard"), purge_step=self.step + 1)
        try:
            yield writer
        finally:
            if writer:
                writer.close()


def _data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)
