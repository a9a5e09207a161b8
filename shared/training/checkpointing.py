"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `step-00001000/`:

    model.safetensors      parameters and buffers
    state.safetensors      tensors of the optimiser and of the random-number generators
    state.json             step, configuration, history, and the structure that state.safetensors fills
    manifest.json          size and SHA-256 of each file above, and of itself

It is written beside its place and renamed when complete, so that a kill -9 or a full disk leaves the previous
one as it was. Loading checks every byte before anything is put into the model. Nothing is pickled.
"""

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from shared.runtime import files
from shared.runtime.errors import CourseError
from shared.training.optimization import Optimizer

MANIFEST, STATE, MODEL, TENSORS = "manifest.json", "state.json", "model.safetensors", "state.safetensors"
NAME = re.compile(r"step-\d{8,}")
FORMAT = 1


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
    model: nn.Module,
    optimizer: Optimizer,
    config: Mapping[str, Any],
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Save a checkpoint as `directory/step-XXXXXXXX` and remove all but the newest `keep`.

    Args:
        directory: the run's folder.
        step: updates made so far.
        config: the training configuration, JSON-able; loading compares it.
        extra: anything else JSON-able (tensors allowed) to keep.
        keep: checkpoints to leave, this one included.

    Raises:
        CourseError: it cannot be written (full disk, no permission); earlier checkpoints are as they were.
    """
    path = Path(directory) / f"step-{step:08d}"
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
        reason = str(error).rstrip(".")
        raise CourseError(f"The checkpoint of step {step} was not saved ({reason}); {kept}.") from error
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(directory: Path | str) -> list[Path]:
    """Checkpoint folders in a run's folder, oldest first."""
    found = [path for path in Path(directory).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest_checkpoint(directory: Path | str) -> Path | None:
    """The newest checkpoint folder of a run, or None."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint folder (or the newest in a run's folder), every byte checked against its SHA-256.

    Raises:
        CourseError: there is none, or a file of it is missing, truncated or altered.
    """
    path = Path(path)
    if not (path / MANIFEST).exists() and not NAME.fullmatch(path.name):
        newest = latest_checkpoint(path)
        if newest is None:
            raise CourseError(f"No checkpoint in {path}; start the run without --resume.")
        path = newest
    _verify(path)
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
    model.load_state_dict(checkpoint.model)
    optimizer.load_state_dict(checkpoint.optimizer)
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
    earlier = [other for other in list_checkpoints(path.parent) if other < path]
    way_out = f"delete it to resume from {earlier[-1].name}" if earlier else "delete it and start again"
    return CourseError(f"Checkpoint {path} is damaged ({why}); {way_out}.")


def _verify(path: Path) -> None:
    """Compare each file's size and SHA-256 with the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        listing = manifest["files"]
        if manifest["sha256"] != files.sha256_json(listing):
            raise _damaged(path, f"{MANIFEST} was altered")
        for name in (MODEL, TENSORS, STATE):
            size, expected = (path / name).stat().st_size, listing[name]["bytes"]
            if size != expected:
                raise _damaged(path, f"{name} has {size} of {expected} bytes")
            if files.sha256_file(path / name) != listing[name]["sha256"]:
                raise _damaged(path, f"{name} was altered")
    except CourseError:
        raise
    except FileNotFoundError as error:
        raise _damaged(path, f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise CourseError(f"Cannot read checkpoint {path}: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read") from error


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
