"""Training speed: the course's trainer against nanoGPT's loop, and against `transformers.Trainer`.

All three train the same architecture (GPT-2 without dropout) on the same ids with AdamW, clipping and
autocast in the same number format, with the same threads and allocator settings. nanoGPT's side is a plain
re-creation: its modules as published, PyTorch's fused attention, `F.cross_entropy`, AdamW as PyTorch calls
it by default on a CPU, random windows. `transformers.Trainer` gets GPT2LMHeadModel, and neither logs, saves
nor evaluates.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.gpt import GPT, GPTConfig
from shared.runtime import scale
from shared.training.trackers import matmul_peak
from shared.training.trainer import TrainConfig, Trainer, token_batches

WARM_UP = 3  # updates of every run that are not timed


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    layers: int
    heads: int
    width: int
    vocab_size: int
    batch_size: int
    context_length: int
    updates: int

    @property
    def tokens(self) -> int:
        """Tokens an update."""
        return self.batch_size * self.context_length


SHAPES = {
    "4×128, characters": Shape(4, 4, 128, 65, 12, 64, 40),
    "4×128, 8k vocabulary": Shape(4, 4, 128, 8192, 16, 128, 12),
    "6×384, 8k vocabulary": Shape(6, 6, 384, 8192, 8, 256, 6),
}


class _NanoBlock(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        C = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _NanoGPT(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.positions = nn.Embedding(shape.context_length, shape.width)
        self.blocks = nn.Sequential(*(_NanoBlock(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def run(quick: bool = False, rounds: int = 5) -> dict[str, Any]:
    """Tokens a second of the three, in turn; ratios are medians over the rounds.

    Args:
        quick: one round of the smallest shape.
        rounds: runs of each.

    Returns:
        One row a shape: tokens a second, how many times faster the course is, and the share of this machine's
        measured matmul speed that its training reaches (6 FLOPs a weight and token, and attention's).
    """
    machine = scale.start("cpu", quiet=True)
    dtype = str(machine.dtype).removeprefix("torch.")
    peak = matmul_peak(torch.device("cpu"), machine.dtype)
    shapes = dict(list(SHAPES.items())[:1]) if quick else SHAPES
    rows = [_row(name, shape, dtype, 1 if quick else rounds, peak) for name, shape in shapes.items()]
    return {
        "threads": machine.threads,
        "dtype": dtype,
        "matmul_gflops": round(peak / 1e9),
        "training": rows,
    }


def _row(name: str, shape: Shape, dtype: str, rounds: int, peak: float) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, 100_000).astype(np.uint16)
    sides: dict[str, Callable[..., float]] = {
        "course": _course,
        "nanogpt": _nanogpt,
        "transformers": _transformers,
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, measure in sides.items():
            seconds[side].append(measure(shape, tokens, dtype))
    course = statistics.median(seconds["course"])
    flops = shape.tokens * _gpt(shape).flops_per_token(shape.context_length)
    row: dict[str, Any] = {"model": name, "batch": f"{shape.batch_size} × {shape.context_length}"}
    for side, values in seconds.items():
        row[f"{side} tokens/s"] = round(shape.tokens / statistics.median(values))
    for side in ("nanogpt", "transformers"):
        ratios = [other / ours for other, ours in zip(seconds[side], seconds["course"], strict=True)]
        row[f"times {side}"] = round(statistics.median(ratios), 2)
    row["share of matmul peak"] = f"{flops / course / peak:.0%}"
    return row


def _gpt(shape: Shape) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(shape.vocab_size, shape.context_length, shape.layers, shape.heads, shape.width))


def _course(shape: Shape, tokens: np.ndarray, dtype: str) -> float:
    """Seconds an update of the course's trainer, as it comes."""
    config = TrainConfig(
        steps=WARM_UP + shape.updates + 1,
        batch_size=shape.batch_size,
        context_length=shape.context_length,
        dtype=dtype,
    )
    marks: list[float] = []
    batches = token_batches(tokens, config)

    def marking(micro_step: int) -> Any:
        marks.append(time.perf_counter())
        return batches(micro_step)

    Trainer(_gpt(shape), config, marking, progress=False).fit()
    return _per_update(marks)


def _nanogpt(shape: Shape, tokens: np.ndarray, dtype: str) -> float:
    """Seconds an update of nanoGPT's loop."""
    torch.manual_seed(0)
    model = _NanoGPT(shape)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    low = dtype == "bfloat16"
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if low else contextlib.nullcontext()
    marks: list[float] = []
    T = shape.context_length
    for _ in range(WARM_UP + shape.updates + 1):
        marks.append(time.perf_counter())
        starts = torch.randint(len(tokens) - T - 1, (shape.batch_size,)).tolist()
        inputs = torch.stack([torch.from_numpy(tokens[i : i + T].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        with autocast:
            loss = model(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _per_update(marks)


def _transformers(shape: Shape, tokens: np.ndarray, dtype: str) -> float:
    """Seconds an update of transformers.Trainer."""
    import transformers

    marks: list[float] = []

    class Mark(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **options: Any) -> None:
            marks.append(time.perf_counter())

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(tokens) // shape.context_length

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            start = index * shape.context_length
            ids = torch.from_numpy(tokens[start : start + shape.context_length].astype(np.int64))
            return {"input_ids": ids, "labels": ids}

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.context_length,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_embd=shape.width,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=WARM_UP + shape.updates + 1,
            per_device_train_batch_size=shape.batch_size,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_grad_norm=1.0,
            bf16=dtype == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        transformers.Trainer(model, settings, train_dataset=Windows(), callbacks=[Mark()]).train()
    return _per_update(marks)


def _per_update(marks: list[float]) -> float:
    """Seconds from one update's start to the next, the first ones left out."""
    marks = marks[WARM_UP:]
    return (marks[-1] - marks[0]) / (len(marks) - 1)
