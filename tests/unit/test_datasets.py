"""Batches are pure functions of seed, step and rank, and see what they should."""

import numpy as np
import pytest
import torch

from shared.data.datasets import PairLoader, TokenLoader, pad
from shared.runtime.errors import CourseError

TOKENS = np.arange(1000, dtype=np.uint16)
SAMPLINGS = ("epochs", "uniform")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_targets_are_the_inputs_shifted_by_one(sampling):
    inputs, targets = TokenLoader(TOKENS, 4, 16, seed=0, sampling=sampling).batch(3)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # the tokens are 0, 1, 2, …
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_batch_depends_on_seed_and_step_alone(sampling):
    first = TokenLoader(TOKENS, 4, 16, seed=1, sampling=sampling)
    ahead = [first.batch(step)[0] for step in range(40)]
    again = TokenLoader(TOKENS, 4, 16, seed=1, sampling=sampling)
    for step in reversed(range(40)):
        assert torch.equal(again.batch(step)[0], ahead[step])
    other = TokenLoader(TOKENS, 4, 16, seed=2, sampling=sampling)
    assert not torch.equal(other.batch(0)[0], ahead[0])
    assert not torch.equal(ahead[0], ahead[1])


@pytest.mark.parametrize("tokens", [TOKENS.tolist(), torch.arange(1000), TOKENS.astype(np.int64)])
def test_lists_and_tensors_give_the_batches_of_arrays(tokens):
    expected = TokenLoader(TOKENS, 4, 16, seed=0).batch(5)[0]
    assert torch.equal(TokenLoader(tokens, 4, 16, seed=0).batch(5)[0], expected)


def test_an_epoch_visits_every_window_once_in_a_fresh_order_with_moved_borders():
    loader = TokenLoader(TOKENS, 1, 16, seed=0)
    windows = loader.windows_per_epoch
    assert windows == 61  # 62 fit; one is left for moving the borders
    epochs = []
    for epoch in range(6):
        starts = [int(loader.batch(epoch * windows + i)[0][0, 0]) for i in range(windows)]
        shift = min(starts)
        assert sorted(starts) == list(range(shift, shift + 16 * windows, 16))
        epochs.append(starts)
    assert len({min(starts) for starts in epochs}) > 2
    assert len({tuple(start - min(starts) for start in starts) for starts in epochs}) == 6


def test_a_batch_may_cross_into_the_next_epoch():
    one, five = TokenLoader(TOKENS, 1, 16, seed=0), TokenLoader(TOKENS, 5, 16, seed=0)
    singles = torch.cat([one.batch(step)[0] for step in range(200)])
    assert torch.equal(torch.cat([five.batch(step)[0] for step in range(40)]), singles)


def test_uniform_sampling_reaches_the_first_and_the_last_token_and_no_further():
    loader = TokenLoader(TOKENS[:20], 64, 16, seed=0, sampling="uniform")
    starts = torch.cat([loader.batch(step)[0][:, 0] for step in range(20)])
    assert starts.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_processes_read_different_windows(sampling):
    ranks = [TokenLoader(TOKENS, 4, 16, 0, rank=rank, world_size=2, sampling=sampling) for rank in (0, 1)]
    firsts = [torch.cat([loader.batch(step)[0] for step in range(7)]) for loader in ranks]
    assert not torch.equal(*firsts)
    if sampling == "epochs":  # together they are one process with twice the batch
        whole = TokenLoader(TOKENS, 8, 16, 0)
        for step in range(9):
            both = torch.cat([loader.batch(step)[0] for loader in ranks])
            assert torch.equal(both, whole.batch(step)[0])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("length", [0, 1, 16])
def test_a_text_shorter_than_one_window_is_refused(sampling, length):
    with pytest.raises(CourseError, match=f"{length} tokens, fewer than the 17"):
        TokenLoader(TOKENS[:length], 4, 16, 0, sampling=sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("length", [17, 18, 33, 34])
def test_a_text_of_one_or_two_windows_is_enough(sampling, length):
    loader = TokenLoader(TOKENS[:length], 2, 16, 0, sampling=sampling)
    for step in range(20):
        inputs, targets = loader.batch(step)
        assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize(
    "options", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"sampling": "shuffled"}], ids=str
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=r"not one of|neither"):
        TokenLoader(TOKENS, 4, 16, 0, **options)


def _pairs(count: int = 103) -> list[tuple[list[int], list[int]]]:
    lengths = np.random.default_rng(0).integers(1, 30, (count, 2))
    return [
        ([index + 1] * int(source), [index + 1] * int(target))
        for index, (source, target) in enumerate(lengths)
    ]


def test_pairs_stay_together_and_are_padded_to_the_longest_of_the_batch():
    pairs = _pairs()
    loader = PairLoader(pairs, 8, seed=0, pad_id=0)
    for step in range(30):
        source, target = loader.batch(step)
        assert source.dtype == target.dtype == torch.int64
        for row_source, row_target in zip(source.tolist(), target.tolist(), strict=True):
            expected_source, expected_target = pairs[row_source[0] - 1]
            assert [i for i in row_source if i] == expected_source
            assert [i for i in row_target if i] == expected_target
        for side in (source, target):
            assert (side != 0).sum(dim=1).max() == side.shape[1]


def test_an_epoch_holds_each_pair_at_most_once_and_other_epochs_leave_out_others():
    loader = PairLoader(_pairs(), 8, seed=0)
    assert loader.batches_per_epoch == 12
    epochs = []
    for epoch in range(3):
        rows = torch.cat([loader.batch(epoch * 12 + i)[0][:, 0] for i in range(12)]).tolist()
        assert len(set(rows)) == len(rows) == 96
        epochs.append(tuple(rows))
    assert len({frozenset(rows) for rows in epochs}) > 1


def test_pair_batches_depend_on_seed_step_and_rank_alone():
    loader, again = PairLoader(_pairs(), 8, seed=3), PairLoader(_pairs(), 8, seed=3)
    forward = [loader.batch(step) for step in range(30)]
    for step in reversed(range(30)):
        assert all(map(torch.equal, again.batch(step), forward[step]))
    ranks = [PairLoader(_pairs(), 8, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(30):
        assert torch.equal(ranks[step % 2].batch(step // 2)[0], forward[step][0])


def test_sorting_by_length_saves_most_of_the_padding():
    pairs = _pairs(2000)
    loader = PairLoader(pairs, 16, seed=0)
    batches = [loader.batch(step)[0] for step in range(loader.batches_per_epoch)]
    padding = sum(int((batch == 0).sum()) for batch in batches) / sum(batch.numel() for batch in batches)
    assert padding < 0.08  # in random order: 0.48


def test_batches_of_one_length_do_not_come_one_after_the_other():
    loader = PairLoader(_pairs(2000), 16, seed=0)
    widths = [loader.batch(step)[0].shape[1] for step in range(loader.batches_per_epoch)]
    assert widths != sorted(widths)
    assert abs(np.corrcoef(widths, range(len(widths)))[0, 1]) < 0.3


def test_fewer_pairs_than_a_batch_are_refused():
    with pytest.raises(CourseError, match="7 pairs, fewer than a batch of 8"):
        PairLoader(_pairs(7), 8, seed=0)


def test_padding_fills_the_right():
    assert pad([[1, 2], [], [3]], pad_id=9).tolist() == [[1, 2], [9, 9], [3, 9]]
    assert pad([]).shape == (0, 0)
