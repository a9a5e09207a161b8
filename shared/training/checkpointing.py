"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `step-00001000/`:

    model.safetensors      parameters and buffers
    state.safetensors      tensors of the optimiser and of the random-number generators
    state.json             step, configuration, history, and the structure that state.safetensors fills
    manifest.json          size and SHA-256 of each file above, and of itself

It is written beside its place and renamed when complete, so that a kill -9 or a full disk leaves the previous
one as it was. Loading checks every byte before anything is put into the model. Nothing is pickled.

Beside the folders stand two files of one line, `latest` and `best`: the name of the newest checkpoint and of
the one with the lowest validation loss. They can be given wherever a checkpoint's path can. What a run goes
on from is decided by the folders themselves, so that a marker left behind by a kill can mislead nobody.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from shared.runtime import files
from shared.runtime.errors import CourseError
from shared.training import sharding
from shared.training.optimization import Optimizer

MANIFEST, STATE, MODEL, TENSORS = "manifest.json", "state.json", "model.safetensors", "state.safetensors"
LATEST, BEST, LOCK = "latest", "best", ".lock"
NAME = re.compile(r"step-\d{8,}")
FORMAT = 1


class Stateful(Protocol):
    """What is saved of a model or an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint folder as `list_checkpoints` finds it; the content has not been read.

    Attributes:
        step: updates made when it was saved.
        path: the folder.
        bytes: of all files in it.
        complete: every file is there, in the size that the manifest gives.
        problem: what is not as it should be, or None.
    """

    step: int
    path: Path
    bytes: int
    complete: bool
    problem: str | None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back and verified.

    Attributes:
        step: updates made when it was saved.
        config: the training configuration it was made with.
        model: state dict of the model (aliases of shared tensors included).
        optimizer: the optimiser's state dict.
        generators: states of the random-number generators.
        extra: what else the trainer keeps (history, tokens, seconds).
        path: where it was read from.
    """

    step: int
    config: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    generators: dict[str, Any]
    extra: dict[str, Any]
    path: Path


def generator_states() -> dict[str, Any]:
    """States of the generators of Python, NumPy and PyTorch (CPU and every CUDA device)."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy_state = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def restore_generators(states: Mapping[str, Any]) -> None:
    """Put back what `generator_states` returned."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def save_checkpoint(
    directory: Path | str,
    step: int,
    model: Stateful,
    optimizer: Stateful,
    config: Mapping[str, Any],
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    keep_every: int = 0,
    best: bool = False,
) -> Path:
    """Save a checkpoint as `directory/step-XXXXXXXX`, mark it as the latest, and remove old ones.

    Args:
        directory: the run's folder.
        step: updates made so far.
        model, optimizer: what has a `state_dict`.
        config: the training configuration, JSON-able; loading compares it.
        extra: anything else JSON-able (tensors allowed) to keep.
        keep, keep_every: see `prune`.
        best: mark it as the best so far, too.

    Raises:
        CourseError: it cannot be written (full disk, no permission); earlier checkpoints are as they were.
    """
    path = checkpoint_path(directory, step)
    tensors: dict[str, Tensor] = {}
    weights, aliases = _unique(model.state_dict())
    state = {
        "format": FORMAT,
        "step": step,
        "config": dict(config),
        "aliases": aliases,
        "optimizer": pack(optimizer.state_dict(), tensors),
        "generators": pack(generator_states(), tensors),
        "extra": pack(dict(extra or {}), tensors),
    }
    try:
        with files.atomic_directory(path, replace=True) as temporary:
            safetensors.torch.save_file(weights, temporary / MODEL)
            safetensors.torch.save_file(tensors, temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(state))
            listing = {name: _fingerprint(temporary / name) for name in (MODEL, TENSORS, STATE)}
            manifest = {"files": listing, "sha256": files.sha256_json(listing)}
            (temporary / MANIFEST).write_text(json.dumps(manifest))
    except (CourseError, OSError, safetensors.SafetensorError) as error:
        previous = latest_checkpoint(directory)
        kept = f"the previous one, {previous}, is intact" if previous else "there is none before it"
        reason = _full_disk(error, path, [*weights.values(), *tensors.values()]) or str(error).rstrip(".")
        raise CourseError(f"The checkpoint of step {step} was not saved ({reason}); {kept}.") from error
    settle(path, keep, keep_every, best=best)
    return path


def settle(path: Path, keep: int, keep_every: int, *, best: bool) -> None:
    """Mark a new checkpoint and prune those before it; again after a kill that came in between."""
    for marker in (LATEST, BEST) if best else (LATEST,):
        files.atomic_write(path.parent / marker, path.name + "\n")
    prune(path.parent, keep, keep_every)


def _full_disk(error: Exception, path: Path, tensors: list[Tensor]) -> str:
    """Of a full disk: what the checkpoint needs and what there is, now that its unfinished part is gone."""
    if not any(sign in str(error) for sign in ("disk is full", "No space left", "quota")):
        return ""
    needed = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(path.parent).free
    missing = f", so {(needed - free) / 1e6:.1f} MB are missing" if needed > free else ""
    return f"the disk is full: it needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free{missing}"


def checkpoint_path(directory: Path | str, step: int) -> Path:
    """Where the checkpoint of a step stands, or would stand."""
    return Path(directory) / f"step-{step:08d}"


def _folders(directory: Path | str) -> list[Path]:
    """Checkpoint folders in a run's folder, oldest first."""
    found = [path for path in Path(directory).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def list_checkpoints(directory: Path | str) -> list[CheckpointInfo]:
    """The checkpoints in a run's folder, oldest first; sizes are checked, contents are not (see `verify`)."""
    return [_info(path) for path in _folders(directory)]


def _info(path: Path) -> CheckpointInfo:
    size = 0
    for file in path.iterdir():
        with suppress(OSError):
            size += file.stat().st_size
    problem = None
    try:
        _check_sizes(path)
    except CourseError as error:
        problem = str(error)
    return CheckpointInfo(int(path.name[5:]), path, size, problem is None, problem)


def latest_checkpoint(directory: Path | str) -> Path | None:
    """The newest checkpoint folder of a run, or None."""
    found = _folders(directory)
    return found[-1] if found else None


def marked_checkpoint(directory: Path | str, marker: str = BEST) -> Path | None:
    """The checkpoint that `directory/best` (or `latest`) names; None if there is no such file or folder."""
    try:
        name = (Path(directory) / marker).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = Path(directory) / name
    return path if NAME.fullmatch(name) and path.is_dir() else None


def prunable(directory: Path | str, keep_last: int, keep_every: int = 0) -> list[CheckpointInfo]:
    """The checkpoints that `prune` would remove.

    Args:
        directory: the run's folder.
        keep_last: leave the newest so many.
        keep_every: leave those of every multiple of so many updates, too; 0: none.

    What `best` names stays. What is not complete counts for nothing and is left as it is.
    """
    best = marked_checkpoint(directory)
    complete = [found for found in list_checkpoints(directory) if found.complete]
    return [
        found
        for found in complete[: max(0, len(complete) - max(1, keep_last))]
        if found.path != best and not (keep_every and found.step % keep_every == 0)
    ]


def prune(directory: Path | str, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Remove the checkpoints that `prunable` names, and return their folders."""
    old = [found.path for found in prunable(directory, keep_last, keep_every)]
    for path in old:
        # The name goes first: a kill in the middle must not leave half a checkpoint under it.
        doomed = path.with_name(f".{path.name}.pruned.tmp")
        with suppress(OSError):
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    return old


@contextmanager
def lock(directory: Path | str) -> Iterator[None]:
    """Keep every other process from training into `directory` meanwhile; a kill -9 releases it, too.

    The same thread may take it again. The file stays behind: removing it would let two processes each hold
    the lock of a file of that name.

    Raises:
        CourseError: another process has it, or the folder cannot be written to.
    """
    directory = Path(directory)
    with files.explained("write", directory):
        directory.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(directory.resolve() / LOCK, is_singleton=True)
        try:
            held.acquire(blocking=False)
        except filelock.Timeout as error:
            raise CourseError(
                f"Another process is training in {directory}; wait for its end, or name another folder."
            ) from error
    try:
        yield
    finally:
        held.release()


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint folder, or what a marker names, or the newest in a run's folder.

    Every byte is checked against its SHA-256 first.

    Raises:
        CourseError: there is none, or a file of it is missing, truncated or altered.
    """
    path = Path(path)
    if path.name in (LATEST, BEST) and path.is_file():
        marked = marked_checkpoint(path.parent, path.name)
        if marked is None:
            raise CourseError(
                f"{path} names no checkpoint of {path.parent}; name one of its folders instead."
            )
        path = marked
    if not (path / MANIFEST).exists() and not NAME.fullmatch(path.name):
        newest = latest_checkpoint(path)
        if newest is None:
            raise CourseError(f"No checkpoint in {path}; start the run without --resume.")
        path = newest
    verify(path)
    return _read(path)


def load_newest(directory: Path | str) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint of a run that is whole, and one sentence on each newer one that is damaged.

    Raises:
        CourseError: there is none at all, or all are damaged (the newest is named).
    """
    problems: list[CourseError] = []
    for path in reversed(_folders(directory)):
        try:
            return load_checkpoint(path), [str(problem) for problem in problems]
        except CourseError as error:
            problems.append(error)
    if problems:
        raise problems[0]
    raise CourseError(f"No checkpoint in {directory}; start the run without --resume.")


def _read(path: Path) -> Checkpoint:
    """The content of a checkpoint whose bytes have been verified."""
    try:
        state = json.loads((path / STATE).read_text())
        tensors = safetensors.torch.load_file(path / TENSORS)
        model = safetensors.torch.load_file(path / MODEL)
        if state["format"] != FORMAT:
            raise CourseError(f"{path} has checkpoint format {state['format']}; this course reads {FORMAT}.")
        model.update({alias: model[name] for alias, name in state["aliases"].items()})
        parts = {key: unpack(state[key], tensors) for key in ("optimizer", "generators", "extra")}
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, CourseError):
            raise
        raise _damaged(path, f"its content makes no sense: {error}") from error
    return Checkpoint(state["step"], state["config"], model, path=path, **parts)


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, config: Mapping[str, Any]
) -> None:
    """Put a checkpoint into model, optimiser and random-number generators.

    Raises:
        CourseError: it was made with another configuration, or for a model of another shape; the first
            difference is named and nothing has been changed.
    """
    _same_config(checkpoint, json.loads(json.dumps(dict(config))))
    _same_shapes(checkpoint, model)
    weights, moments = checkpoint.model, checkpoint.optimizer
    if any(map(sharding.is_shard, model.parameters())):
        here = model.state_dict()
        weights = {name: sharding.scatter(tensor, here[name]) for name, tensor in weights.items()}
        moments = sharding.scatter_optimizer(moments, optimizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    restore_generators(checkpoint.generators)


def _same_config(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    for key in sorted(config.keys() | checkpoint.config.keys()):
        there, here = checkpoint.config.get(key), config.get(key)
        if there != here:
            raise CourseError(
                f"{checkpoint.path} was made with {key} = {there} and this run has {here}; "
                "resume with the same configuration, or start in another folder."
            )


def _same_shapes(checkpoint: Checkpoint, model: nn.Module) -> None:
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in checkpoint.model.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise CourseError(
                f"{checkpoint.path} holds {name} of shape {there.get(name, 'none')} and this model has "
                f"{here.get(name, 'none')}; resume with the model the run was started with."
            )


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}


def _damaged(path: Path, why: str) -> CourseError:
    earlier = [other for other in _folders(path.parent) if other < path]
    way_out = f"before it there is {earlier[-1].name}" if earlier else "delete it and start again"
    return CourseError(f"Checkpoint {path} is damaged ({why}); {way_out}.")


def verify(path: Path | str) -> None:
    """Compare size and SHA-256 of each of a checkpoint's files with its manifest.

    Raises:
        CourseError: a file is missing, truncated or altered (it is named), or cannot be read.
    """
    path = Path(path)
    listing = _check_sizes(path)
    for name in (MODEL, TENSORS, STATE):
        with files.explained("read checkpoint", path):
            if files.sha256_file(path / name) != listing[name]["sha256"]:
                raise _damaged(path, f"{name} was altered")


def _check_sizes(path: Path) -> dict[str, Any]:
    """The manifest's list of files, once each is there in its size."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        listing = manifest["files"]
        if manifest["sha256"] != files.sha256_json(listing):
            raise _damaged(path, f"{MANIFEST} was altered")
        for name in (MODEL, TENSORS, STATE):
            size, expected = (path / name).stat().st_size, listing[name]["bytes"]
            if size != expected:
                raise _damaged(path, f"{name} has {size} of {expected} bytes")
    except CourseError:
        raise
    except FileNotFoundError as error:
        raise _damaged(path, f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise CourseError(f"Cannot read checkpoint {path}: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read") from error
    return listing


def _unique(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, by name; and for every further name of a tied tensor, the name it is kept under."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = tensor.contiguous()
    return kept, aliases


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON: tensors go into `tensors`, named in their place; dicts and tuples are marked."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [pack(item, tensors) for item in value]
    return value


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if isinstance(value, Mapping):
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(unpack(item, tensors) for item in content)
        return {unpack(k, tensors): unpack(v, tensors) for k, v in content}
    return value
