"""How much memory a computation needs at its worst moment, counted by the allocator and not by the clock.

The count is the same in every run: it adds up what tensors ask for, and leaves out what the allocator keeps
back for later. So it can be claimed and tested, where resident memory can only be watched.
"""

import gc
import os
from collections.abc import Callable

import torch


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that `function` holds at once, beyond what was held before.

    On a CPU PyTorch's profiler reports every allocation and release, those inside a kernel too; this slows
    the function down, so time it elsewhere.

    Args:
        function: what to run, once; its result is dropped.
        device: where it allocates.

    Returns:
        Bytes of tensors at the peak, temporary ones included.
    """
    device = torch.device(device)
    gc.collect()  # what an earlier cell left in a cycle would be released inside, and counted against it
    if device.type == "cuda":
        return _cuda_peak(function, device)
    return _cpu_peak(function)


def _cuda_peak(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(function: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise each run writes two lines to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])  # stable: events of one nanosecond stay in their order
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
