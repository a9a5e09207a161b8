"""Exercises of week 4. Replace each `raise NotImplementedError`; `course check week4` tests your answers.

They follow the notebooks: the first twelve belong to 01 (data and gradients, the schedule, what keeps a run
alive, what it costs), the last three to 03. Nothing here needs `shared`; plain Python and torch are enough.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from shared.curriculum.exercises import exercise


@exercise(
    minutes=15,
    difficulty=2,
    teaches="how a batch comes out of a file that is larger than the memory",
    hint="Two bytes an id, little-endian: np.frombuffer(…, '<u2'). Windows overlap by one: T + 1 ids give T.",
)
def read_window(file: BinaryIO, header_bytes: int, start: int, T: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one window, from a file of token ids.

    Args:
        file: open for reading in binary mode; `header_bytes` bytes, then the ids as unsigned 16-bit
            little-endian numbers. It may be larger than the memory: read no more of it than the window needs.
        header_bytes: where the ids begin.
        start: number of the first id of the window, from 0.
        T: context length.

    Returns:
        inputs and targets, each (T,) int64: what the model reads, and what follows each of its tokens.
    """
    raise NotImplementedError


@exercise(
    minutes=15,
    difficulty=2,
    teaches="why a loader needs no state of its own to be resumed",
    hint="Number the windows of all processes and steps in one line; divmod by the length of an epoch.",
)
def windows_of_step(
    step: int, batch_size: int, rank: int, world_size: int, windows_per_epoch: int
) -> list[tuple[int, int]]:
    """Which windows one process reads at one step: a pure function of the step.

    Windows are read in order. At a step, process 0 reads the first `batch_size` that are due, process 1 the
    next, and so on; the next step goes on where the last process ended. Where an epoch ends inside a batch,
    the batch goes on with the next epoch.

    Args:
        step: from 0.
        batch_size: windows a process and step.
        rank, world_size: which process this is, from 0, and how many there are.
        windows_per_epoch: windows in one pass over the data.

    Returns:
        (epoch, place in the epoch) of each window, both from 0.
    """
    raise NotImplementedError


@exercise(
    minutes=20,
    difficulty=3,
    teaches="how a batch that does not fit is trained on, and what has to be weighted by what",
    hint="backward() adds to .grad. A micro-batch's mean counts by its share of all tokens: count / total.",
)
def accumulate(loss_of: Callable[[Tensor], Tensor], micro_batches: list[Tensor]) -> float:
    """Gradients of the mean loss over all tokens of several micro-batches, with the memory of one.

    Args:
        loss_of: the model's loss on a micro-batch: the mean over its tokens, a scalar to call backward on.
            What it keeps for that is let go by the backward, so never hold two losses at a time.
        micro_batches: token ids, int64, of different lengths; each id is a token that counts.

    Returns:
        The mean loss over all tokens. The parameters' `.grad`, which start as None, hold its gradient.
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=1,
    teaches="the schedule of GPT-3 and of most models since",
    hint="The first update must not have a rate of zero: (step + 1) / (warmup_steps + 1) in the warm-up.",
)
def warmup_cosine(step: int, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """What the peak learning rate is multiplied by: a linear warm-up, then half a cosine.

    Args:
        step: updates already made: 0 for the first one.
        steps: of the whole run; at this one, and after, the multiplier is `min_ratio`.
        warmup_steps: at this step the multiplier is 1 for the first time; the line to there would pass
            through 0 one update before the first.
        min_ratio: last multiplier.
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=2,
    teaches="a schedule that need not know beforehand how long the run will be",
    hint="Two ramps and a constant: the smaller of the warm-up and the decay counts.",
)
def warmup_stable_decay(
    step: int, steps: int, warmup_steps: int, decay_steps: int, min_ratio: float
) -> float:
    """What the peak learning rate is multiplied by: warm-up, constant, linear decay (Hu et al. 2024).

    Args:
        step: updates already made.
        steps: of the whole run; at this one, and after, the multiplier is `min_ratio`.
        warmup_steps: as in `warmup_cosine`.
        decay_steps: the decay begins so many updates before the end. It does not overlap the warm-up.
        min_ratio: last multiplier.
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=2,
    teaches="that clipping shortens one long vector and leaves its direction alone",
    hint="One norm over all numbers of all tensors: the root of the sum of squared norms. Multiply in place.",
)
def clip_gradients(gradients: list[Tensor], max_norm: float) -> float:
    """Scale gradients in place so that their common L2 norm is at most `max_norm`.

    Args:
        gradients: of any shapes.
        max_norm: above 0. Gradients that are shorter already stay as they are.

    Returns:
        The norm before clipping, which is what a log should show.
    """
    raise NotImplementedError


@exercise(
    minutes=20,
    difficulty=3,
    teaches="how float16 trains at all: the loss is scaled, and the scale finds its own size",
    hint="Look for inf and nan first. An overflow halves the scale and sets the count back to 0.",
)
def unscale(
    gradients: list[Tensor], scale: float, good: int, interval: int
) -> tuple[list[Tensor] | None, float, int]:
    """One update's part of dynamic loss scaling (Micikevicius et al. 2018), before clipping.

    Args:
        gradients: of `scale` times the loss.
        scale: of the loss in this update, a power of two.
        good: updates in a row without overflow before this one.
        interval: after so many good updates in a row the scale is doubled and the count begins anew.

    Returns:
        the true gradients, or None where a number of them is inf or nan and the update must be skipped;
        the scale of the next update, half of this one's after an overflow; and the new count.
    """
    raise NotImplementedError


@exercise(
    minutes=15,
    difficulty=3,
    teaches="what survives when the power goes: a rename does, a write does not",
    hint="Write beside the target, flush, os.fsync, os.replace; if any of it fails, remove what you wrote.",
)
def write_checked(path: Path, data: bytes) -> None:
    """Write a checkpoint so that at every moment the old file or the whole new one is there.

    The file holds the 32 bytes of the data's SHA-256 (`hashlib.sha256(data).digest()`), then the data. It
    must be on the disk, not only in the operating system's cache, before it takes the old one's place. If
    anything fails, the exception goes on, the old file is as it was, and nothing else is left in its folder.

    Args:
        path: the file; it may exist already.
        data: what to write.
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=1,
    teaches="that a damaged checkpoint has to be noticed before it is in the model",
    hint="The first 32 bytes are the checksum of the rest; a file cut short is not always shorter than 32.",
)
def read_checked(path: Path) -> bytes:
    """The data of a file that `write_checked` wrote.

    Raises:
        ValueError: the file has been cut short or a byte of it has changed.
    """
    raise NotImplementedError


@exercise(
    minutes=30,
    difficulty=4,
    teaches="what a training state is made of",
    hint="Weights, optimiser, step, generator. state_dict() hands out the live tensors: deepcopy it.",
)
def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Tensor],
    steps: int,
    state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train to `steps` updates, from the start or from where an earlier call ended.

    An update is: `loss = model(batches(step))`, zero the gradients, backward, `optimizer.step()`. The model
    draws its dropout from torch's generator (`torch.get_rng_state`, `torch.set_rng_state`).

    Args:
        model: called with a batch it returns the loss. With a state, its own weights do not matter.
        optimizer: over the model's parameters.
        batches: the batch of a step, from 0.
        steps: updates in all, those before `state` included.
        state: what an earlier call returned, perhaps in another process; None for a fresh run.

    Returns:
        Everything that another call needs to go on bit for bit. Training on must not change it.
    """
    raise NotImplementedError


@exercise(
    minutes=20,
    difficulty=3,
    teaches="how to tell a spike from noise without a threshold of its own for every run",
    hint="Mean and deviation are those of the last `window` losses that were *not* skipped.",
)
def skipped_updates(losses: list[float], sigmas: float, window: int) -> list[int]:
    """Which updates a guard against spikes skips.

    An update is skipped if its loss is not finite, or if it is more than `sigmas` standard deviations (those
    of the population: divided by the number) above the mean of the losses before it. Of those, the newest
    `window` that were not skipped count; with fewer than half of `window` there, only what is not finite is
    skipped.

    Args:
        losses: of each update, in order.
        sigmas: from how many deviations a loss is a spike; low losses never are.
        window: losses that mean and deviation are taken over.

    Returns:
        The numbers of the skipped updates, from 0.
    """
    raise NotImplementedError


@exercise(
    minutes=15,
    difficulty=2,
    teaches="which share of the hardware a training uses, in the only number that can be compared",
    hint="Backward costs twice the forward: 6 a weight, 12·C·T a layer for attention. A lookup is free.",
)
def mfu(
    tokens_per_second: float,
    num_layers: int,
    d_model: int,
    vocab_size: int,
    context_length: int,
    peak: float,
    devices: int,
) -> float:
    """Model FLOPs utilisation of a GPT (Chowdhery et al. 2022, appendix B).

    The model: attention of four C × C matrices and an MLP of 4·C a layer, learned positions, and a head that
    is the token embedding again. Forward and backward are counted, attention as if no mask hid half of it;
    norms, biases and softmax are left out, and so is whatever is computed twice to save memory.

    Args:
        tokens_per_second: of all devices together.
        num_layers, d_model, vocab_size, context_length: L, C, V, T.
        peak: FLOP/s of one device.
        devices: how many there are.

    Returns:
        A share, 1.0 for all of it.
    """
    raise NotImplementedError


@exercise(
    minutes=10,
    difficulty=2,
    teaches="when a faster processor does not help",
    hint="Intensity = 2·m·k·n operations over the bytes of three matrices; times bandwidth, up to the peak.",
)
def attainable(m: int, k: int, n: int, number_bytes: int, peak: float, bandwidth: float) -> float:
    """The roofline (Williams et al. 2009) of a matrix product, (m, k) times (k, n).

    Each matrix crosses the memory bus once: two are read, one is written.

    Args:
        m, k, n: sizes.
        number_bytes: bytes of a number, 4 for float32.
        peak: FLOP/s of the arithmetic.
        bandwidth: bytes per second of the memory.

    Returns:
        FLOP/s that can be reached at best.
    """
    raise NotImplementedError


@exercise(
    minutes=15,
    difficulty=2,
    teaches="how attention scores are kept from growing with the weights",
    hint="RMS over the last dimension, each head's own; ε inside the root. Then q·kᵀ / √D as ever.",
)
def qk_norm_scores(q: Tensor, k: Tensor, eps: float) -> Tensor:
    """Attention scores with QK-norm, before mask and softmax: RMSNorm without a weight on queries and keys.

    Args:
        q, k: (B, H, T, D).
        eps: ε of x / √(mean(x²) + ε).

    Returns:
        (B, H, T, T): the scaled dot products. None is larger than √D.
    """
    raise NotImplementedError


@exercise(
    minutes=20,
    difficulty=3,
    teaches="how to do without a singular value decomposition",
    hint="Frobenius norm to 1 first. With A = X·Xᵀ a round is a·X + (b·A + c·A²)·X.",
)
def newton_schulz(matrix: Tensor, rounds: int) -> Tensor:
    """Bring all singular values of a matrix near 1 and leave its singular vectors alone (Jordan et al. 2024).

    Divided by its Frobenius norm (at least 10⁻⁷, so that zeros stay zeros), then in each round
    σ → a·σ + b·σ³ + c·σ⁵ for every singular value, with a = 3.4445, b = −4.7750, c = 2.0315.

    Args:
        matrix: (R, C), wide or tall.
        rounds: how many.

    Returns:
        (R, C).
    """
    raise NotImplementedError


@exercise(
    minutes=20,
    difficulty=3,
    teaches="what Muon does between the gradient and the weight",
    hint="Nesterov: the gradient is mixed with the buffer *after* that has taken it in. Decay, then step.",
)
def muon_update(
    weight: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    orthogonalize: Callable[[Tensor], Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One update of a hidden matrix by Muon (Jordan et al. 2024), in place.

    B ← μB + (1−μ)G;  O = orthogonalize(μB + (1−μ)G);  W ← (1 − ηλ)W − η·√max(1, R/C)·O

    Args:
        weight: W, (R, C) = (out, in); changed in place.
        gradient: G, (R, C).
        buffer: B, (R, C), zeros before the first update; changed in place.
        orthogonalize: UVᵀ of USVᵀ, for instance five rounds of `newton_schulz`.
        lr, momentum, weight_decay: η, μ, λ.
    """
    raise NotImplementedError
