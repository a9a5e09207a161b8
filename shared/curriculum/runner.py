"""Running the notebooks headlessly, and keeping what came out in `artifacts/runs/course/results.json`.

`results.json` is a list with one entry a notebook: `notebook`, `week`, `scale`, `seed`, `status`, `seconds`,
`peak_rss_mb`, `claims` (`name`, `measured`, `unit`, `min`, `max`, `holds`, and `as_stated`: what was seen
agrees with what `claims.yaml` says) and `error` (null, or `cell`, `code`, `message`, `last_lines`), with
`finished` (UTC) and `fingerprint` (a hash of all that the result depends on). It is rewritten after each
notebook, by rename.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from shared.curriculum import claims, execution, notebooks, weeks
from shared.curriculum.execution import Job, Limits, Observer, Outcome
from shared.runtime import artifacts, files
from shared.runtime.errors import CourseError

PASSED, FAILED = "passed", "failed"  # besides "error", "timeout" and "memory" of `execution`
LIMITS = {"cpu": Limits(600, 4.0), "gpu": Limits(3600), "h100x2": Limits()}


@dataclass(frozen=True)
class Entry:
    """One entry of `results.json`; the fields are those named in the module's docstring."""

    notebook: str
    week: str
    scale: str
    seed: int
    status: str
    seconds: float
    peak_rss_mb: float
    claims: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    finished: str = ""
    fingerprint: str = ""

    @property
    def key(self) -> str:
        """The notebook as a reader names it: "week1/01_attention_mechanisms"."""
        return f"{self.week}/{self.notebook}"

    @property
    def passed(self) -> bool:
        """Every cell ran, and every claim came out as stated."""
        return self.status == PASSED


def results_path() -> Path:
    """Where the results are kept."""
    return artifacts.home() / "runs" / "course" / "results.json"


def load_results() -> dict[str, Entry]:
    """What is known from earlier runs, by notebook key; empty if nothing has run.

    Raises:
        CourseError: the file is not one that the runner wrote.
    """
    path = results_path()
    if not path.exists():
        return {}
    try:
        entries = [Entry(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise CourseError(f"{path} is not readable as results; remove it and run again.") from error
    return {entry.key: entry for entry in entries}


def _record(entry: Entry) -> None:
    """Put `entry` in the place of the notebook's older one; the others stay."""
    path = results_path()
    with files.explained("write the results", path), FileLock(path.with_suffix(".lock")):
        entries = load_results() | {entry.key: entry}
        ordered = [asdict(entries[key]) for key in sorted(entries, key=_course_order)]
        files.atomic_write(path, json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _course_order(key: str) -> tuple[int, str]:
    week, _, notebook = key.partition("/")
    return int(week.removeprefix("week").partition("-")[0]), notebook


def _prepare_output() -> None:
    path = results_path()
    with files.explained("write the results", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()


# What a result depends on.


def fingerprint(notebook: weeks.Notebook, scale: str, seed: int, root: Path) -> str:
    """SHA-256 of everything that decides what a notebook shows.

    That is its code, the sources and samples of `shared`, the configurations, the week's other files, scale,
    seed, the version of torch, and which files $COURSE_DATA holds.
    """
    inputs = {
        "code": notebooks.source_sha256(notebooks.read(notebook.path)),
        "shared": _tree(Path(__file__).resolve().parents[1], "*.py", "*.yaml", "*.txt"),
        "configs": _tree(root / "configs", "*"),
        "week": _tree(notebook.path.parent, "*.py", "*.yaml"),
        "scale": scale,
        "seed": seed,
        "torch": metadata.version("torch"),
        "data": _listing(artifacts.environment().get("COURSE_DATA")),
    }
    return files.sha256_json(inputs)


def _tree(folder: Path, *patterns: str) -> dict[str, str]:
    found = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    return {
        str(path.relative_to(folder)): files.sha256_file(path)
        for path in found
        if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)
    }


def _listing(folder: str | None) -> list[tuple[str, int]]:
    if not folder or not Path(folder).is_dir():
        return []
    return sorted((path.name, path.stat().st_size) for path in Path(folder).iterdir() if path.is_file())


# Judging an outcome.


def judge(job: Job, outcome: Outcome, scale: str, root: Path, stamp: str = "") -> Entry:
    """The entry for an executed notebook: its measurements against the bounds of `claims.yaml`."""
    measured = notebooks.measured(outcome.executed) if outcome.executed else {}
    stated = [claim for claim in week_claims(job.notebook, root) if claim.notebook == job.notebook.name]
    verdicts = [claim.judge(measured.get(claim.name), scale) for claim in stated]
    status = outcome.status
    if status == execution.RAN:
        status = PASSED if all(verdict.as_stated for verdict in verdicts) else FAILED
    return Entry(
        notebook=job.notebook.name,
        week=job.notebook.week,
        scale=scale,
        seed=job.seed,
        status=status,
        seconds=outcome.seconds,
        peak_rss_mb=outcome.peak_rss_mb,
        claims=[verdict.as_json() for verdict in verdicts],
        error=outcome.error,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=stamp,
    )


def week_claims(notebook: weeks.Notebook, root: Path) -> tuple[claims.Claim, ...]:
    """The claims of the notebook's week."""
    return claims.load(weeks.find(notebook.week, root).folder)


@dataclass(frozen=True)
class Plan:
    """What a run is going to do.

    Attributes:
        scale: the scale that the machine resolved to.
        jobs: notebooks to execute.
        unchanged: entries of notebooks that passed before and that nothing has changed for.
        stamps: fingerprint of each notebook, by key.
        limits: for each notebook.
        cores: cores to share out.
        earlier: what is known from earlier runs, for an estimate.
    """

    scale: str
    jobs: tuple[Job, ...]
    unchanged: tuple[Entry, ...]
    stamps: Mapping[str, str]
    limits: Limits
    cores: int
    earlier: Mapping[str, Entry]


def plan(
    names: Sequence[str],
    *,
    scale: str = "auto",
    seed: int = 0,
    save: bool = False,
    force: bool = False,
    seconds: float | None = None,
    memory_gb: float | None = None,
    root: Path | None = None,
) -> Plan:
    """Look at everything that a run needs before anything runs.

    Args:
        names: weeks and notebooks; all that are ready for none.
        scale: "auto", "cpu", "gpu" or "h100x2".
        seed: for every notebook.
        save: the executed notebooks will be written back, so one that is not up to date has to run again.
        force: run what has not changed, too.
        seconds: time limit of a notebook; the scale's own for None.
        memory_gb: memory ceiling of a notebook; the scale's own for None.
        root: the course's folder; the repository by default.

    Raises:
        CourseError: unknown name or scale, malformed claims, an unreadable notebook, or output that cannot be
            written.
    """
    from shared.runtime import hardware
    from shared.runtime import scale as scales

    if save and seed != 0:
        raise CourseError(
            "Notebooks are saved as their parameters cell says, with seed 0; leave out --save or --seed."
        )
    root = root or files.repository_root()
    chosen = weeks.select(names, root)
    machine = hardware.detect()
    resolved, _ = scales.resolve(scale, machine)
    for notebook in chosen:
        week_claims(notebook, root)
    _prepare_output()
    earlier = load_results()
    stamps = {notebook.key: fingerprint(notebook, resolved, seed, root) for notebook in chosen}
    unchanged = {
        notebook.key: earlier[notebook.key]
        for notebook in chosen
        if not force and _is_unchanged(notebook, earlier, stamps, save)
    }
    limits = LIMITS[resolved]
    return Plan(
        scale=resolved,
        jobs=tuple(Job(notebook, scale, seed) for notebook in chosen if notebook.key not in unchanged),
        unchanged=tuple(unchanged.values()),
        stamps=stamps,
        limits=Limits(seconds or limits.seconds, memory_gb or limits.memory_gb),
        cores=machine.cores,
        earlier=earlier,
    )


def _is_unchanged(
    notebook: weeks.Notebook, earlier: Mapping[str, Entry], stamps: Mapping[str, str], save: bool
) -> bool:
    entry = earlier.get(notebook.key)
    if entry is None or not entry.passed or entry.fingerprint != stamps[notebook.key]:
        return False
    if not save:
        return True
    current = notebooks.read(notebook.path)
    return current["metadata"].get("course", {}).get("source_sha256") == notebooks.source_sha256(current)


def run(
    planned: Plan,
    *,
    parallel: int = 1,
    save: bool = False,
    observer: Observer | None = None,
    root: Path | None = None,
) -> Iterator[Entry]:
    """Execute what is planned; yield each entry once it stands in `results.json`.

    Each executed notebook is kept beside `results.json`; with `save`, one that passed is written in place.

    Raises:
        CourseError: output cannot be written; or, after all have run, notebooks were edited meanwhile and are
            not saved.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; the finished ones are kept, the others ended.
    """
    root = root or files.repository_root()
    executed = execution.execute(
        planned.jobs, parallel=parallel, cores=planned.cores, limits=planned.limits, observer=observer
    )
    edited = []
    with closing(executed):
        for job, outcome in executed:
            entry = judge(job, outcome, planned.scale, root, planned.stamps[job.notebook.key])
            _keep(job, outcome, entry, root)
            _record(entry)
            if save and entry.passed and not _save(job.notebook, outcome, entry, root):
                edited.append(entry.key)
            yield entry
    if edited:
        raise CourseError(f"Edited while running and so not saved: {', '.join(edited)}; run again.")


def _keep(job: Job, outcome: Outcome, entry: Entry, root: Path) -> None:
    if outcome.executed is not None:
        path = results_path().parent / job.notebook.week / f"{job.notebook.name}.ipynb"
        files.atomic_write(path, notebooks.dumps(_cleaned(outcome, entry, root)))


def _cleaned(outcome: Outcome, entry: Entry, root: Path) -> notebooks.Json:
    record = {
        "scale": entry.scale,
        "seed": entry.seed,
        "seconds": entry.seconds,
        "peak_rss_mb": entry.peak_rss_mb,
    }
    return notebooks.saved(outcome.original, outcome.executed, record, root)


def _save(notebook: weeks.Notebook, outcome: Outcome, entry: Entry, root: Path) -> bool:
    """Write the outputs into the notebook; False if its code is not that which ran."""
    now = notebooks.read(notebook.path)
    if notebooks.source_sha256(now) != notebooks.source_sha256(outcome.original):
        return False
    current = Outcome(outcome.status, outcome.seconds, outcome.peak_rss_mb, now, outcome.executed)
    files.atomic_write(notebook.path, notebooks.dumps(_cleaned(current, entry, root)))
    return True
