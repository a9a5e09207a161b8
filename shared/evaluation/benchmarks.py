"""Timing and memory, measured so that the answer can be trusted on a laptop that is doing other things too.

Two alternatives are timed in turn, pair by pair, and what is reported is the median of the pairs' ratios:
what slows the machine down for a while slows both down. Absolute times are for reading, ratios for claims.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PairedTiming:
    """Seconds of two alternatives, run in turn.

    Attributes:
        baseline, candidate: seconds of each run; run i of both belongs together.
    """

    baseline: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """baseline / candidate, pair by pair: above 1 the candidate is faster."""
        return [b / c for b, c in zip(self.baseline, self.candidate, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios: how many times faster the candidate is."""
        return statistics.median(self.ratios)

    def summary(self) -> dict[str, float | int]:
        """Median ratio with its extremes, median seconds, number of pairs: for a report's JSON."""
        return {
            "ratio": round(self.ratio, 3),
            "ratio_min": round(min(self.ratios), 3),
            "ratio_max": round(max(self.ratios), 3),
            "baseline_seconds": round(statistics.median(self.baseline), 6),
            "candidate_seconds": round(statistics.median(self.candidate), 6),
            "pairs": len(self.baseline),
        }


def paired_ratio(
    baseline: Callable[[], object], candidate: Callable[[], object], *, pairs: int = 5, warmup: int = 1
) -> PairedTiming:
    """Time two alternatives in turn, the order changing from pair to pair.

    Args:
        baseline, candidate: called without arguments; on CUDA the device is waited for.
        pairs: timed runs of each.
        warmup: untimed runs of each beforehand.

    Raises:
        ValueError: `pairs` is below 1.
    """
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}; at least one is needed")
    for _ in range(warmup):
        baseline()
        candidate()
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            seconds[which].append(_seconds((baseline, candidate)[which]))
    return PairedTiming(tuple(seconds[0]), tuple(seconds[1]))


def _seconds(run: Callable[[], object]) -> float:
    gc.collect()  # a collection due to the one must not fall into the time of the other
    _synchronise()
    started = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - started


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_tensor_bytes(run: Callable[[], object]) -> int:
    """The most memory that PyTorch held at once for `run`, beyond what it held before, in bytes.

    Counts every allocation of PyTorch's allocator as the profiler reports it, kernels' scratch space
    included, and so gives the same number every time. On CUDA if `run` allocates there, otherwise on the CPU.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated() - before) > 0:
        return peak
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(
        changes, key=lambda pair: pair[0]
    ):  # stable: same instant, same order as recorded
        held += change
        peak = max(peak, held)
    return peak


# A process's peak includes that of the one it was forked from, so a small one stands in between.
_LAUNCHER = """
import json, os, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[2:], stdout=sys.stderr).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
report = {"code": code, "seconds": time.perf_counter() - started, "peak_rss": used.ru_maxrss * unit}
with open(sys.argv[1], "w") as file:
    json.dump(report, file)
"""


@dataclass(frozen=True)
class ProcessUse:
    """What a process took: wall-clock seconds and the most memory it held (resident set), in bytes."""

    seconds: float
    peak_rss: int


def measure_process(command: Sequence[str]) -> ProcessUse:
    """Run a command to its end and measure it (Linux and macOS).

    Raises:
        RuntimeError: it ended with a status other than 0; the message holds the end of its output.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        report_path = os.path.join(folder, "report.json")
        launcher = [sys.executable, "-I", "-c", _LAUNCHER, report_path, *map(str, command)]
        done = subprocess.run(launcher, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{command[0]} could not be started: {done.stderr[-2000:]}")
        with open(report_path, encoding="utf-8") as file:
            report = json.load(file)
    if report["code"]:
        raise RuntimeError(
            f"{' '.join(map(str, command))} ended with {report['code']}: {done.stderr[-2000:]}"
        )
    return ProcessUse(report["seconds"], report["peak_rss"])
