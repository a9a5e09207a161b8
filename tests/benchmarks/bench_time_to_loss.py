"""Time to loss: nanoGPT's quick start on a CPU against the course's recipe, and what each ingredient earns.

Both sides train on the same part of tiny Shakespeare, with the same threads, number format and allocator
settings, and are scored alike: every character of the validation part, in windows of 64. The baseline is a
bare loop over `configs/training/nanogpt-shakespeare-cpu.yaml`; the recipe runs through `Trainer`, with all
that it does besides, from `configs/training/shakespeare-speedrun.yaml`. Both run their whole schedule, and
the clock covers all of the training (data, forward, backward, optimiser) and, on both sides, not the scoring
at the end.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.data import corpora
from shared.data.datasets import TokenLoader
from shared.data.tokenizers import CharTokenizer
from shared.models.gpt import GPT
from shared.recipes.pretraining import planned_cost
from shared.runtime import files, scale
from shared.training.config import Run, Stage, TrainConfig, load_run
from shared.training.optimization import cosine, parameter_groups
from shared.training.trainer import Trainer, lm_evaluator, token_batches

WINDOW = 64  # characters: of the baseline's training, and of the scoring of both
PUBLISHED_LOSS = 1.88
WARM_UP_STEPS = 10  # of each side, before the clock starts: kernels are chosen and compiled then

Changes = Mapping[str, Any]
NONE: Changes = MappingProxyType({})
_LAST = Stage(start=55, batch_size=32, context_length=64)  # the second half, in the recipe's own sizes

# Tried, and not in the recipe: settings of the model, settings of the training.
TRIED: dict[str, tuple[Changes, Changes]] = {
    "zero-initialised projections": ({"zero_init": True}, {}),
    "short contexts first": ({}, {"stages": (Stage(start=0, batch_size=64, context_length=32), _LAST)}),
    "small batches first": ({}, {"stages": (Stage(start=0, batch_size=16, context_length=64), _LAST)}),
}

# What the recipe is without one of its ingredients: settings of the model, settings of the training.
WITHOUT: dict[str, tuple[Changes, Changes]] = {
    "Muon (AdamW at 5e-3 instead)": ({}, {"optimizer": "adamw", "learning_rate": 5e-3}),
    "RoPE (learned positions instead)": ({"position": "learned"}, {}),
    "QK-norm": ({"qk_norm": False}, {}),
    "ReLU² (GELU instead)": ({"activation": "gelu_tanh"}, {}),
    "bigram embedding": ({"bigram_embedding": False}, {}),
    "fused AdamW": ({}, {"fused": False}),
    "a single block (four instead)": ({"num_layers": 4}, {}),
    "plain attention (PyTorch's kernel instead)": ({"attention": "sdpa"}, {}),
}


@dataclasses.dataclass(frozen=True)
class Text:
    """Tiny Shakespeare as ids of its 65 characters."""

    training: np.ndarray
    validation: np.ndarray
    vocab_size: int


def _text() -> Text:
    corpus = corpora.load("shakespeare")
    tokenizer = CharTokenizer.from_text(corpus.text())
    parts = ["".join(document.text for document in part) for part in corpus.split(0.1)]
    training, validation = (np.asarray(tokenizer.encode(part), np.uint16) for part in parts)
    return Text(training, validation, tokenizer.vocab_size)


def _load(name: str, dtype: str, seed: int) -> Run:
    path = files.repository_root() / "configs" / "training" / f"{name}.yaml"
    return load_run(path, [f"training.dtype={dtype}", f"training.seed={seed}"])


def _score(model: nn.Module, text: Text) -> float:
    """Nats per character over the whole validation part; in float32 on both sides."""
    return lm_evaluator(text.validation, WINDOW, batch_size=64)(model)["loss"]


def bare_loop(model: nn.Module, config: TrainConfig, tokens: np.ndarray) -> float:
    """nanoGPT's training loop and nothing else; returns its seconds."""
    loader = TokenLoader(tokens, config.batch_size, config.context_length, config.seed, sampling="uniform")
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, config.learning_rate, betas=config.betas)
    low = config.torch_dtype != torch.float32
    autocast = torch.autocast("cpu", dtype=config.torch_dtype) if low else contextlib.nullcontext()
    began = time.perf_counter()
    for step in range(config.steps):
        rate = config.learning_rate * cosine(step, config.steps, config.warmup_steps, config.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = loader.batch(step)
        with autocast:
            _, loss = model(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def baseline(text: Text, dtype: str, seed: int, steps: int | None = None) -> tuple[float, float]:
    """Seconds and whole-validation loss of nanoGPT's quick start."""
    run = _load("nanogpt-shakespeare-cpu", dtype, seed)
    config = dataclasses.replace(run.training, steps=steps) if steps else run.training
    torch.manual_seed(seed)
    model = GPT(run.model_config(text.vocab_size))
    seconds = bare_loop(model, config, text.training)
    return seconds, _score(model, text)


def train_recipe(
    text: Text, dtype: str, seed: int, model_changes: Changes = NONE, training_changes: Changes = NONE
) -> tuple[float, GPT]:
    """Train the course's recipe, changed for an ablation or not; seconds and model."""
    run = _load("shakespeare-speedrun", dtype, seed)
    config = dataclasses.replace(run.training, **training_changes)
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(run.model_config(text.vocab_size), **model_changes))
    trainer = Trainer(model, config, token_batches(text.training, config), progress=False)
    began = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - began, model


def _model_size(name: str, text: Text) -> str:
    run = _load(name, "float32", 0)
    config, training = run.model_config(text.vocab_size), run.training
    parameters = planned_cost(run, config).parameters
    shape = f"{config.num_layers} × {config.d_model} wide, {parameters:,} parameters"
    return f"{shape}; {training.steps:,} updates of {training.batch_size} × {training.context_length} tokens"


def _dtypes(machine: scale.Scale) -> list[str]:
    return ["float32"] + ["bfloat16"] * (machine.dtype == torch.bfloat16)


def run(quick: bool = False, pairs: int = 3) -> dict[str, Any]:
    """Seconds to the loss that nanoGPT's quick start ends at: the same data, threads, dtype and evaluation.

    Args:
        quick: one pair, and the baseline cut to 100 updates, to see that everything runs.
        pairs: baseline and recipe in turn, this often, with seeds 0, 1, ….

    Returns:
        One row a pair, and for each dtype the medians and whether every recipe reached its baseline's loss.

    Raises:
        CourseError: tiny Shakespeare is not there.
    """
    machine = scale.start("cpu", quiet=True)
    text = _text()
    rows = []
    for dtype in _dtypes(machine):
        _warm_up(text, dtype)
        for seed in range(1 if quick else pairs):
            rows.append(_pair(text, dtype, seed, steps=100 if quick else None))
    return {
        "threads": machine.threads,
        "nanogpt_model": _model_size("nanogpt-shakespeare-cpu", text),
        "course_model": _model_size("shakespeare-speedrun", text),
        "published": f"{PUBLISHED_LOSS} nats, in nanoGPT's README, over 20 random batches",
        "scored": "every character of the validation part, windows of 64, float32",
        "clock": "the whole training on both sides, without the scoring",
        "summary": [
            _summary(dtype, [row for row in rows if row["dtype"] == dtype]) for dtype in _dtypes(machine)
        ],
        "pairs": rows,
    }


def _warm_up(text: Text, dtype: str) -> None:
    baseline(text, dtype, seed=0, steps=WARM_UP_STEPS)
    train_recipe(text, dtype, 0, NONE, {"steps": WARM_UP_STEPS, "stages": ()})


def _pair(text: Text, dtype: str, seed: int, steps: int | None) -> dict[str, Any]:
    theirs, their_loss = baseline(text, dtype, seed, steps)
    ours, model = train_recipe(text, dtype, seed)
    our_loss = _score(model, text)
    return {
        "dtype": dtype,
        "seed": seed,
        "nanogpt_seconds": round(theirs, 2),
        "nanogpt_loss": round(their_loss, 4),
        "course_seconds": round(ours, 2),
        "course_loss": round(our_loss, 4),
        "times_faster": round(theirs / ours, 2),
        "reached": our_loss <= their_loss,
        "reached_published": our_loss <= PUBLISHED_LOSS,
    }


def _summary(dtype: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = ("nanogpt_seconds", "nanogpt_loss", "course_seconds", "course_loss", "times_faster")
    medians = {column: round(statistics.median(row[column] for row in rows), 4) for column in columns}
    reached = {f"all_{key}": all(row[key] for row in rows) for key in ("reached", "reached_published")}
    return {"dtype": dtype, **medians, **reached}


def ablation(quick: bool = False, seeds: int = 6) -> dict[str, Any]:
    """The recipe without each of its ingredients, and with what it left out, given the same time.

    Every variant trains for as many updates as fit in the time of the full recipe, by the cost of an update,
    measured beforehand in turn. An ingredient has earned its place if leaving it out costs more than twice
    the standard error of the difference over the seeds; what was tried would earn one if it gained as much.

    Args:
        quick: two seeds and two ingredients.
        seeds: runs of each variant, at least two.

    Returns:
        One row a variant: milliseconds an update, updates, loss, difference from the full recipe.
    """
    machine = scale.start("cpu", quiet=True)
    text, dtype = _text(), _dtypes(machine)[-1]
    full = _load("shakespeare-speedrun", dtype, 0)
    variants: dict[str, tuple[Changes, Changes]] = {"the recipe": ({}, {})}
    variants |= {f"without {name}": change for name, change in WITHOUT.items()}
    variants |= {f"with {name}": change for name, change in TRIED.items()}
    if quick:
        variants, seeds = dict(list(variants.items())[:3]), 2
    costs = _step_costs(text, dtype, full.training, variants)
    base = next(iter(variants))
    losses: dict[str, list[float]] = {name: [] for name in variants}
    for seed in range(seeds):
        for name, (model_changes, training_changes) in variants.items():
            steps = round(full.training.steps * costs[base] / costs[name])
            changes = _stretched(full.training, training_changes, steps)
            losses[name].append(_score(train_recipe(text, dtype, seed, model_changes, changes)[1], text))
    rows = [_row(name, losses[name], losses[base], costs[name]) for name in variants]
    return {"dtype": dtype, "threads": machine.threads, "seeds": seeds, "changes": rows}


def _stretched(config: TrainConfig, changes: Changes, steps: int) -> Changes:
    """`changes`, with the schedule and the stages stretched to another number of updates."""
    by = steps / config.steps
    stages = changes.get("stages", config.stages)
    moved = tuple(dataclasses.replace(stage, start=round(stage.start * by)) for stage in stages)
    return {**changes, "steps": steps, "warmup_steps": round(config.warmup_steps * by), "stages": moved}


def _step_costs(
    text: Text,
    dtype: str,
    config: TrainConfig,
    variants: Mapping[str, tuple[Changes, Changes]],
    rounds: int = 3,
) -> dict[str, float]:
    """Seconds an update of each variant: the median of rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    steps = max(WARM_UP_STEPS, config.steps // 5)
    for _ in range(rounds):
        for name, (model_changes, training_changes) in variants.items():
            short = _stretched(config, training_changes, steps)
            seconds[name].append(train_recipe(text, dtype, 0, model_changes, short)[0] / steps)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _row(name: str, losses: list[float], full: list[float], cost: float) -> dict[str, Any]:
    """Mean loss, and how much worse than the recipe's with the same seed."""
    differences = [loss - other for loss, other in zip(losses, full, strict=True)]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return {
        "change": name,
        "ms_an_update": round(1e3 * cost, 2),
        "loss": round(statistics.mean(losses), 4),
        "worse_by": round(mean, 4),
        "standard_error": round(error, 4),
        "verdict": _verdict(name, mean, error),
    }


def _verdict(name: str, worse_by: float, error: float) -> str:
    if name.startswith("without"):
        return "earned" if worse_by > 2 * error else "not shown"
    if name.startswith("with"):
        return "would help" if -worse_by > 2 * error else "not shown"
    return ""
