"""Masking for BERT: how much is hidden, what becomes of it, what is never touched; each with its bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.masking import IGNORE, mask_tokens
from shared.runtime.errors import CourseError

V, PAD, CLS, SEP, MASK = 50, 0, 1, 2, 3
SPECIAL = (PAD, CLS, SEP)
CONTINUES = torch.arange(V) >= 30  # tokens 30 … 49 go on with a word


def rows(B=200, T=64, lowest=4, seed=0) -> torch.Tensor:
    """[CLS] … [SEP], the odd rows half as long and padded."""
    ids = torch.randint(lowest, V, (B, T), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = CLS, SEP
    ids[1::2, T // 2 - 1] = SEP
    ids[1::2, T // 2 :] = PAD
    return ids


def masked(ids, seed=0, **options):
    options = {"vocab_size": V, "mask_id": MASK, "special_ids": SPECIAL} | options
    return mask_tokens(ids, torch.Generator().manual_seed(seed), **options)


def words(row: list[int]) -> list[list[int]]:
    """Places of each word of a row, found one token after the other."""
    found, open_word = [], False
    for place, token in enumerate(row):
        if token in (*SPECIAL, MASK):
            open_word = False
        elif open_word and token >= 30:
            found[-1].append(place)
        else:
            found.append([place])
            open_word = True
    return found


def test_targets_are_the_hidden_tokens_and_nothing_else_changes():
    ids = rows()
    before = ids.clone()
    inputs, targets = masked(ids)
    assert torch.equal(ids, before)
    chosen = targets != IGNORE
    assert torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert inputs.dtype == targets.dtype == torch.int64


def test_15_percent_of_each_rows_ordinary_tokens_are_chosen():
    """62 and 30 of them: 9.3 and 4.5, so 9 or 10 and 4 or 5; σ of the mean over 1,000 rows is 0.016."""
    ids = rows(2000)
    counts = (masked(ids)[1] != IGNORE).sum(1)
    assert set(counts[0::2].tolist()) == {9, 10}
    assert set(counts[1::2].tolist()) == {4, 5}
    assert counts[0::2].float().mean() == pytest.approx(9.3, abs=0.06)
    assert counts[1::2].float().mean() == pytest.approx(4.5, abs=0.06)


def test_every_place_is_as_likely_as_another():
    """Each of 62 places in 15 % of 4,000 rows: 600, σ = 22.6; five of those either way."""
    ids = rows(8000)[0::2]
    counts = (masked(ids)[1] != IGNORE).sum(0)
    assert counts[0] == counts[-1] == 0
    assert (counts[1:-1] - 600).abs().max() < 113


def test_of_the_chosen_80_percent_are_masked_10_percent_random_10_percent_kept():
    """About 41,000 chosen ones; σ of a share of 10 % is 0.0015, of 80 % 0.002. A random token may be the old
    one, with probability 1/46."""
    ids = rows(6000)
    inputs, targets = masked(ids)
    chosen = targets != IGNORE
    now, was = inputs[chosen], targets[chosen]
    assert (now == MASK).float().mean() == pytest.approx(0.8, abs=0.01)
    assert (now == was).float().mean() == pytest.approx(0.1 + 0.1 / 46, abs=0.0075)
    other = now[(now != MASK) & (now != was)]
    assert len(other) / len(now) == pytest.approx(0.1 * 45 / 46, abs=0.0075)


def test_random_tokens_are_ordinary_and_evenly_spread():
    """All rows hold token 4, so that 45 others can come in: χ² with 44 degrees of freedom exceeds 87 once in
    10,000 times."""
    ids = torch.full((4000, 64), 4)
    inputs, _ = masked(ids)
    other = inputs[(inputs != 4) & (inputs != MASK)]
    counts = other.bincount(minlength=V).float()
    assert not counts[:5].any()
    expected = len(other) / 45
    assert ((counts[5:] - expected) ** 2 / expected).sum() < 87


@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 1.0), whole_words=st.booleans())
@settings(max_examples=50, deadline=None)
def test_special_tokens_are_never_chosen(seed, share, whole_words):
    ids = rows(8, 20, seed=seed % 1000)
    ids[0, 5], ids[1, 3] = MASK, SEP
    inputs, targets = masked(ids, seed, share=share, continues=CONTINUES if whole_words else None)
    special = ids <= MASK
    assert (targets[special] == IGNORE).all()
    assert torch.equal(inputs[special], ids[special])
    assert ((targets != IGNORE).sum(1) >= 1).all()


def test_a_share_of_one_chooses_every_ordinary_token():
    ids = rows()
    for continues in (None, CONTINUES):
        targets = masked(ids, share=1.0, continues=continues)[1]
        assert torch.equal(targets != IGNORE, ids > MASK)


@given(seed=st.integers(0, 2**31), share=st.floats(0.05, 0.9))
@settings(max_examples=50, deadline=None)
def test_all_pieces_of_a_word_are_chosen_or_none(seed, share):
    ids = rows(8, 24, seed=seed % 1000)
    ids[2, 6] = ids[3, 4] = SEP  # what goes on after it is a word of its own
    chosen = masked(ids, seed, share=share, continues=CONTINUES)[1] != IGNORE
    for row, hidden in zip(ids.tolist(), chosen.tolist(), strict=True):
        for word in words(row):
            assert len({hidden[place] for place in word}) == 1


def test_without_the_option_words_are_torn_apart():
    ids = rows()
    chosen = masked(ids)[1] != IGNORE
    torn = [
        word
        for row, hidden in zip(ids.tolist(), chosen.tolist(), strict=True)
        for word in words(row)
        if len({hidden[place] for place in word}) == 2
    ]
    assert len(torn) > 100


def test_whole_words_are_15_percent_of_the_tokens_too():
    """Of 62 tokens: 9.3 on average; a row's count has σ < 1, so the mean of 4,000 rows 0.016."""
    ids = rows(8000)[0::2]
    counts = (masked(ids, continues=CONTINUES)[1] != IGNORE).sum(1).float()
    assert counts.mean() == pytest.approx(9.3, abs=0.08)
    assert counts.std() < 1.5


def test_the_pieces_of_a_word_meet_different_fates():
    """A draw for each: 2 · 0.8 · 0.2 = 32 % of the pairs have one "[MASK]"; one draw for both gives none."""
    ids = torch.tensor([10, 40]).repeat(4000, 8)
    inputs, targets = masked(ids, continues=CONTINUES)
    pairs = (inputs == MASK).unflatten(1, (8, 2))[(targets != IGNORE).unflatten(1, (8, 2)).all(-1)]
    assert len(pairs) > 4000
    assert (pairs.sum(-1) == 1).float().mean() == pytest.approx(0.32, abs=0.03)


def test_the_same_seed_gives_the_same_batch_and_another_seed_another():
    ids = rows()
    first, again, other = masked(ids, 7), masked(ids, 7), masked(ids, 8)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    masked(rows())
    assert torch.equal(torch.rand(1), expected)


def test_a_row_without_ordinary_tokens_has_no_target():
    ids = torch.tensor([[CLS, SEP, PAD, PAD], [CLS, 9, SEP, PAD]])
    targets = masked(ids, continues=CONTINUES)[1]
    assert (targets[0] == IGNORE).all()
    assert targets[1].tolist() == [IGNORE, 9, IGNORE, IGNORE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_id": V}, "50 is no id of a vocabulary of 50"),
        ({"special_ids": (-1,)}, "-1 is no id"),
        ({"special_ids": range(V)}, "All 50 tokens"),
        ({"vocab_size": 40}, "they must be 0 … 39"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.5}, "at most 1"),
        ({"share": float("nan")}, "share is nan"),
        ({"continues": torch.ones(V)}, "continues is torch.float32"),
        ({"continues": CONTINUES[1:]}, r"must be bool, \(50,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(CourseError, match=message):
        masked(rows(2, 60), **change)


@pytest.mark.parametrize("ids", [torch.full((4,), 9), torch.full((2, 4), 9.0), torch.full((2, 4), -1)])
def test_bad_ids_are_named(ids):
    with pytest.raises(CourseError, match=r"^(ids is|The ids run from -1)"):
        masked(ids)
