"""What the course has built so far: each artefact once, keyed by everything that went into it."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from shared.runtime import files
from shared.runtime.errors import CourseError

LINEAGE = "lineage.json"


def home() -> Path:
    """Where artefacts live: $COURSE_HOME if set, else `artifacts/` in the repository."""
    return Path(os.environ.get("COURSE_HOME") or files.repository_root() / "artifacts").expanduser()


def environment() -> dict[str, str]:
    """$COURSE_HOME and $COURSE_DATA, where set, as absolute paths: for a process that works elsewhere."""
    names = [name for name in ("COURSE_HOME", "COURSE_DATA") if os.environ.get(name)]
    return {name: str(Path(os.environ[name]).expanduser().absolute()) for name in names}


def commit() -> str | None:
    """The repository's current commit, or None where there is no git history."""
    command = ["git", "-C", str(files.repository_root()), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def build(
    kind: str,
    config: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any] | None],
    *,
    parents: Sequence[Path] = (),
    scale: str = "cpu",
    week: str = "",
) -> Path:
    """The folder of an artefact, made by `make` if it is not there yet.

    The folder's name is a hash of kind, config, parents and scale. It is made in a temporary folder and
    renamed when complete, under a file lock: two processes may ask at once, one builds, the other waits.

    Args:
        kind: what it is, such as "corpora/python-docs" or "tokenizer"; becomes the folder above.
        config: everything that decides the content, JSON-able.
        make: fills the folder it is given; what it returns is kept as `metrics`.
        parents: artefact folders that this one is built from.
        scale: "cpu", "gpu" or "h100x2".
        week: the week that asked first, for the record.

    Returns:
        The folder, holding what `make` wrote and `lineage.json`.

    Raises:
        CourseError: the folder cannot be written, or the disk is full.
    """
    key = {
        "kind": kind,
        "config": dict(config),
        "parents": [lineage(parent)["key"] for parent in parents],
        "scale": scale,
    }
    digest = files.sha256_json(key)
    path = home() / kind / digest[:12]
    if (path / LINEAGE).exists():
        return path
    with files.explained("lock", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    try:
        if (path / LINEAGE).exists():  # another process built it while this one waited
            return path
        files.remove_leftovers(path)
        started = time.perf_counter()
        with files.atomic_directory(path, replace=True) as temporary:
            metrics = make(temporary)
            record = {
                **key,
                "key": digest,
                "metrics": dict(metrics or {}),
                "week": week,
                "commit": commit(),
                "seconds": round(time.perf_counter() - started, 3),
            }
            (temporary / LINEAGE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    finally:
        lock.release()
    return path


def lineage(path: Path) -> dict[str, Any]:
    """How an artefact came to be: key, kind, config, parents, scale, metrics, week, commit, seconds.

    Raises:
        CourseError: the folder holds no readable `lineage.json`.
    """
    try:
        record = json.loads((Path(path) / LINEAGE).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "key" not in record:
            raise ValueError("it has no key")
        return record
    except (OSError, ValueError) as error:
        raise CourseError(f"{path} is not an artefact of the course: no readable {LINEAGE} in it.") from error
