"""What the trainer costs over a bare loop with the same model, batches and optimiser."""

import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch

from shared.models.gpt import GPT, GPTConfig
from shared.runtime import scale
from shared.training.optimization import build_optimizer, build_schedule
from shared.training.trainer import TrainConfig, Trainer, lm_loss, token_batches

VOCAB = 512
# The smaller the model, the more the loop around it weighs: the week's own size, and a quarter of it.
SIZES = {"4 layers × 128": (4, 128), "2 layers × 64": (2, 64)}
LOG_INTERVALS = (TrainConfig.log_interval, 1)  # updates between two log entries: as it comes, and the most


def run(quick: bool = False, rounds: int = 15) -> dict[str, Any]:
    """Seconds of the trainer over seconds of a bare loop, in turn; the median over the rounds.

    The trainer keeps a history, clips, checks that losses are finite, shows its progress line and writes its
    TensorBoard log; starting it and its checkpoint at the end are outside the clock, as they come once a run.

    Args:
        quick: three rounds of few updates.
        rounds: pairs of runs.

    Returns:
        One row a size and log interval: milliseconds an update of both, and the overhead in percent.
    """
    machine = scale.start("cpu", quiet=True)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 100_000).astype(np.uint16)
    common = {"steps": 20 if quick else 60, "batch_size": 12, "context_length": 64, "dtype": machine.dtype}
    rows = [
        _row(name, *size, TrainConfig(**common, log_interval=interval), tokens, 3 if quick else rounds)
        for interval in LOG_INTERVALS
        for name, size in SIZES.items()
    ]
    return {"threads": machine.threads, "dtype": TrainConfig(**common).dtype, "overhead": rows}


def _row(
    name: str, layers: int, width: int, config: TrainConfig, tokens: np.ndarray, rounds: int
) -> dict[str, Any]:
    bare, trained = [], []
    for turn in range(rounds + 1):
        pair = (
            _bare_loop(_model(layers, width), config, tokens),
            _trainer(_model(layers, width), config, tokens),
        )
        if turn:  # the first warms up
            bare.append(pair[0])
            trained.append(pair[1])
    ratio = statistics.median(ours / theirs for ours, theirs in zip(trained, bare, strict=True))
    return {
        "model": name,
        "updates_a_log_entry": config.log_interval,
        "bare_ms": round(1e3 * statistics.median(bare), 3),
        "trainer_ms": round(1e3 * statistics.median(trained), 3),
        "overhead_percent": round(100 * (ratio - 1), 2),
    }


def _model(layers: int, width: int) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB, 64, layers, 4, width))


def _bare_loop(model: GPT, config: TrainConfig, tokens: np.ndarray) -> float:
    """Seconds an update of the shortest loop that does the same arithmetic."""
    optimizer, schedule = build_optimizer(model, config), build_schedule(config)
    batches, parameters = token_batches(tokens, config), list(model.parameters())
    low = config.torch_dtype != torch.float32
    began = time.perf_counter()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            loss = lm_loss(model, batches(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - began) / config.steps


def _trainer(model: GPT, config: TrainConfig, tokens: np.ndarray) -> float:
    """Seconds an update by the trainer, from the first update's start to the last one's end."""
    marks: list[float] = []
    batches = token_batches(tokens, config)

    def marking(micro_step: int) -> Any:
        marks.append(time.perf_counter())
        return batches(micro_step)

    with tempfile.TemporaryDirectory() as folder:
        Trainer(model, config, marking, directory=folder).fit()
    # From the first batch to the last is one update less than the run has.
    return (marks[-1] - marks[0]) / (config.steps - 1)
