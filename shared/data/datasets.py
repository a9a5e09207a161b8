"""Batches for training: pure functions of seed and step, so that a run can stop, resume and be repeated.

B is the batch size of one process, T the context length, S and U the padded lengths of sources and targets.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from shared.runtime.errors import CourseError


class TokenLoader:
    """Windows of T + 1 ids from one long stream: inputs, and the same shifted by one as targets.

    Args:
        tokens: (N,) ids, an array, a tensor, or `TokenShards.tokens` (only the windows asked for are read).
        batch_size: B, of each process.
        context_length: T.
        seed: decides everything together with the step.
        rank, world_size: this process and how many there are; at one step they read different windows.
        sampling: "epochs" cuts the stream into windows of T, with borders that move from epoch to epoch,
            and visits each once an epoch in a fresh order. "uniform" draws every window's start anew, as
            nanoGPT does: some are seen twice, others never.

    Raises:
        CourseError: the stream is shorter than one window.
    """

    def __init__(
        self,
        tokens: Sequence[int] | np.ndarray | torch.Tensor,
        batch_size: int,
        context_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        sampling: str = "epochs",
    ):
        if sampling not in ("epochs", "uniform"):
            raise ValueError(f"sampling {sampling!r} is neither 'epochs' nor 'uniform'")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        self.tokens = tokens if isinstance(tokens, np.ndarray) else np.asarray(tokens)
        if len(self.tokens) <= context_length:
            raise CourseError(
                f"The text has {len(self.tokens):,} tokens, fewer than the {context_length + 1} of one "
                "window; use a longer text or a shorter context."
            )
        self.batch_size, self.context_length = batch_size, context_length
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.sampling = sampling
        # One window fewer than fit, so that every shift of the borders leaves room.
        self.windows_per_epoch = max(1, (len(self.tokens) - 1) // context_length - 1)
        self._span = np.arange(context_length + 1)
        self._epoch_starts = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may cross into the next epoch

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number `step` of this process: inputs and targets, each (B, T) int64."""
        starts = self._uniform_starts(step) if self.sampling == "uniform" else self._starts(step)
        windows = torch.from_numpy(self.tokens[starts[:, None] + self._span].astype(np.int64))  # (B, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _uniform_starts(self, step: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, self.rank, step])
        return random.integers(0, len(self.tokens) - self.context_length, self.batch_size)

    def _starts(self, step: int) -> np.ndarray:
        first = (step * self.world_size + self.rank) * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        epochs, places = np.divmod(numbers, self.windows_per_epoch)
        starts = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            starts[here] = self._epoch_starts(int(epoch))[places[here]]
        return starts

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        room = len(self.tokens) - self.windows_per_epoch * self.context_length  # ≥ 1
        shift = random.integers(0, min(room, self.context_length + 1))
        return shift + self.context_length * random.permutation(self.windows_per_epoch)


class PairLoader:
    """Source–target pairs of similar length together, padded to the longest of the batch.

    Each epoch shuffles the pairs, sorts pools of 32 batches by length, cuts them into batches and shuffles
    these. The few pairs that do not fill a batch are left out, others each epoch.

    Args:
        pairs: (source ids, target ids) of each example.
        batch_size: B, of each process.
        seed: decides everything together with the step.
        pad_id: fills the ends of the shorter rows.
        rank, world_size: this process and how many there are; at one step they read different batches.

    Raises:
        CourseError: there are fewer pairs than one batch needs.
    """

    POOL = 32  # batches sorted together: enough to waste little padding, few enough to keep the order random

    def __init__(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        batch_size: int,
        seed: int,
        pad_id: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        if len(pairs) < batch_size:
            raise CourseError(
                f"There are {len(pairs)} pairs, fewer than a batch of {batch_size}; use a smaller batch size."
            )
        self.batch_size, self.seed, self.pad_id = batch_size, seed, pad_id
        self.rank, self.world_size = rank, world_size
        self.batches_per_epoch = len(pairs) // batch_size
        self._sources, self._targets = (pad([pair[side] for pair in pairs], pad_id) for side in (0, 1))
        self._lengths = np.array([[len(source), len(target)] for source, target in pairs])  # (N, 2)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number `step` of this process: sources (B, S) and targets (B, U), int64."""
        epoch, place = divmod(step * self.world_size + self.rank, self.batches_per_epoch)
        rows = self._epoch(epoch)[place]
        S, U = self._lengths[rows].max(axis=0)
        rows = torch.from_numpy(rows)
        return self._sources[rows, :S], self._targets[rows, :U]

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self._lengths))[: self.batches_per_epoch * self.batch_size]
        pool = self.POOL * self.batch_size
        for start in range(0, len(order), pool):
            members = order[start : start + pool]
            lengths = self._lengths[members]
            order[start : start + pool] = members[np.lexsort((lengths[:, 1], lengths[:, 0]))]
        return random.permutation(order.reshape(self.batches_per_epoch, self.batch_size))


def pad(rows: Sequence[Sequence[int]], pad_id: int = 0) -> torch.Tensor:
    """Rows of different lengths as one tensor (len(rows), longest), int64, `pad_id` filling up the right."""
    longest = max(map(len, rows), default=0)
    padded = np.full((len(rows), longest), pad_id, dtype=np.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(padded)
