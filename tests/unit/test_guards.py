"""The guard skips what stands out, and only that."""

import math

import pytest

from shared.training.guards import SpikeGuard


def filled(sigmas=4.0, window=16) -> SpikeGuard:
    guard = SpikeGuard(sigmas, window)
    for i in range(window):
        assert guard.objection(2.0 + 0.1 * (i % 2), 1.0 + 0.2 * (i % 2)) is None
    return guard


def test_a_spike_is_one_that_lies_so_many_deviations_above_the_mean():
    guard = filled()  # losses: mean 2.05, deviation 0.05; norms: mean 1.1, deviation 0.1
    assert guard.objection(2.05 + 4 * 0.05 - 1e-6, 1.0) is None
    guard = filled()
    assert guard.objection(2.05 + 4 * 0.05 + 1e-6, 1.0) == "the loss is 2.25, where 2.05 ± 0.05 is usual"
    assert guard.objection(2.0, 1.1 + 4 * 0.1 + 1e-6) == "the gradient norm is 1.5, where 1.1 ± 0.1 is usual"
    assert guard.objection(-9.0, 0.0) is None  # low is no spike


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_update_on(bad):
    guard = SpikeGuard(4.0, 16)
    assert guard.objection(bad, 1.0) == f"the loss is {bad}"
    assert guard.objection(1.0, bad) == f"the gradient norm is {bad}"
    assert (guard.skipped, guard.streak) == (2, 2)


def test_judging_starts_with_half_a_window():
    guard = SpikeGuard(1.0, 16)
    for _ in range(7):
        guard.objection(1.0, 1.0)
    assert guard.objection(50.0, 1.0) is None
    assert guard.objection(500.0, 1.0) is not None


def test_a_spike_does_not_raise_the_bar_for_the_next_and_ends_a_streak():
    guard = filled()
    assert guard.objection(100.0, 1.0)
    assert guard.objection(99.0, 1.0)
    assert guard.streak == 2
    assert guard.objection(2.0, 1.0) is None
    assert (guard.skipped, guard.streak) == (2, 0)


def test_a_restored_guard_judges_like_the_first():
    guard, other = filled(), SpikeGuard(4.0, 16)
    guard.objection(100.0, 1.0)
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()
    assert other.objection(2.3, 1.0) == guard.objection(2.3, 1.0) is not None
