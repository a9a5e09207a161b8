"""What each process of notebook 04 runs; `launch` imports these by path, so they are in a file, not a cell.

Rank r of N sees rows r·B/N … (r+1)·B/N of a batch, so that together they see what one process would.
"""

import itertools
import statistics
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from shared.curriculum import faults
from shared.data.datasets import TokenLoader
from shared.models.gpt import GPT, GPTConfig
from shared.training import distributed_utils as distributed
from shared.training.trainer import TrainConfig, Trainer


def device() -> torch.device:
    """This rank's device: its GPU under NCCL, else the CPU."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def make_model(config: dict, seed: int) -> GPT:
    """A GPT whose weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**config))


def share(batch: tuple[Tensor, Tensor], rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of a batch: (B, T) -> (B / N, T)."""
    inputs, targets = (tensor.chunk(world_size)[rank] for tensor in batch)
    return inputs, targets


def gradients(config: dict, inputs: Tensor, targets: Tensor, method: str, seed: int, fault: str = "") -> dict:
    """One backward pass on this rank's rows, gradients averaged by `method`.

    Args:
        config: GPTConfig's fields.
        inputs, targets: the whole batch, (B, T).
        method: "scratch" (our buckets), "ddp" (PyTorch's), or "none" (each rank keeps its own).
        seed: rank r starts from seed + r, so that equality afterwards has to be earned by the broadcast.
        fault: "week2/name" of a mistake to plant in this process, or "".

    Returns:
        `apart`: the largest difference between two ranks' weights before the broadcast; `gradient`: all
        gradients in one vector; `disagreement`: the largest difference between two ranks' gradients;
        `buckets`: how many messages carried them.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = make_model(config, seed + rank).to(device())
    apart = distributed.largest_difference(model.parameters())
    rows = [tensor.to(device()) for tensor in share((inputs, targets), rank, world_size)]
    buckets = 0
    if method == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)  # broadcasts rank 0's weights itself
        model(*rows)[1].backward()
    else:
        with faults.planted(*fault.split("/")) if fault else nullcontext():
            distributed.broadcast_parameters(model)
            averager = distributed.GradientAverager(model, bucket_mb=1.0) if method == "scratch" else None
            model(*rows)[1].backward()
            if averager:
                averager.finish()
                buckets = len(averager.buckets)
    found = [p.grad for p in model.parameters()]
    return {
        "apart": apart,
        "gradient": torch.cat([g.flatten() for g in found]).cpu(),
        "disagreement": distributed.largest_difference(found),
        "buckets": buckets,
    }


def train(config: dict, training: dict, tokens: Tensor, seed: int, threads: int) -> dict:
    """Train on this rank's share of the batches, the trainer averaging gradients if there are several ranks.

    Args:
        config: GPTConfig's fields.
        training: TrainConfig's fields; `batch_size` is that of all processes together.
        tokens: (N,) ids.
        seed: of the weights (the same on every rank) and of the data.
        threads: CPU threads of this process.

    Returns:
        `losses`, one an update, of the whole batch; `weights` in one vector; `step_seconds`, the median.
    """
    torch.set_num_threads(threads)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    settings = TrainConfig(**training, seed=seed, log_interval=1)
    loader = TokenLoader(tokens, settings.batch_size, settings.context_length, seed)
    model = make_model(config, seed).to(device())
    trainer = Trainer(
        model, settings, lambda step: share(loader.batch(step), rank, world_size), progress=False
    )
    history = trainer.fit()
    seconds = [entry["seconds"] for entry in history]
    steps = [later - earlier for earlier, later in itertools.pairwise(seconds)]
    return {
        "losses": [entry["loss"] for entry in history],
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).cpu(),
        "step_seconds": statistics.median(steps),
    }


def reduce_times(sizes: list[int], repeats: int) -> list[float]:
    """Median seconds of an all-reduce of n float32 numbers, for each n in `sizes`."""
    medians = []
    for size in sizes:
        tensor = torch.ones(size, device=device())
        times = []
        for _ in range(repeats):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times))
    return medians
