"""What this machine has: cores, memory, GPUs, fast number formats — each with where the answer came from."""

import ctypes
import math
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class GPU:
    """One CUDA device: its name, memory in GB (10⁹ bytes), and compute capability."""

    name: str
    memory_gb: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class Hardware:
    """The machine as this process may use it.

    Attributes:
        cores: CPU cores this process may run on (affinity and container quota respected).
        memory_gb: memory this process may use, in GB (10⁹ bytes; container limit respected).
        gpus: the CUDA devices, in order.
        fast_bf16: matrix multiplication in bfloat16 is faster here than in float32.
        bf16_reason: why `fast_bf16` is what it is.
    """

    cores: int
    memory_gb: float
    gpus: tuple[GPU, ...]
    fast_bf16: bool
    bf16_reason: str


def _first_number(path: str) -> float | None:
    try:
        text = Path(path).read_text().split()[0]
    except (OSError, IndexError):
        return None
    return float(text) if text.isdigit() else None


def available_cores() -> int:
    """Cores this process may use: CPU affinity, then the container's quota (cgroup v2 `cpu.max`, or v1)."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        quota = str(_first_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "max")
        period = str(_first_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or 100_000)
    if quota != "max":
        cores = min(cores, max(1, math.ceil(float(quota) / float(period))))
    return cores


def available_memory_gb() -> float:
    """Memory this process may use, in GB (10⁹ bytes): the machine's, or the container's limit if lower."""
    total = float(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _first_number(path)
        if limit:
            total = min(total, limit)
    return total / 1e9


def cpu_bf16() -> tuple[bool, str]:
    """Whether matrix multiplication in bfloat16 is faster than in float32 on this CPU, and why."""
    checks = (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "avx512_bf16"))
    for function, feature in checks:
        check = getattr(torch.cpu, function, None)
        if check is not None and check():
            return True, f"bf16: this CPU has {feature}"
    return False, "fp32: this CPU has neither avx512_bf16 nor AMX, so bf16 would be slower"


def detect() -> Hardware:
    """Look at the machine. Takes a few milliseconds; nothing is changed."""
    gpus = tuple(
        GPU(device.name, device.total_memory / 1e9, (device.major, device.minor))
        for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    )
    if gpus:
        fast = all(gpu.capability >= (8, 0) for gpu in gpus)
        version = ".".join(map(str, gpus[0].capability))
        reason = f"{'bf16' if fast else 'fp32'}: {gpus[0].name} has compute capability {version}"
    else:
        fast, reason = cpu_bf16()
    return Hardware(available_cores(), available_memory_gb(), gpus, fast, reason)


def tune_allocator() -> bool:
    """Keep freed memory in the process instead of handing it back to the kernel at every step (Linux, glibc).

    glibc serves large blocks by `mmap` and unmaps them when freed, so the 67 MB of logits of a small language
    model are faulted in anew, page by page, at each step. Raising the two thresholds keeps them on the heap.

    Returns:
        True if the allocator took the settings; False where there is no glibc (nothing is changed).
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    libc = ctypes.CDLL("libc.so.6")
    return bool(libc.mallopt(m_mmap_threshold, 1 << 30)) and bool(libc.mallopt(m_trim_threshold, 2**31 - 1))


def cpu_name() -> str:
    """The processor's model name, for reports."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
