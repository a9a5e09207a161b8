"""Tests of week 4's exercises. A failure says what is wrong, not only that something is."""

import copy
import errno
import hashlib
import io
import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

# ------------------------------------------------------------------------------------------- read_window

IDS = np.random.default_rng(0).integers(0, 1 << 16, 50_000).astype("<u2")
HEADER = b"\xff" * 100


class CountingFile(io.BytesIO):
    """A file that counts the bytes that are read from it."""

    def __init__(self, data):
        super().__init__(data)
        self.total = 0

    def read(self, size=-1):
        data = super().read(size)
        self.total += len(data)
        return data

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.total += count
        return count


def window(answers, start, T):
    file = CountingFile(HEADER + IDS.tobytes())
    inputs, targets = answers.read_window(file, len(HEADER), start, T)
    return torch.as_tensor(inputs), torch.as_tensor(targets), file.total


@pytest.mark.parametrize("start", [0, 1, 777, len(IDS) - 33])
def test_read_window_begins_at_the_id_asked_for(answers, start):
    inputs, targets, _ = window(answers, start, 32)
    assert inputs.dtype == targets.dtype == torch.int64, (
        f"ids index an embedding: int64, not {inputs.dtype} and {targets.dtype}"
    )
    assert len(inputs) == len(targets) == 32, (
        f"T = 32 inputs and 32 targets, which takes 33 ids; you give {len(inputs)} and {len(targets)}"
    )
    expected = torch.from_numpy(IDS[start : start + 33].astype(np.int64))
    assert (inputs >= 0).all(), "ids above 32,767 came out negative: they are *unsigned*"
    assert torch.equal(inputs, expected[:-1]), (
        f"id {start} stands at byte {100 + 2 * start} of the file: a header of 100, then two bytes an id"
    )
    assert torch.equal(targets, expected[1:]), "the target of each input is the id that follows it"


def test_read_window_does_not_read_the_whole_file(answers):
    *_, total = window(answers, 40_000, 32)
    assert total <= 4096, f"a window of 32 takes 66 bytes of the file; you read {total:,}"


# --------------------------------------------------------------------------------------- windows_of_step


def test_windows_of_step_gives_processes_windows_of_their_own(answers):
    each = [answers.windows_of_step(0, 4, rank, 3, 1000) for rank in range(3)]
    assert [list(map(tuple, one)) for one in each[:1]] == [[(0, i) for i in range(4)]], (
        f"process 0 begins with windows 0 to 3 of epoch 0; you give {each[0]}"
    )
    both = set(map(tuple, each[0])) & set(map(tuple, each[1]))
    assert not both, f"processes 0 and 1 both read {sorted(both)}: each token would count twice"


def test_windows_of_step_visits_every_window_once_an_epoch(answers):
    seen = [
        tuple(one)
        for step in range(5)
        for rank in range(3)
        for one in answers.windows_of_step(step, 4, rank, 3, 25)
    ]
    repeated = sorted({one for one in seen if seen.count(one) > 1})
    assert not repeated, f"window {repeated[0]} is read {seen.count(repeated[0])} times in five steps"
    expected = [(number // 25, number % 25) for number in range(60)]
    missing = sorted(set(expected) - set(seen))
    assert not missing, f"window {missing[0]} (epoch, place) is never read, though later ones are"
    assert seen == expected, "steps and processes go through the windows in order; yours jump"


def test_windows_of_step_needs_nothing_but_the_step(answers):
    late = [tuple(one) for one in answers.windows_of_step(1_000_000, 8, 1, 2, 12_345)]
    first = (1_000_000 * 2 + 1) * 8
    assert late == [divmod(first + i, 12_345) for i in range(8)], (
        f"step 1,000,000 of process 1 of 2 begins at window {divmod(first, 12_345)}; you give {late[0]}"
    )


# -------------------------------------------------------------------------------------------- accumulate


class Recorded(torch.autograd.Function):
    """Passes a loss through, and notes its forward and its backward."""

    @staticmethod
    def forward(ctx, loss, events):
        ctx.events = events
        events.append("forward")
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.events.append("backward")
        return gradient, None


def accumulated(answers, lengths):
    """(mean loss, gradient) of a model from micro-batches of `lengths`, those of the whole, and events."""
    torch.manual_seed(0)
    table, events = nn.Parameter(torch.randn(20)), []

    def loss_of(ids):
        return Recorded.apply(table[ids].square().mean(), events)

    ids = torch.randint(0, 20, (sum(lengths),))
    loss = answers.accumulate(loss_of, list(ids.split(lengths)))
    expected = table[ids].square().mean()
    (gradient,) = torch.autograd.grad(expected, table)
    assert table.grad is not None, "no gradient came out: call backward"
    return (loss, table.grad), (expected.item(), gradient), events


def test_accumulate_equals_the_big_batch(answers):
    (_, found), (_, expected), _ = accumulated(answers, [8, 8, 8, 8])
    ratio = (found.norm() / expected.norm()).item()
    assert ratio == pytest.approx(1.0, abs=1e-4), (
        f"four micro-batches of one length give a gradient {ratio:.2f} times that of the batch of all"
    )
    assert torch.allclose(found, expected, atol=1e-6), "its length is right and its direction is not"


def test_accumulate_weights_micro_batches_by_their_tokens(answers):
    (_, found), (_, expected), _ = accumulated(answers, [24, 6, 2])
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 1e-4, (
        f"with 24, 6 and 2 tokens the gradient is off by {error:.0%}: a token in a short micro-batch weighs "
        "as much as one in a long one"
    )


def test_accumulate_returns_the_mean_loss_of_all_tokens(answers):
    (found, _), (expected, _), _ = accumulated(answers, [24, 6, 2])
    assert float(found) == pytest.approx(expected, rel=1e-5), (
        f"the mean over all 32 tokens is {expected:.4f}; you say {float(found):.4f}"
    )


def test_accumulate_holds_one_micro_batch_at_a_time(answers):
    *_, events = accumulated(answers, [8, 8, 8])
    assert events == ["forward", "backward"] * 3, (
        f"each loss is let go before the next is computed; yours came as {', '.join(events)}"
    )


# ----------------------------------------------------------------------------------------- warmup_cosine


def test_warmup_cosine_warms_up_from_the_first_update(answers):
    values = [answers.warmup_cosine(step, 1000, 100, 0.1) for step in range(101)]
    assert values[0] > 0, "the first update has a rate of 0: it is computed and thrown away"
    assert values[0] == pytest.approx(1 / 101), f"1/101 at step 0 of 100; you say {values[0]:.4f}"
    assert values[100] == pytest.approx(1.0), f"the peak is at step 100; you say {values[100]:.4f}"
    rises = [b - a for a, b in pairwise(values)]
    assert max(rises) - min(rises) < 1e-9, (
        f"from step 0 to 100 the rate rises by 1/101 at each; yours by {min(rises):.4f} to {max(rises):.4f}"
    )


@pytest.mark.parametrize(
    ("step", "expected"), [(325, 0.868198), (550, 0.55), (775, 0.231802), (999, 0.1), (1000, 0.1)]
)
def test_warmup_cosine_falls_along_half_a_cosine(answers, step, expected):
    found = answers.warmup_cosine(step, 1000, 100, 0.1)
    progress = (step - 100) / 900
    assert found == pytest.approx(expected, abs=1e-4), (
        f"step {step} is {progress:.0%} of the way from the peak (step 100) to the end (1000), where the "
        f"multiplier is 0.1: {expected:.4f}; you say {found:.4f}"
    )


def test_warmup_cosine_stays_at_its_floor(answers):
    found = answers.warmup_cosine(1500, 1000, 100, 0.1)
    assert found == pytest.approx(0.1), f"after the end it stays at 0.1; at step 1500 you say {found:.3f}"


# ----------------------------------------------------------------------------------- warmup_stable_decay


@pytest.mark.parametrize(
    ("step", "expected", "what"),
    [
        (0, 1 / 11, "the first update of a warm-up of 10"),
        (9, 10 / 11, "the last update of a warm-up of 10"),
        (10, 1.0, "the peak"),
        (50, 1.0, "the constant part"),
        (80, 1.0, "where the last 20 updates begin"),
        (90, 0.6, "half of the decay to 0.2"),
        (99, 0.24, "the last update"),
        (100, 0.2, "the end"),
        (150, 0.2, "after the end"),
    ],
)
def test_warmup_stable_decay_has_three_parts(answers, step, expected, what):
    found = answers.warmup_stable_decay(step, 100, 10, 20, 0.2)
    assert found == pytest.approx(expected), (
        f"step {step} of 100 is {what}: {expected:.4f}; you say {found:.4f}"
    )


# ---------------------------------------------------------------------------------------- clip_gradients


def gradients_of_norm(norm):
    torch.manual_seed(0)
    parts = [torch.randn(3, 4), 0.01 * torch.randn(5), torch.randn(2, 2, 2)]
    whole = math.sqrt(sum(part.square().sum().item() for part in parts))
    return [part * (norm / whole) for part in parts]


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_clip_gradients_has_one_norm_for_all(answers):
    gradients = gradients_of_norm(5.0)
    before = flat(gradients).clone()
    norm = float(answers.clip_gradients(gradients, 1.0))
    assert norm == pytest.approx(5.0, rel=1e-4), (
        f"together they have norm 5 (a root of a sum of squares) before clipping; you say {norm:.3f}"
    )
    after = flat(gradients)
    assert not torch.equal(after, before), "nothing has changed: the gradients are scaled in place"
    cosine = torch.dot(before, after) / (before.norm() * after.norm())
    assert cosine > 0.9999, (
        f"clipping turned the gradient (cosine {cosine:.3f}): every number gets the same factor"
    )
    assert after.norm().item() == pytest.approx(1.0, rel=1e-3), f"clipped to 1 the norm is {after.norm():.3f}"


def test_clip_gradients_leaves_short_ones_alone(answers):
    gradients = gradients_of_norm(0.3)
    before = flat(gradients).clone()
    norm = float(answers.clip_gradients(gradients, 1.0))
    assert norm == pytest.approx(0.3, rel=1e-4), f"the norm is 0.3; you say {norm:.3f}"
    after = flat(gradients)
    assert torch.allclose(after, before), (
        f"a gradient of norm 0.3 is within the limit of 1 and stays; yours has {after.norm():.2f} now"
    )


# ----------------------------------------------------------------------------------------------- unscale


def test_unscale_divides_by_the_scale_of_this_update(answers):
    for good in (0, 4):  # in the second case the scale doubles
        true, *_ = answers.unscale([torch.tensor([3.0, -1.0]), torch.tensor([0.5])], 256.0, good, 5)
        assert true is not None, "all gradients are finite: the update is not skipped"
        assert torch.allclose(flat(true) * 256, torch.tensor([3.0, -1.0, 0.5])), (
            f"these are gradients of 256 times the loss: divide by 256; you give {flat(true).tolist()}"
        )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_unscale_skips_an_overflow_and_halves_the_scale(answers, bad):
    true, scale, good = answers.unscale([torch.ones(3), torch.tensor([1.0, bad])], 1024.0, 7, 100)
    assert true is None, f"a gradient is {bad}: the update must be skipped"
    assert scale == 512.0, f"after an overflow the scale is halved, to 512; you say {scale}"
    assert good == 0, f"an overflow ends the row of good updates; you still count {good}"


def test_unscale_doubles_the_scale_after_so_many_good_updates(answers):
    scale, good, seen = 8.0, 0, []
    for update in range(10):
        gradient = torch.tensor([math.inf if update == 2 else 1.0])
        _, scale, good = answers.unscale([gradient], scale, good, 3)
        seen.append(scale)
    expected = [8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0]
    assert seen == expected, (
        f"interval 3, an overflow in the third update: scales {expected}; yours are {seen}"
    )


# ----------------------------------------------------------------------------------------- write_checked

OLD, NEW = b"the old checkpoint", bytes(range(256)) * 40


class Disk:
    """Watches, and where asked to fails, what makes a file durable and gives it its name."""

    def __init__(self, monkeypatch, path, fail=None):
        self.path, self.fail, self.synced, self.renames = path, fail, [], []
        self.before = {}
        for name in ("fsync", "fdatasync", "replace", "rename"):
            if hasattr(os, name):
                monkeypatch.setattr(os, name, self.watched(name, getattr(os, name)))

    def watched(self, name, real):
        def call(*arguments, **options):
            kind = "sync" if "sync" in name else "rename"
            if kind == "sync":
                self.synced.append(os.fstat(arguments[0]).st_size)
            else:
                self.before = {"synced": list(self.synced), "there": self.path.exists()}
                self.renames.append(tuple(map(os.fspath, arguments[:2])))
            if self.fail == kind:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return call


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "run" / "step-100"
    path.parent.mkdir()
    path.write_bytes(OLD)
    return path


def test_write_checked_writes_checksum_and_data(answers, target):
    answers.write_checked(target, NEW)
    content = target.read_bytes()
    assert content[32:] == NEW, (
        f"32 bytes of checksum, then {len(NEW):,} of data; yours has {len(content):,} bytes, or others"
    )
    assert content[:32] == hashlib.sha256(NEW).digest(), "the first 32 bytes are SHA-256's digest of the data"
    fresh = target.with_name("step-200")
    answers.write_checked(fresh, b"")
    assert fresh.read_bytes() == hashlib.sha256(b"").digest(), "a file that is not there yet is written too"


def test_write_checked_puts_a_whole_file_in_the_old_ones_place(answers, target, monkeypatch):
    disk = Disk(monkeypatch, target)
    answers.write_checked(target, NEW)
    assert disk.renames, "you write into the file itself: a kill halfway leaves neither the old nor the new"
    source, destination = disk.renames[-1]
    assert os.path.samefile(os.path.dirname(source), target.parent), (
        "the temporary file is in another folder, perhaps on another disk, from where a rename is a copy"
    )
    assert os.path.abspath(destination) == str(target), f"you rename to {destination}"
    assert disk.before["there"], "the old file was gone before the new one was in its place"
    synced = max(disk.before["synced"], default=None)
    assert synced is not None, "renamed before os.fsync: after a power cut the name may lead to an empty file"
    assert synced == 32 + len(NEW), (
        f"os.fsync saw {synced:,} of {32 + len(NEW):,} bytes: flush Python's own buffer first"
    )


@pytest.mark.parametrize("fail", ["sync", "rename"])
def test_write_checked_leaves_the_old_file_when_it_fails(answers, target, monkeypatch, fail):
    Disk(monkeypatch, target, fail)
    raised = None
    try:
        answers.write_checked(target, NEW)
    except OSError as error:
        raised = error
    there = target.exists() and target.read_bytes()
    assert there == OLD, f"the disk filled up (during the {fail}) and the old checkpoint is lost"
    assert raised is not None, "the disk was full and you said nothing: let the exception through"
    left = sorted(one.name for one in target.parent.iterdir() if one != target)
    assert not left, f"what could not be finished still lies about: {left[0]}"


# ------------------------------------------------------------------------------------------ read_checked


def checked_file(tmp_path):
    path = tmp_path / "step-100"
    path.write_bytes(hashlib.sha256(NEW).digest() + NEW)
    return path


def test_read_checked_gives_the_data_back(answers, tmp_path):
    found = answers.read_checked(checked_file(tmp_path))
    assert bytes(found) == NEW, f"{len(NEW):,} bytes of data were written; you give {len(found):,}"


def refused(answers, path):
    try:
        answers.read_checked(path)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("place", [0, 5, 31, 32, 5_000, -1])
def test_read_checked_notices_a_changed_byte(answers, tmp_path, place):
    path = checked_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert refused(answers, path), f"one bit of byte {place} was flipped and you return the data all the same"


@pytest.mark.parametrize("length", [0, 10, 31, 32, 33, 10_271])
def test_read_checked_notices_a_file_cut_short(answers, tmp_path, length):
    path = checked_file(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    assert refused(answers, path), (
        f"only {length:,} of {32 + len(NEW):,} bytes are there, and you return them"
    )


# ------------------------------------------------------------------------------------------------- train


class Net(nn.Module):
    """A model that returns its loss; with dropout every update draws from torch's generator."""

    def __init__(self, dropout):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))

    def forward(self, x):
        return (self.layers(x) - x.sum(-1, keepdim=True)).square().mean()


class Batches:
    """Random batches by step; remembers which were asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, step):
        self.asked.append(step)
        return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def fresh(seed, dropout, kind=torch.optim.AdamW):
    torch.manual_seed(seed)
    model = Net(dropout)
    return model, kind(model.parameters(), lr=0.05)


def weights(model):
    return flat([parameter.detach() for parameter in model.parameters()])


def straight_and_resumed(answers, dropout, kind=torch.optim.AdamW):
    straight, optimizer = fresh(0, dropout, kind)
    answers.train(straight, optimizer, Batches(), 6)
    first, optimizer = fresh(0, dropout, kind)
    state = answers.train(first, optimizer, Batches(), 3)
    second, optimizer = fresh(1, dropout, kind)  # as in another process: other weights, another generator
    answers.train(second, optimizer, Batches(), 6, state)
    return weights(straight), weights(second)


def test_train_takes_every_batch_once(answers):
    model, optimizer = fresh(0, 0.5)
    batches = Batches()
    state = answers.train(model, optimizer, batches, 3)
    assert batches.asked == [0, 1, 2], f"three updates see batches 0, 1, 2; yours see {batches.asked}"
    answers.train(*fresh(1, 0.5), batches, 5, state)
    assert batches.asked == [0, 1, 2, 3, 4], (
        f"from 3 to 5 updates the resumed run sees batches 3 and 4; yours sees {batches.asked[3:]}"
    )


def test_train_trains(answers):
    model, optimizer = fresh(0, 0.0)
    answers.train(model, optimizer, Batches(), 4)
    expected, optimizer = fresh(0, 0.0)
    for step in range(4):
        optimizer.zero_grad()
        expected(Batches()(step)).backward()
        optimizer.step()
    assert torch.equal(weights(model), weights(expected)), (
        "four updates of AdamW give other weights than yours"
    )


def test_train_resumes_the_weights(answers):
    straight, resumed = straight_and_resumed(answers, 0.0, torch.optim.SGD)
    assert torch.equal(straight, resumed), (
        "even with SGD and no dropout, 3 + 3 updates give other weights than 6: are the model's put back?"
    )


def test_train_resumes_the_optimiser(answers):
    straight, resumed = straight_and_resumed(answers, 0.0)
    assert torch.equal(straight, resumed), (
        "without dropout, 3 + 3 updates of AdamW give other weights than 6: it begins with moments of zero"
    )


def test_train_resumes_the_generator(answers):
    straight, resumed = straight_and_resumed(answers, 0.5, torch.optim.SGD)
    assert torch.equal(straight, resumed), (
        "with dropout, 3 + 3 updates give other weights than 6: the resumed run draws other masks"
    )


def tensors_of(state):
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_train_returns_a_state_that_stays_as_it_is(answers):
    model, optimizer = fresh(0, 0.5)
    state = answers.train(model, optimizer, Batches(), 3)
    before = copy.deepcopy(tensors_of(state))
    answers.train(model, optimizer, Batches(), 6, copy.deepcopy(state))
    same = all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))
    assert same, "the state changes as the model trains on: state_dict() hands out the live tensors"
    ends = []
    for seed in (1, 2):
        again, optimizer = fresh(seed, 0.5)
        answers.train(again, optimizer, Batches(), 6, state)
        ends.append(weights(again))
    assert torch.equal(*ends), "a second run from the same state ends elsewhere: the first one changed it"


# --------------------------------------------------------------------------------------- skipped_updates

QUIET = [2.0, 2.1] * 8  # mean 2.05, deviation 0.05


@pytest.mark.parametrize(("loss", "expected"), [(2.245, []), (2.255, [16])])
def test_skipped_updates_sees_a_spike(answers, loss, expected):
    found = list(answers.skipped_updates([*QUIET, loss, 2.0], 4.0, 16))
    assert found == expected, (
        f"usual is 2.05 ± 0.05 (16 losses), so 4 deviations end at 2.25; with {loss} at update 16 you skip "
        f"{found}"
    )


def test_skipped_updates_does_not_learn_from_spikes(answers):
    found = list(answers.skipped_updates([*QUIET, 9.0, 8.0, 7.0, 2.0], 4.0, 16))
    assert found == [16, 17, 18], (
        f"9, 8 and 7 follow one another where 2.05 is usual; you skip {found}: did the first raise the bar?"
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skipped_updates_never_lets_through_what_is_not_finite(answers, bad):
    found = list(answers.skipped_updates([bad, *QUIET, bad, 2.0, 9.0], 4.0, 16))
    assert found == [0, 17, 19], (
        f"{bad} at updates 0 and 17 and a spike at 19 are skipped, however few came before; you skip {found}"
    )


def test_skipped_updates_lets_low_losses_pass(answers):
    found = list(answers.skipped_updates([*QUIET, 0.5], 4.0, 16))
    assert found == [], f"a loss far *below* the usual is no spike; you skip {found}"


def test_skipped_updates_waits_for_half_a_window(answers):
    found = list(answers.skipped_updates([5.0, 4.9, 9.0, 4.8, 5.0, 4.9, 5.0, 4.8, 30.0], 2.0, 16))
    assert found == [8], (
        "with a window of 16, judging starts once 8 losses are there: 9.0 (update 2) passes, 30 (update 8) "
        f"does not; you skip {found}"
    )


def test_skipped_updates_forgets_what_is_older_than_the_window(answers):
    losses = [8.0, 9.0] * 8 + QUIET + [3.0]
    found = list(answers.skipped_updates(losses, 4.0, 16))
    assert found == [32], (
        f"the last 16 losses are 2.05 ± 0.05, so 3.0 is a spike, whatever was usual before; you skip {found}"
    )


# --------------------------------------------------------------------------------------------------- mfu


def test_mfu_of_gpt2_on_an_a100(answers):
    found = answers.mfu(150_000, 12, 768, 50_257, 1024, 312e12, 1)
    expected = 0.4107877
    hints = {
        1 / 3: "that is the forward alone; backward costs twice as much again",
        0.867461: "the scores are missing: 12·C·T a layer",
        1.276559: "an embedding is looked up, not multiplied: it costs nothing, but the head does",
        0.728963: "the head is a matrix product too, V × C",
    }
    ratio = found / expected
    hint = next((text for value, text in hints.items() if abs(ratio - value) < 0.01), "check the formula")
    assert found == pytest.approx(expected, rel=1e-4), (
        f"GPT-2 124M at 150,000 tokens/s on one A100 (312 TFLOP/s) reaches {expected:.1%}; you say "
        f"{found:.1%}: {hint}"
    )


def test_mfu_divides_by_the_peak_of_all_devices(answers):
    one, eight = (answers.mfu(150_000, 12, 768, 50_257, 1024, 312e12, devices) for devices in (1, 8))
    assert eight == pytest.approx(one / 8), (
        f"eight devices together at the speed of one reach an eighth of its MFU; you say {eight / one:.2f} "
        "of it"
    )


# -------------------------------------------------------------------------------------------- attainable


def test_attainable_is_the_peak_for_large_matrices(answers):
    found = answers.attainable(4096, 4096, 4096, 2, 990e12, 3.35e12)
    assert found == pytest.approx(990e12), (
        f"4096³ in bf16 has 1,365 operations a byte, more than an H100's 296: it reaches the peak, 9.90e14; "
        f"you say {found:.3g}"
    )


@pytest.mark.parametrize(
    ("shape", "number_bytes", "expected"),
    [
        ((1, 4096, 4096), 2, 3.348365e12),
        ((1, 4096, 4096), 4, 1.6741825e12),
        ((64, 64, 4096), 2, 1.0636899e14),
    ],
)
def test_attainable_is_bound_by_the_bandwidth_for_thin_matrices(answers, shape, number_bytes, expected):
    found = answers.attainable(*shape, number_bytes, 990e12, 3.35e12)
    m, k, n = shape
    total = number_bytes * (m * k + k * n + m * n)
    assert found == pytest.approx(expected, rel=1e-4), (
        f"{shape} of {number_bytes}-byte numbers: {2 * m * k * n:,} operations over {total:,} bytes, at "
        f"3.35e12 bytes/s {expected:.4g} FLOP/s; you say {found:.4g}"
    )


# ---------------------------------------------------------------------------------------- qk_norm_scores


def queries_and_keys(scale=1.0):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    sizes = torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)  # heads of different size
    return scale * sizes * q, scale * sizes * k


def test_qk_norm_scores_stay_within_the_root_of_the_width(answers):
    q, _ = queries_and_keys()
    found = answers.qk_norm_scores(q, q, 1e-6)
    assert found.shape == (2, 3, 5, 5), f"(B, H, T, T) is (2, 3, 5, 5); yours is {tuple(found.shape)}"
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    low, high = diagonal.min().item(), diagonal.max().item()
    assert high == pytest.approx(math.sqrt(8), rel=1e-3), (
        f"a query against itself scores D / √D = √8 = 2.83; you give up to {high:.3f}"
    )
    assert low == pytest.approx(math.sqrt(8), rel=1e-3), (
        f"in every head and place: you go down to {low:.3f} (does each head have its own norm?)"
    )


def test_qk_norm_scores_do_not_depend_on_the_size_of_queries_and_keys(answers):
    small, large = (answers.qk_norm_scores(*queries_and_keys(scale), 1e-12) for scale in (1.0, 100.0))
    assert torch.allclose(small, large, atol=1e-4), (
        f"a hundred times larger queries and keys change a score by {(small - large).abs().max():.3g}: "
        "both are normalised"
    )


def test_qk_norm_scores_have_epsilon_inside_the_root(answers):
    q, k = queries_and_keys()
    eps = 0.5
    found = answers.qk_norm_scores(q, k, eps)
    q, k = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (q, k))
    error = (found - q @ k.mT / math.sqrt(8)).abs().max().item()
    assert error < 1e-5, f"x / √(mean(x²) + ε): with ε = 0.5 your scores are off by up to {error:.3f}"


# ----------------------------------------------------------------------------------------- newton_schulz


def with_singular_values(rows, columns, values):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return u, torch.tensor(values), vh


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 9), (9, 4)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_newton_schulz_brings_singular_values_near_one(answers, rows, columns, size):
    u, values, vh = with_singular_values(rows, columns, [1.0, 0.5, 0.1, 0.02])
    found = answers.newton_schulz(size * (u * values) @ vh, 5)
    assert found.shape == (rows, columns), f"({rows}, {columns}) goes in, {tuple(found.shape)} comes out"
    assert found.isfinite().all(), (
        f"with singular values up to {size:g} it grows without bound: divide by the norm first"
    )
    inside = u.mT @ found @ vh.mT
    stray = (inside - inside.diagonal().diag()).abs().max().item()
    assert stray < 1e-3, f"the singular vectors have turned (by {stray:.2g}): use matrix products only"
    got = [round(value, 3) for value in inside.diagonal().tolist()]
    assert min(got) > 0.65, f"five rounds lift 1, 0.5, 0.1 and 0.02 (times {size:g}) near 1; yours are {got}"
    assert max(got) < 1.25, f"five rounds bring all singular values near 1; yours are {got}"


@pytest.mark.parametrize("rounds", [1, 2])
def test_newton_schulz_is_the_quintic_on_each_singular_value(answers, rounds):
    u, values, vh = with_singular_values(4, 6, [1.0, 0.5, 0.1, 0.02])
    found = (u.mT @ answers.newton_schulz((u * values) @ vh, rounds) @ vh.mT).diagonal()
    expected = values / values.norm()
    for _ in range(rounds):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert torch.allclose(found, expected, atol=1e-4), (
        f"{rounds} round(s) make 1, 0.5, 0.1, 0.02 into {[round(v, 4) for v in expected.tolist()]}; yours "
        f"are {[round(v, 4) for v in found.tolist()]}"
    )


def test_newton_schulz_of_zeros_is_zero(answers):
    found = answers.newton_schulz(torch.zeros(3, 5), 5)
    assert torch.equal(found, torch.zeros(3, 5)), "a matrix of zeros becomes nan: its norm is zero"


# ------------------------------------------------------------------------------------------- muon_update


def orthogonal(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def muon_case(shape, updates, orthogonalize=orthogonal, weight_decay=0.0, answers=None):
    """Weights and buffer after `updates` updates, by `answers` or by the formula."""
    generator = torch.Generator().manual_seed(0)
    weight, buffer = torch.randn(shape, generator=generator), torch.zeros(shape)
    lr, momentum, (R, C) = 0.1, 0.9, shape
    for _ in range(updates):
        gradient = torch.randn(shape, generator=generator)
        if answers:
            answers.muon_update(weight, gradient, buffer, orthogonalize, lr, momentum, weight_decay)
            continue
        buffer = momentum * buffer + (1 - momentum) * gradient
        update = orthogonalize(momentum * buffer + (1 - momentum) * gradient)
        weight = (1 - lr * weight_decay) * weight - lr * math.sqrt(max(1.0, R / C)) * update
    return weight, buffer


@pytest.mark.parametrize("shape", [(4, 4), (3, 12), (12, 3)])
def test_muon_update_steps_equally_far_in_every_direction(answers, shape):
    weight, _ = muon_case(shape, 1, answers=answers)
    start, _ = muon_case(shape, 0)
    expected = 0.1 * math.sqrt(max(1.0, shape[0] / shape[1]))
    steps = torch.linalg.svdvals(weight - start)
    assert torch.allclose(steps, torch.full_like(steps, expected), rtol=1e-3), (
        f"a {shape} matrix moves by η·√max(1, R/C) = {expected:.3f} in each direction; yours by "
        f"{[round(step, 3) for step in steps.tolist()]}"
    )


def test_muon_update_keeps_its_momentum(answers):
    _, buffer = muon_case((4, 6), 3, answers=answers)
    _, expected = muon_case((4, 6), 3)
    assert torch.allclose(buffer, expected, atol=1e-5), (
        "after three updates the buffer is not the running mean of the gradients: it is changed in place, "
        "and holds gradients as they came"
    )


def test_muon_update_looks_ahead(answers):
    weight, _ = muon_case((4, 6), 3, orthogonalize=lambda matrix: matrix.clone(), answers=answers)
    expected, _ = muon_case((4, 6), 3, orthogonalize=lambda matrix: matrix.clone())
    error = (weight - expected).abs().max().item()
    assert error < 1e-5, (
        f"what is orthogonalised is μB + (1−μ)G with the new buffer (Nesterov); yours is off by {error:.3f}"
    )


def test_muon_update_decays_the_weight_beside_the_step(answers):
    weight, _ = muon_case((4, 6), 2, weight_decay=0.5, answers=answers)
    expected, _ = muon_case((4, 6), 2, weight_decay=0.5)
    error = (weight - expected).abs().max().item()
    assert error < 1e-5, (
        f"decay takes ηλ of the weight, beside the step and not through the gradient; off by {error:.3f}"
    )
