import torch

from shared.evaluation.memory import peak_bytes

FLOATS = 250_000
MEGABYTE = 4 * FLOATS


def test_the_peak_counts_what_is_alive_together_and_not_what_came_after_a_release():
    def one_after_the_other():
        for _ in range(5):
            torch.ones(FLOATS)

    def all_at_once():
        return [torch.ones(FLOATS) for _ in range(5)]

    # A loop's next tensor exists before the name lets go of the last one, but here nothing is named.
    assert peak_bytes(one_after_the_other) == MEGABYTE
    assert peak_bytes(all_at_once) == 5 * MEGABYTE


def test_temporaries_inside_an_expression_are_counted():
    x = torch.ones(FLOATS)
    assert peak_bytes(lambda: ((x + 1) * (x + 2)).sum().item()) >= 3 * MEGABYTE


def test_what_existed_before_is_not_counted():
    x = torch.ones(FLOATS)
    assert peak_bytes(lambda: x.add_(1)) < 100  # the number 1 itself


def test_two_runs_give_the_same_number():
    q = torch.randn(64, 64)

    def run():
        return (q @ q.T).softmax(-1) @ q

    assert peak_bytes(run) == peak_bytes(run) > 0


def test_the_profiler_stays_silent(capfd):
    peak_bytes(lambda: torch.ones(10))
    assert capfd.readouterr() == ("", "")
