"""Several processes on one machine: starting them, and averaging their gradients.

`launch` runs an importable function in N processes (gloo on CPU, NCCL where each has a GPU) and hands back
what each returned. It works from a notebook, from pytest and from a script alike, because each process is a
fresh interpreter; a process that dies is named and the others are ended.

`GradientAverager` is data parallelism from scratch (Li et al. 2020, "PyTorch Distributed", §3.2): gradients
are packed into buckets in the order in which backward produces them, and a full bucket travels while backward
goes on. It departs from that paper in the order of the buckets, which is fixed here, never re-traced.
"""

import datetime
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.runtime import files, hardware
from shared.runtime.errors import CourseError
from shared.training.checkpointing import pack, unpack

POLL_SECONDS = 0.02


def setup(init_method: str = "env://", timeout: float = 7200.0, gpu: bool = True) -> torch.device:
    """Join the process group that RANK, WORLD_SIZE and LOCAL_RANK (set by torchrun or `launch`) describe.

    The processes of this machine share its cores out.

    Args:
        init_method: where the processes meet; "env://" reads MASTER_ADDR and MASTER_PORT.
        timeout: seconds after which a collective that not all have joined fails; rank 0 evaluates alone, and
            the others wait for it in one.
        gpu: take a GPU each, if this machine has enough of them.

    Returns:
        This process's device: its own GPU where there is one for each process, else the CPU.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    on_gpu = gpu and torch.cuda.device_count() >= local_size
    if on_gpu:
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(max(1, hardware.available_cores() // local_size))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def cleanup() -> None:
    """Leave the process group, if in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Replace `tensor`, in place, by its mean over the processes."""
    dist.all_reduce(tensor)
    return tensor.div_(dist.get_world_size())


def broadcast_parameters(model: nn.Module, source: int = 0) -> None:
    """Give every process rank `source`'s parameters and buffers."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, source)


def largest_difference(tensors: Iterable[Tensor]) -> float:
    """The largest absolute difference between any two processes' values of the same element.

    Run it before synchronising too: a test of equal ranks says something only if they started different.
    """
    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    low, high = flat.clone(), flat
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return (high - low).max().item()


class GradientAverager:
    """Averages the gradients of a model's copies over the processes while backward is still running.

    Usage: `loss.backward(); averager.finish(); optimizer.step()`. For accumulation, run all but the last
    backward inside `with averager.paused():`.

    Args:
        model: the same on every process; see `broadcast_parameters`.
        bucket_mb: size of a bucket, in MB (10⁶ bytes): larger ones waste less on latency, smaller ones start
            earlier.
    """

    def __init__(self, model: nn.Module, bucket_mb: float = 25.0) -> None:
        self.buckets = _buckets([p for p in model.parameters() if p.requires_grad], bucket_mb * 1e6)
        self.enabled = True
        self._index = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in self._index]
        self._start_over()

    def _start_over(self) -> None:
        self._waiting = [len(bucket) for bucket in self.buckets]
        self._travelling: list[tuple[dist.Work, Tensor]] = []

    def _ready(self, parameter: nn.Parameter) -> None:
        if not self.enabled:
            return
        self._waiting[self._index[parameter]] -= 1
        # Buckets leave in their fixed order, so that all processes add up the same ones together.
        while len(self._travelling) < len(self.buckets) and not self._waiting[len(self._travelling)]:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self._travelling)]
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
        )
        self._travelling.append((dist.all_reduce(flat, async_op=True), flat))

    def finish(self) -> None:
        """Wait for all buckets and put the means where the gradients were."""
        while len(self._travelling) < len(self.buckets):  # parameters that this batch did not use
            self._send()
        for bucket, (work, flat) in zip(self.buckets, self._travelling, strict=True):
            work.wait()
            flat /= dist.get_world_size()
            for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = mean.view_as(parameter)
        self._start_over()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward inside adds to the local gradients and sends nothing."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True


def _buckets(parameters: list[nn.Parameter], limit: float) -> list[list[nn.Parameter]]:
    """Parameters last to first, as backward reaches them, in buckets of up to `limit` bytes."""
    buckets: list[list[nn.Parameter]] = []
    room = 0.0
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if not buckets or size > room:
            buckets.append([])
            room = limit
        buckets[-1].append(parameter)
        room -= size
    return buckets


def launch(
    function: Callable[..., Any] | str, world_size: int, *, timeout: float = 600.0, **inputs: Any
) -> list[Any]:
    """Run a function in `world_size` processes that form one process group.

    Each is a fresh Python that calls `setup`, imports the function and calls `function(**inputs)`; inside,
    `torch.distributed` is ready. Cores are shared out: each process gets cores ÷ world_size threads.

    Args:
        function: from an importable module or a file; or "package.module:name" or "path/to/file.py:name". A
            function defined in a notebook cell lives nowhere another process could import it from: write the
            cell to a file with `%%writefile` and name that.
        world_size: how many processes.
        timeout: seconds until they are all ended.
        inputs: numbers, strings, tensors, and lists, tuples and dicts of these; what the function returns may
            hold the same.

    Returns:
        What each process returned, by rank.

    Raises:
        CourseError: a process died or raised (rank and reason are named, the others have been ended), or the
            time is up.
    """
    target = _target(function)
    with tempfile.TemporaryDirectory(prefix="course-launch-") as name:
        folder = Path(name)
        write_value(folder / "inputs", {"target": target, "inputs": inputs, "timeout": timeout})
        processes = [_start(folder, rank, world_size) for rank in range(world_size)]
        try:
            _wait(processes, folder, timeout)
        finally:
            _end(processes)
        return [read_value(folder / f"result-{rank}") for rank in range(world_size)]


def _target(function: Callable[..., Any] | str) -> str:
    if isinstance(function, str):
        if ":" not in function:
            raise ValueError(f"{function!r} is not of the form 'module:name' or 'file.py:name'")
        return function
    source = inspect.getsourcefile(function) or ""
    if "<" in function.__qualname__ or not os.path.exists(source):
        raise CourseError(
            f"{function.__name__} cannot be imported by another process; write it to a file (%%writefile in "
            f"a notebook) and pass 'file.py:{function.__name__}'."
        )
    inside = function.__module__.split(".")[0] == __name__.split(".")[0]
    return f"{function.__module__ if inside else source}:{function.__qualname__}"


def resolve_target(target: str) -> Callable[..., Any]:
    """The function that "module:name" or "file.py:name" names."""
    where, _, name = target.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None:
            raise CourseError(f"{where} is not a Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    return getattr(module, name)


def write_value(path: Path, value: Any) -> None:
    """Save numbers, strings, tensors and lists, tuples, dicts of them: `path`.safetensors and `path`.json."""
    tensors: dict[str, Tensor] = {}
    content = json.dumps(pack(value, tensors))
    safetensors.torch.save_file(
        {key: t.clone() for key, t in tensors.items()}, path.with_suffix(".safetensors")
    )
    files.atomic_write(path.with_suffix(".json"), content)


def read_value(path: Path) -> Any:
    """What `write_value` saved."""
    tensors = safetensors.torch.load_file(path.with_suffix(".safetensors"))
    return unpack(json.loads(path.with_suffix(".json").read_text()), tensors)


def _start(folder: Path, rank: int, world_size: int) -> subprocess.Popen:
    search = [str(files.repository_root()), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(max(1, hardware.available_cores() // world_size))
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": threads,
        "COURSE_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(search),
    }
    if sys.platform == "linux":  # all are on this machine; a host name that does not resolve must not matter
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", "shared.training.distributed_worker", str(folder)]
    with open(folder / f"output-{rank}.txt", "wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _wait(processes: list[subprocess.Popen], folder: Path, timeout: float) -> None:
    """Until all have ended well; raises as soon as one has not."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            raise CourseError(_failure(failed, codes, folder))
        if None not in codes:
            return
        if time.monotonic() > deadline:
            running = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            raise CourseError(
                f"Rank {running} of {len(codes)} did not finish within {timeout:g} s; all were ended."
            )
        time.sleep(POLL_SECONDS)


def _failure(failed: list[int], codes: list[int | None], folder: Path) -> str:
    """One sentence about the rank that failed first; the others often fail only because it left."""

    def first(rank: int) -> tuple[bool, float]:
        killed = (codes[rank] or 0) < 0
        return not killed, (folder / f"output-{rank}.txt").stat().st_mtime

    rank = min(failed, key=first)
    code = codes[rank] or 0
    lines = (folder / f"output-{rank}.txt").read_text(errors="replace").strip().splitlines()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    said = f" ({lines[-1].strip()})" if lines and code > 0 else ""
    return f"Rank {rank} of {len(codes)} {how}{said}; the others were ended."


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + 5.0
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
