"""Timing, measured so that the answer can be trusted on a laptop that is doing other things too.

Two alternatives are timed in turn, pair by pair, and what is reported is the median of the pairs' ratios:
what slows the machine down for a while slows both down. Absolute times are for reading, ratios for claims.
"""

import gc
import statistics
import time
from collections.abc import Callable
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
