"""Where a run's numbers can be watched: TensorBoard, Weights & Biases, or nowhere.

A tracker takes names and values; what they are is worked out here, once for all of them. History and
checkpoints do not depend on it.
"""

import math
import netrc
import os
import secrets
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import nn

from shared.runtime import files
from shared.runtime.errors import CourseError

PROJECT = "llm-learning"
WANDB_ID = "wandb-id"


class Tracker(Protocol):
    """Takes a run's numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note `values` at `step` (updates made)."""

    def close(self) -> None:
        """Write what has not been written."""


class NoTracker:
    """Forgets everything."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TensorBoard:
    """Event files in `directory/tensorboard`.

    Args:
        directory: the run's folder.
        step: updates made; what an interrupted run logged after them is hidden.
    """

    def __init__(self, directory: Path, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note `values` at `step`: one event for all, where `add_scalar` would write one for each."""
        content = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.file_writer.add_summary(self._summary(value=content), step)

    def close(self) -> None:
        """Write what has not been written."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, its files in `directory`.

    Without a key to log in with (`wandb login`, or WANDB_API_KEY) it works offline; WANDB_MODE decides where
    it is set. A resumed run goes on under its own id.

    Args:
        directory: the run's folder.
        config: shown beside the run.

    Raises:
        CourseError: wandb is not installed.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise CourseError(
                "tracker is 'wandb', which is not installed; pip install wandb, or set training.tracker to "
                "tensorboard."
            ) from error
        note = directory / WANDB_ID
        if not note.exists():
            files.atomic_write(note, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=PROJECT,
            name=directory.name,
            dir=str(directory),
            config=dict(config),
            id=files.read_text(note).strip(),
            resume="allow",
            mode=os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note `values` at `step`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write, or send, what has not been."""
        self._run.finish()


def _has_key() -> bool:
    """Whether wandb could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_tracker(kind: str, directory: Path | None, config: Mapping[str, Any], step: int) -> Tracker:
    """The tracker that `kind` names.

    Args:
        kind: "tensorboard", "wandb" or "none".
        directory: the run's folder; None: nothing is tracked.
        config: what the run is made of.
        step: updates made so far.

    Raises:
        CourseError: wandb is asked for and not installed. TensorBoard, the default, is an extra: where it is
            missing one sentence on stderr says so, and the numbers are in history.json all the same.
    """
    if directory is None or kind == "none":
        return NoTracker()
    if kind == "wandb":
        return WeightsAndBiases(directory, config)
    try:
        return TensorBoard(directory, step)
    except ImportError:
        print(
            "TensorBoard is not installed (pip install tensorboard); history.json has the numbers.",
            file=sys.stderr,
        )
        return NoTracker()


class Metrics:
    """Adds to a history entry what follows from it: perplexity, bits per byte, tokens/s, MFU, memory.

    Args:
        model: MFU needs its `flops_per_token(T)`; without, it is left out.
        device: memory in use is the process's on CPU, and the most so far that tensors took on a GPU.
        dtype: of the matrix multiplications.
        bytes_per_token: UTF-8 bytes of the text a token; None: bits per byte are left out.
        peak_tflops: of one process's hardware, in 10¹² FLOP/s; 0: measured by `matmul_peak`.
        world_size: processes.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        *,
        bytes_per_token: float | None = None,
        peak_tflops: float = 0.0,
        world_size: int = 1,
    ) -> None:
        self.bytes_per_token, self.device = bytes_per_token, device
        self.peak = (1e12 * peak_tflops or matmul_peak(device, dtype)) * world_size
        self._flops = lru_cache(model.flops_per_token) if hasattr(model, "flops_per_token") else None
        self._process = psutil.Process()
        self._before = (0.0, 0.0)

    def start(self, tokens: float, seconds: float) -> None:
        """Speeds count from here."""
        self._before = (tokens, seconds)

    def of(self, record: Mapping[str, float], context_length: int) -> dict[str, float]:
        """All that a tracker is told of a history entry.

        Args:
            record: of the history.
            context_length: T of its update.
        """
        values = {name: value for name, value in record.items() if name != "step"}
        if "loss" in record:
            values["perplexity"] = math.exp(min(record["loss"], 700.0))  # beyond, a float overflows
            if self.bytes_per_token:
                values["bits_per_byte"] = record["loss"] / math.log(2) / self.bytes_per_token
        if "tokens" in record and record["seconds"] > self._before[1]:
            tokens, seconds = record["tokens"] - self._before[0], record["seconds"] - self._before[1]
            self.start(record["tokens"], record["seconds"])
            values["tokens_per_second"] = tokens / seconds
            if self._flops:
                values["mfu"] = tokens / seconds * self._flops(context_length) / self.peak
        values["memory_gb"] = self._memory() / 1e9
        return values

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._process.memory_info().rss


@lru_cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix multiplication on this machine: what MFU is a share of.

    The best of four, a tenth of a second in all. On CPU in float16, which no CPU here multiplies fast, the
    matrices are small.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 128 if dtype == torch.float16 else 1024
    matrix = torch.full((size, size), 0.5, dtype=dtype, device=device)  # draws nothing from a generator
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
