"""The folder of a training run: what is in it belongs to one run, on one set of data."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.runtime import files
from shared.runtime.errors import CourseError
from shared.training import checkpointing

RUN, MODEL = "run.json", "model"


def begin(
    directory: Path, data: Mapping[str, Any] | str, settings: Mapping[str, Any], *, resume: bool, rank: int
) -> bool:
    """Write down in `run.json` what a run is made of, or check that one to resume is made of the same.

    Args:
        directory: the run's folder.
        data: what decides the batches, JSON-able; must be the same when a run is resumed.
        settings: what else is worth writing down, JSON-able; the trainer compares what decides the weights.
        resume: go on with the run that is there.
        rank: of this process; rank 0 alone writes.

    Returns:
        Whether there is something to go on from: a run that was stopped before its first checkpoint begins
        again.

    Raises:
        CourseError: the folder holds something and `resume` is false; it holds no run and `resume` is true;
            the run in it has other data; or another process trains into it.
    """
    if rank != 0:
        return resume and _has_checkpoint(directory)
    resumed = _check(directory, resume)
    path = directory / RUN
    with checkpointing.lock(directory):
        for name in (RUN, MODEL):  # what a killed run was writing
            files.remove_leftovers(directory / name)
        record = json.loads(json.dumps({"data": data, **settings}))
        if resumed and path.exists():
            _compare(path, record)
            return True
        files.atomic_write(path, json.dumps(record, indent=2) + "\n")
        return resumed


@contextmanager
def reserved(directory: Path, *, resume: bool, rank: int) -> Iterator[None]:
    """Keep every other process out of a run's folder until its model is saved; around `begin` and all after.

    Raises:
        CourseError: another process trains into it, or `begin` would refuse it.
    """
    if rank != 0:
        yield
        return
    _check(directory, resume)  # before a lock is put into a folder that is somebody else's
    with checkpointing.lock(directory):
        yield


def _check(directory: Path, resume: bool) -> bool:
    """Whether there is a checkpoint to go on from; refuses a folder that must not be touched."""
    if resume:
        return _has_checkpoint(directory)
    with files.explained("write", directory):
        if directory.exists() and set(os.listdir(directory)) - {checkpointing.LOCK}:
            raise CourseError(f"{directory} is not empty; add --resume to go on, or name another folder.")
    return False


def _has_checkpoint(directory: Path) -> bool:
    """Of a run that is to be resumed."""
    found = checkpointing.latest_checkpoint(directory) is not None
    if not found and not (directory / RUN).exists():
        raise CourseError(f"No checkpoint in {directory}; start the run without --resume.")
    return found


def _compare(path: Path, record: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise CourseError(f"{path} is damaged; delete it to resume without its check.") from error
    if before != record["data"]:
        raise CourseError(f"{path.parent} was trained on other data; resume with the same data section.")
