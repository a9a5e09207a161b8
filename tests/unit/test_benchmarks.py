import json
import sys

import pytest
import torch

from shared.evaluation import benchmarks
from shared.evaluation.benchmarks import PairedTiming


def test_pairs_are_interleaved_and_their_order_alternates():
    calls = []
    timing = benchmarks.paired_ratio(lambda: calls.append("a"), lambda: calls.append("b"), pairs=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert len(timing.baseline) == len(timing.candidate) == 3


def test_the_ratio_is_the_median_of_the_pairs_and_not_of_the_times():
    # A machine that slows down tenfold in the middle: each pair still says that the candidate is twice as
    # fast.
    timing = PairedTiming(baseline=(2.0, 20.0, 2.0, 40.0, 3.3), candidate=(1.0, 10.0, 1.0, 20.0, 1.1))
    assert timing.ratios == pytest.approx([2, 2, 2, 2, 3])
    assert timing.ratio == pytest.approx(2)
    summary = timing.summary()
    assert (summary["ratio_min"], summary["ratio_max"], summary["pairs"]) == pytest.approx((2, 3, 5))
    assert json.loads(json.dumps(summary)) == summary


def test_each_run_is_timed_on_its_own(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: next(clock))
    timing = benchmarks.paired_ratio(lambda: None, lambda: None, pairs=1, warmup=0)
    assert (timing.baseline, timing.candidate) == ((3.0,), (1.0,))


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs is 0"):
        benchmarks.paired_ratio(lambda: None, lambda: None, pairs=0)


def test_peak_tensor_bytes_counts_what_is_held_at_once():
    def together():
        a, b = torch.empty(1_000_000), torch.empty(500_000)
        return a.numel() + b.numel()

    def one_after_the_other():
        for _ in range(5):
            torch.empty(1_000_000)

    # Allocations are rounded up to 64 bytes.
    assert benchmarks.peak_tensor_bytes(together) == pytest.approx(6_000_000, abs=1000)
    assert benchmarks.peak_tensor_bytes(one_after_the_other) == pytest.approx(4_000_000, abs=1000)


def test_peak_tensor_bytes_sees_temporaries_inside_an_expression_and_leaves_out_what_was_there():
    x = torch.ones(1_000_000)
    peak = benchmarks.peak_tensor_bytes(lambda: ((x * 2) + (x * 3)).sum())
    assert peak == pytest.approx(12_000_000, abs=5000)


def test_a_process_is_measured_by_what_it_holds_itself():
    ballast = bytearray(300_000_000)  # the parent's memory must not count
    small = benchmarks.measure_process([sys.executable, "-c", "pass"])
    large = benchmarks.measure_process([sys.executable, "-c", "b = b'x' * 200_000_000"])
    assert small.peak_rss < 60_000_000
    assert 200_000_000 < large.peak_rss < 260_000_000
    assert small.seconds > 0
    assert len(ballast)


def test_a_process_that_fails_is_reported_with_its_output():
    with pytest.raises(RuntimeError, match="ended with 3.*broken pipe dream"):
        benchmarks.measure_process(
            [sys.executable, "-c", "import sys; print('broken pipe dream'); sys.exit(3)"]
        )
