"""One word, `scale`, chooses device, dtype, threads and sizes; nothing else in a notebook depends on them."""

import logging
import os
import random
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from shared.runtime import hardware
from shared.runtime.errors import CourseError

NAMES = ("cpu", "gpu", "h100x2")
T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """The machine a notebook runs on, and what was chosen for it.

    Attributes:
        name: "cpu", "gpu" or "h100x2".
        device: where tensors live.
        dtype: what matrix multiplications run in under `autocast()` (bfloat16 or float32).
        threads: CPU threads for one process.
        seed: the seed that Python, NumPy and PyTorch were started with.
        reasons: why each of these was chosen, one sentence each.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    threads: int
    seed: int
    reasons: tuple[str, ...]

    def pick(self, *, cpu: T, gpu: T, h100x2: T) -> T:
        """The value that belongs to this scale: sizes are stated side by side, once."""
        return {"cpu": cpu, "gpu": gpu, "h100x2": h100x2}[self.name]

    def autocast(self) -> AbstractContextManager:
        """Run matrix multiplications in `dtype` (no-op where that is float32)."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def resolve(name: str, machine: hardware.Hardware) -> tuple[str, str]:
    """Which scale `name` means on `machine`, and why.

    Raises:
        CourseError: no such scale, or the machine has too few GPUs for it.
    """
    gpus = machine.gpus
    large = [gpu for gpu in gpus if gpu.memory_gb >= 75]
    if name == "auto":
        if len(large) >= 2:
            return "h100x2", f"h100x2: {len(large)} GPUs with 75 GB or more"
        if gpus:
            return "gpu", f"gpu: {gpus[0].name}, {gpus[0].memory_gb:.0f} GB"
        return "cpu", "cpu: no CUDA device found"
    if name not in NAMES:
        raise CourseError(f"Unknown scale {name!r}; choose one of auto, {', '.join(NAMES)}.")
    if name == "gpu" and not gpus:
        raise CourseError("Scale 'gpu' needs a CUDA device and this machine has none; use scale 'cpu'.")
    if name == "h100x2" and len(large) < 2:
        raise CourseError(
            f"Scale 'h100x2' needs two GPUs of 75 GB or more and this machine has {len(large)}; use 'auto'."
        )
    return name, f"{name}: asked for"


def choose_threads(cores: int) -> tuple[int, str]:
    """Threads for this process: $COURSE_THREADS if set (the runner shares the cores out), else one a core.

    Raises:
        CourseError: $COURSE_THREADS is not a whole number of at least 1.
    """
    wanted = os.environ.get("COURSE_THREADS")
    if wanted is None:
        return cores, f"{cores} thread{'s' * (cores > 1)}: one a core"
    if not wanted.isdigit() or int(wanted) < 1:
        raise CourseError(
            f"COURSE_THREADS is {wanted!r}; set it to a whole number of at least 1, or unset it."
        )
    return int(wanted), f"{wanted} thread{'s' * (wanted != '1')}: COURSE_THREADS"


def seed_everything(seed: int) -> None:
    """Start the generators of Python, NumPy and PyTorch (all devices) from `seed`.

    Raises:
        CourseError: `seed` lies outside what NumPy takes, 0 … 2³² − 1.
    """
    import numpy as np

    if not 0 <= seed < 2**32:
        raise CourseError(f"Seed {seed} is out of range; choose one from 0 to 4294967295.")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _quieten_libraries() -> None:
    """No warnings about what nobody needs here: torchao's kernels for other GPUs, Jupyter's widgets."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm in a notebook without ipywidgets


def start(name: str = "auto", seed: int = 0, *, quiet: bool = False) -> Scale:
    """Choose the scale, set threads, allocator and seeds accordingly, and print each choice with its reason.

    Args:
        name: "auto", "cpu", "gpu" or "h100x2".
        seed: for Python, NumPy and PyTorch.
        quiet: print nothing.

    Raises:
        CourseError: unknown scale, too few GPUs for it, or a bad seed or $COURSE_THREADS.
    """
    machine = hardware.detect()
    scale, scale_reason = resolve(name, machine)
    threads, threads_reason = choose_threads(machine.cores)
    on_gpu = scale != "cpu"
    fast_bf16, dtype_reason = machine.fast_bf16, machine.bf16_reason
    if not on_gpu and machine.gpus:  # the CPU was asked for although there is a GPU
        fast_bf16, dtype_reason = hardware.cpu_bf16()
    torch.set_num_threads(threads)
    _quieten_libraries()
    reasons = [scale_reason, dtype_reason, threads_reason]
    if hardware.tune_allocator():
        reasons.append("allocator: freed blocks stay in the process (fewer page faults)")
    seed_everything(seed)
    reasons.append(f"seed {seed}: Python, NumPy, PyTorch")
    if not quiet:
        print("\n".join(reasons))
        sys.stdout.flush()
    dtype = torch.bfloat16 if fast_bf16 else torch.float32
    return Scale(scale, torch.device("cuda" if on_gpu else "cpu"), dtype, threads, seed, tuple(reasons))
