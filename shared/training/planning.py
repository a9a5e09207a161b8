"""What a training run will take, from its configuration alone: parameters, FLOPs, memory a device, time.

The model is built on the meta device, so a plan costs no memory and well under a second, whatever its size.

Legend: B batch, T time, N = B·T tokens of a micro-batch, C width of the model, F width of the hidden layer,
L layers, H heads, g = key/value heads / H, V vocabulary, P parameters, e bytes of a number in matrix
multiplications (4 in float32, 2 in bfloat16 and float16), n devices.

| what                | source                                                                     |
|---------------------|----------------------------------------------------------------------------|
| FLOPs of a token    | Chowdhery et al. 2022 (PaLM), appendix B: `GPT.flops_per_token`            |
| weights, gradients, | Rajbhandari et al. 2020 (ZeRO), §3.1: 16 bytes a parameter in mixed        |
| optimiser           | precision; here the weights themselves are float32, and autocast keeps     |
|                     | low-precision copies of those that are multiplied                          |
| activations         | Korthikanti et al. 2022, §4.1, eq. 1, without its 5·H·T/C: attention that  |
|                     | computes its weights again in the backward (Dao et al. 2022) keeps none    |
| recomputation       | Chen et al. 2016, §4; Korthikanti et al. 2022, §5: a block keeps its input |
| sharding            | Rajbhandari et al. 2020, §5.3 (stage 3); Zhao et al. 2023 (FSDP), §3       |

Memory is what tensors ask for, in bytes; what a CUDA context, an allocator's gaps and the batches themselves
take beside them is left to `Machine.usable`, which is less than what is installed.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from shared.models import attention
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import hardware
from shared.runtime.errors import CourseError
from shared.training.config import Run, TrainConfig
from shared.training.optimization import hidden_matrices

FLOAT32 = 4  # bytes: weights, gradients, optimiser states and the residual stream
MFU = 0.4  # assumed share of the peak: PaLM reports 0.46, earlier large runs 0.21 to 0.33 (PaLM, table 3)
CHARACTERS = 100  # assumed vocabulary of a character tokenizer: the text decides it
GPU_COUNTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # tried in turn for what does not fit
GPU_USABLE = 0.95  # of the memory as sold; a context takes 0.3 to 0.6 GB, NCCL and cuBLAS some more
CPU_USABLE = 0.9  # the operating system and the data need the rest
SETTINGS = {"checkpointing": "training.activation_checkpointing=true", "sharded": "training.parallel=fsdp2"}
NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser states",
    "copies": "working copies of weights",
    "activations": "activations",
    "logits": "logits and loss",
    "work": "intermediate results",
}
MOMENTS = {
    "loss": "in the loss",
    "head": "in the head's gradient",
    "blocks": "in the backward of the last block",
    "first block": "in the backward of the first block",
    "embedding": "in the embedding's gradient",
    "update": "in the optimiser's update",
}
# Two 256-bit FMA units at 3 GHz; bfloat16 where the CPU has instructions for it.
CPU_CORE_FLOPS = {"float32": 96e9, "bfloat16": 384e9}


# ------------------------------------------------------------------------------------------------ machines


@dataclass(frozen=True)
class Machine:
    """One device: a GPU, or a computer's processor with its memory.

    Attributes:
        name: as the reader knows it.
        kind: "cuda" or "cpu".
        memory: bytes as sold, 10⁹ to a GB.
        peak: number format → FLOP/s of dense matrix multiplication; empty where it is not known.
    """

    name: str
    kind: str
    memory: float
    peak: Mapping[str, float]

    @property
    def usable(self) -> float:
        """Bytes that tensors may take."""
        return self.memory * (CPU_USABLE if self.kind == "cpu" else GPU_USABLE)

    def for_each_of(self, processes: int) -> "Machine":
        """What one of several processes has: a GPU of its own, or its share of the cores and the memory."""
        if self.kind == "cuda" or processes == 1:
            return self
        peak = {dtype: flops / processes for dtype, flops in self.peak.items()}
        return Machine(f"1/{processes} of {self.name}", self.kind, self.memory / processes, peak)


def _gpu(name: str, gigabytes: int, float32: float, low: float) -> Machine:
    """Peaks in TFLOP/s, dense: float32 outside the tensor cores, 16 bits in them with float32 sums."""
    peak = {"float32": float32 * 1e12, "bfloat16": low * 1e12, "float16": low * 1e12}
    return Machine(name, "cuda", gigabytes * 1e9, peak)


# NVIDIA's data sheets (H200, H100 SXM, A100) and the whitepapers of Ada and Ampere GA102.
MACHINES = {
    "h200": _gpu("H200", 141, 67, 989),
    "h100": _gpu("H100 80 GB", 80, 67, 989),
    "a100": _gpu("A100 80 GB", 80, 19.5, 312),
    "a100-40": _gpu("A100 40 GB", 40, 19.5, 312),
    "rtx4090": _gpu("RTX 4090", 24, 82.6, 165.2),
    "rtx3080": _gpu("RTX 3080 10 GB", 10, 29.8, 59.5),
}
_NAMES = {"H200": "h200", "H100": "h100", "A100": "a100", "RTX 4090": "rtx4090", "RTX 3080": "rtx3080"}
_CPU = re.compile(r"cpu:([1-9]\d*):([1-9]\d*)")


def machine(name: str) -> Machine:
    """A device by name.

    Args:
        name: a key of `MACHINES`; "auto" for this computer's GPU, or its CPU if it has none; "cpu" for this
            computer's CPU; "cpu:24:128" for one of 24 cores and 128 GB.

    Raises:
        CourseError: no such device.
    """
    if name in MACHINES:
        return MACHINES[name]
    if match := _CPU.fullmatch(name):
        return _cpu(int(match[1]), int(match[2]) * 1e9)
    if name not in ("auto", "cpu"):
        known = ", ".join(MACHINES)
        raise CourseError(f"There is no GPU {name!r} in the plans; choose auto, {known}, cpu or cpu:24:128.")
    here = hardware.detect()
    if name == "cpu" or not here.gpus:
        return _cpu(here.cores, here.memory_gb * 1e9)
    gpu = here.gpus[0]
    known = next((MACHINES[key] for part, key in _NAMES.items() if part in gpu.name), None)
    return Machine(gpu.name, "cuda", gpu.memory_gb * 1e9, known.peak if known else {})


def _cpu(cores: int, memory: float) -> Machine:
    peak = {dtype: cores * flops for dtype, flops in CPU_CORE_FLOPS.items()}
    return Machine(f"CPU of {cores} cores, {memory / 1e9:.0f} GB", "cpu", memory, peak)


# --------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Sizes:
    """Numbers in a model's parameters.

    Attributes:
        total: P, shared ones once.
        matmul: those of linear layers, a tied head included: what autocast copies.
        hidden: those that Muon updates.
        alike: those of the largest group of hidden matrices of one shape, which Muon takes together.
        block: of one block.
        matrix: the largest single matrix of a block.
        outside: embeddings, head and last norm.
    """

    total: int
    matmul: int
    hidden: int
    alike: int
    block: int
    matrix: int
    outside: int


def build(config: GPTConfig) -> GPT:
    """The model on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return GPT(config)


def sizes(model: GPT) -> Sizes:
    """Count the parameters of a model, on any device."""
    block = [p.numel() for p in model.blocks[0].parameters()]
    total = model.num_parameters()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    groups: Counter[tuple[int, ...]] = Counter()
    for matrix in hidden_matrices(model):
        groups[tuple(sorted(matrix.shape))] += matrix.numel()
    outside = total - len(model.blocks) * sum(block)
    alike = max(groups.values())
    return Sizes(total, linear, groups.total(), alike, sum(block), max(block), outside)


# --------------------------------------------------------------------------------------------- activations


def writes_out_attention(config: GPTConfig, length: int, dtype: torch.dtype, kind: str) -> bool:
    """Whether attention keeps its T × T weights for the backward (the plain implementation)."""
    if config.attention == "plain":
        return True
    if config.attention != "auto" or kind != "cpu":
        return False
    q = torch.empty(1, 1, length, 1, dtype=dtype)
    return attention._plain_is_faster(q, q, config.dropout)


def block_activations(
    config: GPTConfig, batch: int, length: int, dtype: torch.dtype = torch.bfloat16, kind: str = "cuda"
) -> int:
    """Bytes that one block keeps for its backward.

    A token costs, in the order of computation (compare the list of Korthikanti et al. 2022, §4.1, which adds
    up to 34·C with 16-bit numbers everywhere and dropout; here the residual stream is float32):

    - two norms: 4·C each for the input (of an RMSNorm without weight on CPU, for the output) and e·C for the
      output as the next matmul reads it, where that is another tensor;
    - queries, keys, values: e·C·(1 + 2g); with RoPE or QK-norm once more e·C·(1 + g) as a fused kernel reads
      them, and once more as normalised (by QK-norm with a weight; on CPU also before RoPE);
    - attention: e·C for its output, which the output projection reads, and 4·H for the sums of exponentials;
      if it writes its weights out, e·H·T for them (three times that with dropout; 4·H·T with ALiBi);
    - MLP: what the activation function and the second matmul read: e·F each; ReLU keeps one tensor for both,
      SwiGLU four;
    - dropout: two masks of C, one byte a number on CUDA, e on CPU.

    For all B together: rotary tables 2·e·T·C·(1 + g), and the mask of a window, e·T².

    Args:
        config: the architecture.
        batch, length: B and T.
        dtype: of matrix multiplications (autocast), float32 for none.
        kind: "cuda" or "cpu"; their kernels keep different things.
    """
    e, C, H = dtype.itemsize, config.d_model, config.num_heads
    g, F = config.kv_heads / H, config.hidden
    low, cuda = e < FLOAT32, kind == "cuda"
    bare = config.norm == "rmsnorm" and not config.norm_affine and not cuda
    norms = 2 * ((FLOAT32 + e) if low or not bare else FLOAT32) * C
    written = writes_out_attention(config, length, dtype, kind)
    qkv = e * C * (1 + 2 * g)
    rope = config.position == "rope"
    if (rope or config.qk_norm) and not written:
        qkv += e * C * (1 + g)
    if config.qk_norm and (config.norm_affine or (rope and not cuda)):
        qkv += e * C * (1 + g)
    inner = e * C + FLOAT32 * H
    if written:
        inner = e * C + e * H * length * (3 if config.dropout else 1)
    elif config.position == "alibi":  # a bias of this shape is more than the fused kernels take
        inner = e * C + FLOAT32 * H * length
    mlp = {"swiglu": 4, "relu": 1}.get(config.activation, 2) * e * F
    masks = 2 * C * (1 if cuda else e) if config.dropout else 0
    tables = 2 * e * length * C * (1 + g) if rope else 0
    if config.window and not written:
        tables += e * length**2
    return round(batch * length * (norms + qkv + inner + mlp + masks) + tables)


def logit_bytes(tokens: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes of logits and loss at their worst moment.

    The logits, e·N·V; beside them, in float32, a copy where they are not float32 and the exponentials (in the
    backward: the gradient): 4·N·V each.
    """
    low = dtype.itemsize < FLOAT32
    return tokens * vocab_size * (dtype.itemsize + FLOAT32 * (2 if low else 1))


def _block_work(config: GPTConfig, tokens: int, length: int, dtype: torch.dtype, written: bool) -> int:
    """Bytes that a block's backward needs beside what was kept: gradients on their way.

    4·C + e·C for the residual stream's, e·F for the hidden layer's (SwiGLU: 2·e·F), or those of written-out
    attention weights if larger.
    """
    e = dtype.itemsize
    hidden = e * config.hidden * (2 if config.activation == "swiglu" else 1)
    weights = 2 * e * config.num_heads * length if written else 0
    return tokens * ((FLOAT32 + e) * config.d_model + max(hidden, weights))


# -------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Layout:
    """How a run is spread over devices.

    Attributes:
        devices: n.
        sharded: FSDP2: weights, gradients and optimiser states are divided by n, and a block's weights are
            put together while it runs; otherwise DDP: each device has all of them.
        checkpointing: blocks keep their input only and run again in the backward.
    """

    devices: int = 1
    sharded: bool = False
    checkpointing: bool = False

    @property
    def parts(self) -> int:
        """What weights are divided by."""
        return self.devices if self.sharded else 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parts: what there is: weights, gradients, optimizer, copies, activations, logits, work.
        moments: what is alive at each moment of an update, by part; the largest sum is the peak.
    """

    parts: dict[str, int]
    moments: dict[str, dict[str, int]]

    @property
    def moment(self) -> str:
        """When the peak comes."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return sum(self.moments[self.moment].values())

    @property
    def at_peak(self) -> dict[str, int]:
        """What is alive then, by part."""
        return self.moments[self.moment]


@lru_cache(maxsize=8)
def _sizes(config: GPTConfig) -> Sizes:
    """Of the model on the meta device: half a second for 48 layers, and a plan that is refused tries many."""
    return sizes(build(config))


def memory(config: GPTConfig, training: TrainConfig, layout: Layout = Layout(), kind: str = "cuda") -> Memory:
    """Memory of one device in the steady state, that is from the second update on.

    - weights 4·P and gradients 4·P, float32, divided by n if sharded; DDP (n > 1) sends gradients from
      buckets that take 4·P again, and shards add up micro-batches in whole gradients, 4·P;
    - optimiser: AdamW 8·P, two moments; Muon 4 for each number in a hidden matrix and 8 for the rest;
    - copies: autocast's low-precision weights, e for each number in a linear layer; if sharded also what is
      put together at a time, in float32: all outside the blocks and two blocks, the one that runs and the
      next, and in the backward a block's whole gradients before they are divided;
    - activations: L·`block_activations`, or 4·N·C a block and one block in full with checkpointing, and
      (4 + e)·C a token after the last block;
    - logits: `logit_bytes`;
    - work: gradients on their way through a block, and Muon's updates before they are applied: 8 for each
      number in a hidden matrix, and 4 + e for those of the largest group of one shape.

    Gradients are there throughout if micro-batches are accumulated; otherwise they come as activations go.
    Compiled code (`training.compile`) may keep less than is counted here.

    Args:
        config: the architecture.
        training: sizes, number format and optimiser; of several stages the most demanding one counts.
        layout: how the run is spread.
        kind: "cuda" or "cpu".
    """
    counted = _sizes(config)
    stages = training.stages or (training.stage_at(0),)
    each = [
        _stage(config, training, layout, kind, counted, stage.batch_size, stage.context_length)
        for stage in stages
    ]
    return max(each, key=lambda found: found.peak)


@dataclass(frozen=True)
class _Held:
    """Bytes for the parameters of a model, whatever the batch.

    Attributes:
        weights, optimizer: all the time.
        buckets: DDP's copy of the gradients.
        summed: gradients of earlier micro-batches, and buckets.
        complete: gradients before the update, and buckets.
        low: autocast's copies.
        gathered: what is put together of shards.
        scattered: a block's whole gradients on their way to shards.
        new: bytes of a gradient as it comes, in low precision first.
        update: the optimiser's intermediate results.
    """

    weights: int
    optimizer: int
    buckets: int
    summed: int
    complete: int
    low: int
    gathered: int
    scattered: int
    new: int
    update: int

    @classmethod
    def of(cls, counted: Sizes, training: TrainConfig, layout: Layout) -> "_Held":
        e = training.torch_dtype.itemsize
        low, sharded = e < FLOAT32, layout.sharded and layout.devices > 1
        every = FLOAT32 * counted.total
        muon = counted.hidden if training.optimizer == "muon" else 0
        buckets = every if layout.devices > 1 and not sharded else 0
        return cls(
            weights=every // layout.parts,
            optimizer=FLOAT32 * (2 * counted.total - muon) // layout.parts,
            buckets=buckets,
            summed=buckets + (every if training.accumulation > 1 else 0),
            complete=buckets + every // layout.parts,
            low=e * counted.matmul if low else 0,
            gathered=FLOAT32 * (counted.outside + 2 * counted.block) if sharded else 0,
            scattered=FLOAT32 * counted.block if sharded else 0,
            new=FLOAT32 + (e if low else 0),
            update=(2 * FLOAT32 * muon + (FLOAT32 + e) * counted.alike) if muon else 0,
        )


def _stage(
    config: GPTConfig,
    training: TrainConfig,
    layout: Layout,
    kind: str,
    counted: Sizes,
    batch: int,
    length: int,
) -> Memory:
    dtype, N = training.torch_dtype, batch * length
    e, C, V, L = dtype.itemsize, config.d_model, config.vocab_size, config.num_layers
    low, accumulating = e < FLOAT32, training.accumulation > 1
    held = _Held.of(counted, training, layout)
    block = block_activations(config, batch, length, dtype, kind)
    again = block if layout.checkpointing else 0
    kept = L * (FLOAT32 * N * C if layout.checkpointing else block)
    last = N * ((FLOAT32 + e) * C + 16)  # the last norm's input, the head's; inputs and targets, int64
    first = 0 if again else kept // L  # a block that runs again counts its input itself
    logits = logit_bytes(N, V, dtype)
    written = writes_out_attention(config, length, dtype, kind)
    head, tied = FLOAT32 * V * C, config.tie_embeddings
    work = again + _block_work(config, N, length, dtype, written) + held.new * counted.matrix
    work += head if tied or not accumulating else 0  # a tied head's gradient waits for the embedding's
    embedding = head * (accumulating + (2 - low if tied else 0))

    later = held.buckets + held.weights * (L - 1) * counted.block // counted.total
    one_block = e * counted.block * low  # of the copies, once the other blocks' have been let go
    steady = {"weights": held.weights, "optimizer": held.optimizer}
    forward = steady | {"copies": held.low + held.gathered, "gradients": held.summed}
    moving = held.gathered + held.scattered
    backward = forward | {"copies": (one_block if again else held.low) + moving, "activations": kept}
    at_first = backward | {"copies": one_block + moving, "activations": first}
    end = steady | {"gradients": held.complete}
    moments = {
        "loss": forward | {"activations": kept + last, "logits": logits, "work": low * FLOAT32 * N * C},
        "head": backward | {"activations": kept + last, "logits": e * N * V, "work": held.new * V * C},
        "blocks": backward | {"work": work},
        "first block": at_first | {"gradients": held.summed if accumulating else later, "work": work},
        "embedding": end | {"work": embedding},
        "update": end | {"work": held.update},
    }
    parts = steady | {
        "gradients": max(held.summed, held.complete),
        "copies": held.low + moving,
        "activations": kept + last + again,
        "logits": logits,
        "work": max(moment.get("work", 0) for moment in moments.values()) - again,
    }
    return Memory({name: parts[name] for name in NAMES}, moments)


# ---------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """What a run takes on given devices.

    Attributes:
        config, training, layout, machine: what was planned.
        sizes: numbers in the parameters.
        tokens: all that are trained on, of all devices together.
        flops: of the model, forward and backward, for all tokens (recomputation not counted).
        memory: of one device.
        mfu: assumed share of the devices' peak that `flops` reach without recomputation.
        vocabulary: where the vocabulary's size comes from, if it had to be assumed.
    """

    config: GPTConfig
    training: TrainConfig
    layout: Layout
    machine: Machine
    sizes: Sizes
    tokens: int
    flops: float
    memory: Memory
    mfu: float
    vocabulary: str | None = None

    @property
    def seconds(self) -> float | None:
        """Training time at the assumed MFU, evaluation and saving aside; None where the peak is not known.

        With activation checkpointing the blocks' forward runs twice: a third more work for all but the head.
        """
        peak = self.machine.peak.get(self.training.dtype)
        if peak is None:
            return None
        extra = 0.0
        if self.layout.checkpointing:
            extra = (self.flops - 6 * self.config.vocab_size * self.config.d_model * self.tokens) / 3
        return (self.flops + extra) / (peak * self.mfu * self.layout.devices)

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint on disk: weights and optimiser states, of all devices together."""
        return (self.memory.parts["weights"] + self.memory.parts["optimizer"]) * self.layout.parts

    def fits(self) -> bool:
        """Whether the peak is within what the machine lets tensors take."""
        return self.memory.peak <= self.machine.usable

    def problem(self) -> str | None:
        """Why the run does not fit, and what would make it fit, in one sentence; None if it does."""
        if self.fits():
            return None
        largest = sorted(self.memory.at_peak.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{NAMES[name]} {gigabytes(size)}" for name, size in largest)
        advice = self._advice()
        device = "of memory" if self.machine.kind == "cpu" else "on each GPU"
        return (
            f"The run needs {gigabytes(self.memory.peak)} {device} and {self.machine.name} has "
            f"{gigabytes(self.machine.usable)} for it ({parts}); {advice}."
        )

    def check(self) -> None:
        """Refuse a run that does not fit.

        Raises:
            CourseError: with the reason, and what would help.
        """
        if problem := self.problem():
            raise CourseError(problem)

    def with_changes(self, *, batch_size: int | None = None, **layout: Any) -> "Plan":
        """The same run with another micro-batch or layout: its memory, and time for recomputation."""
        training = self.training
        if batch_size is not None:
            stages = tuple(
                dataclasses.replace(stage, batch_size=min(stage.batch_size, batch_size))
                for stage in training.stages
            )
            training = dataclasses.replace(training, batch_size=batch_size, stages=stages)
        changed = dataclasses.replace(self.layout, **layout)
        needed = memory(self.config, training, changed, self.machine.kind)
        return dataclasses.replace(self, training=training, layout=changed, memory=needed)

    def _advice(self) -> str:
        """The first change that makes it fit, from the mildest on."""
        can_shard = (
            self.machine.kind == "cuda"
            and self.training.optimizer == "adamw"
            and self.training.dtype != "float16"
        )
        choices: list[dict[str, Any]] = [{}, {"checkpointing": True}]
        if can_shard:
            counts = [self.layout.devices, *(n for n in GPU_COUNTS if n > self.layout.devices)]
            choices += [
                {"devices": n, "sharded": True, "checkpointing": again}
                for n in counts
                for again in (self.layout.checkpointing, True)
                if n > 1
            ]
        for choice in choices:
            if batch := self._largest_batch(choice):
                return self._remedy(batch, choice)
        least = gigabytes(self.with_changes(batch_size=1, **choices[-1]).memory.peak)
        return f"at its smallest it takes {least}; train a smaller model"

    def _largest_batch(self, choice: Mapping[str, Any]) -> int | None:
        """The largest micro-batch, a divisor of today's, with which the run fits under a layout."""
        batch = self.training.batch_size
        divisors = [size for size in range(batch, 0, -1) if batch % size == 0]
        return next((b for b in divisors if self.with_changes(batch_size=b, **choice).fits()), None)

    def _remedy(self, batch: int, choice: Mapping[str, Any]) -> str:
        words = []
        if choice.get("devices", 1) > self.layout.devices:
            words.append(f"{choice['devices']} GPUs")
        if batch < self.training.batch_size:
            more = self.training.accumulation * self.training.batch_size // batch
            words.append(f"training.batch_size={batch} and training.accumulation={more}")
        for name, setting in SETTINGS.items():
            if choice.get(name) and not getattr(self.layout, name):
                words.append(setting)
        listed = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
        return f"it would fit with {listed}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values: bytes, seconds, FLOPs."""
        return {
            "parameters": self.sizes.total,
            "tokens": self.tokens,
            "flops": self.flops,
            "machine": self.machine.name,
            "devices": self.layout.devices,
            "parallel": self.parallel,
            "activation_checkpointing": self.layout.checkpointing,
            "dtype": self.training.dtype,
            "memory": {**self.memory.parts, "peak": self.memory.peak, "moment": self.memory.moment},
            "usable_memory": round(self.machine.usable),
            "checkpoint": self.checkpoint_bytes,
            "assumed_mfu": self.mfu,
            "seconds": self.seconds,
            "vocabulary": self.vocabulary or f"{self.config.vocab_size:,} tokens, from the configuration",
            "fits": self.fits(),
            "problem": self.problem(),
        }

    @property
    def parallel(self) -> str:
        """ "one device", "DDP" or "FSDP2"."""
        if self.layout.devices == 1:
            return "one device"
        return "FSDP2" if self.layout.sharded else "DDP"


def gigabytes(size: float) -> str:
    """ "3.1 GB", "240 MB" (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def plan(
    run: Run,
    on: Machine,
    devices: int = 1,
    *,
    vocab_size: int | None = None,
    mfu: float = MFU,
) -> Plan:
    """Plan a run from its configuration.

    Args:
        run: from `load_run`.
        on: one GPU, or a computer's CPU.
        devices: processes, each with its own micro-batches, on a GPU each or together on the CPU.
        vocab_size: of the tokenizer; None for the configuration's, which with characters is not known before
            the text is read (`CHARACTERS` is assumed).
        mfu: assumed share of the peak.

    Raises:
        CourseError: the model's choices do not fit together.
    """
    assumed = vocab_size is None and run.data.tokenizer == "char"
    if vocab_size is None:
        vocab_size = CHARACTERS if assumed else run.data.vocab_size
    config = run.model_config(vocab_size)
    model = build(config)
    training = run.training
    layout = Layout(devices, training.parallel == "fsdp2" and devices > 1, training.activation_checkpointing)
    stages = run.training.tokens_by_context(devices)
    return Plan(
        config,
        run.training,
        layout,
        on.for_each_of(devices),
        sizes(model),
        tokens=sum(tokens for _, tokens in stages),
        flops=float(sum(tokens * model.flops_per_token(length) for length, tokens in stages)),
        memory=memory(config, run.training, layout, on.kind),
        mfu=mfu,
        vocabulary=f"{CHARACTERS} characters assumed; the text decides" if assumed else None,
    )
