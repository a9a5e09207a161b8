import json

import pytest

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
