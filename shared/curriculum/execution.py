"""Executing notebooks, each in a process tree of its own, ended when it takes too long or too much memory."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from shared.curriculum import kernel, notebooks, weeks
from shared.runtime import artifacts
from shared.runtime.errors import CourseError

POLL_SECONDS = 0.2
LOOK_SECONDS = 1.0  # between looks for new processes: each reads the whole process table
RAN, ERROR, TIMEOUT, MEMORY = "ran", "error", "timeout", "memory"


@dataclass(frozen=True)
class Limits:
    """When to end a notebook: wall-clock seconds, and GB (10⁹ bytes) resident over its whole process tree."""

    seconds: float | None = None
    memory_gb: float | None = None


@dataclass(frozen=True)
class Job:
    """One notebook to execute.

    Attributes:
        notebook: which.
        scale: what its parameter `scale` is set to.
        seed: what its parameter `seed` is set to.
        fault: a fault to plant in the kernel, "week1/no_scale"; none if empty.
    """

    notebook: weeks.Notebook
    scale: str
    seed: int
    fault: str = ""


@dataclass(frozen=True)
class Outcome:
    """How an execution ended.

    Attributes:
        status: "ran", "error", "timeout" or "memory".
        seconds: wall-clock time, kernel start included.
        peak_rss_mb: the most memory (10⁶ bytes, resident) that the process tree was seen to hold.
        original: the notebook as it was when the execution began.
        executed: the notebook with the outputs it got to; None if there is no readable copy.
        error: None, or cell, code (its first line), message and last_lines.
    """

    status: str
    seconds: float
    peak_rss_mb: float
    original: notebooks.Json
    executed: notebooks.Json | None = None
    error: dict[str, Any] | None = None


class Observer:
    """Told what happens during an execution; does nothing by itself."""

    def started(self, job: Job) -> None:
        """A notebook begins."""

    def running(self, job: Job, cell: int | None, of: int | None, seconds: float, rss_mb: float) -> None:
        """A notebook is running its cell number `cell`; called several times a second."""

    def finished(self, job: Job, outcome: Outcome) -> None:
        """A notebook has ended."""


_PACKAGE = Path(__file__).resolve().parents[1]
_PLANT = "from shared.curriculum import faults\n_fault = faults.from_environment()\n_fault.__enter__()\n"


@dataclass
class _Running:
    """A notebook's process tree while it lives."""

    job: Job
    limits: Limits
    folder: Path
    threads: int
    original: notebooks.Json
    began: float = field(default_factory=time.monotonic)
    peak: int = 0
    rss: int = 0
    _looked: float = 0.0
    _seen: dict[int, psutil.Process] = field(default_factory=dict)

    def start(self) -> None:
        path = self.job.notebook.path
        # A copy: an editor may save the notebook while it runs, and a week folder may be read-only.
        (self.folder / "notebook.ipynb").write_text(json.dumps(self.original), encoding="utf-8")
        request = {
            "notebook": str(self.folder / "notebook.ipynb"),
            "cwd": str(path.parent),
            "parameters": {"scale": self.job.scale, "seed": self.job.seed},
            "runner": os.getpid(),
        }
        (self.folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        with (self.folder / "stderr.txt").open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shared.curriculum.kernel", str(self.folder / "request.json")],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C reaches the runner alone, which ends the rest in order
            )
        self._seen[self._process.pid] = psutil.Process(self._process.pid)

    def _environment(self) -> dict[str, str]:
        profile = self.folder / "ipython" / "profile_default" / "startup"
        profile.mkdir(parents=True)
        if self.job.fault:
            (profile / "00-fault.py").write_text(_PLANT)
        search = [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")]
        threads = str(self.threads)
        return {
            **os.environ,
            **artifacts.environment(),
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
            "COURSE_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "RAYON_NUM_THREADS": threads,
            "PYTHONHASHSEED": "0",
            "COURSE_FAULT": self.job.fault,
            # The reader's own IPython profile and kernels stay out of it.
            "IPYTHONDIR": str(self.folder / "ipython"),
            "JUPYTER_PREFER_ENV_PATH": "1",
            "JUPYTER_RUNTIME_DIR": str(self.folder / "jupyter"),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }

    def poll(self) -> Outcome | None:
        """The outcome, once there is one; ends the processes when a limit is passed."""
        self._measure()
        seconds = time.monotonic() - self.began
        if self._process.poll() is not None:
            return self._ended(seconds)
        limits = self.limits
        if limits.memory_gb is not None and self.rss > limits.memory_gb * 1e9:
            message = f"It used {self.rss / 1e9:.1f} GB of memory; the limit is {limits.memory_gb:g} GB"
            return self._stopped(MEMORY, message, seconds)
        if limits.seconds is not None and seconds > limits.seconds:
            return self._stopped(TIMEOUT, f"It did not end within {limits.seconds:g} s", seconds)
        return None

    def _measure(self) -> None:
        """Resident memory of the tree, now and at most."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        self.rss = 0
        for process in self._seen.values():
            try:
                self.rss += process.memory_info().rss
            except psutil.Error:  # it has ended
                continue
        self.peak = max(self.peak, self.rss)

    def _look(self) -> None:
        """Remember every process of the tree, for `stop`: one whose parent has ended is not found later."""
        self._looked = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                self._seen.setdefault(child.pid, child)

    def _ended(self, seconds: float) -> Outcome:
        result = self.folder / "result.json"
        if not result.exists():
            lines = (self.folder / "stderr.txt").read_text(errors="replace").splitlines()
            message = f"Its process ended with status {self._process.returncode} and no result"
            error = {**kernel.interrupted(self.folder, message), "last_lines": lines[-kernel.LAST_LINES :]}
            return self._outcome(ERROR, seconds, error)
        error = json.loads(result.read_text(encoding="utf-8"))
        return self._outcome(ERROR if error else RAN, seconds, error)

    def _stopped(self, status: str, message: str, seconds: float) -> Outcome:
        self.stop()
        return self._outcome(status, seconds, kernel.interrupted(self.folder, message))

    def _outcome(self, status: str, seconds: float, error: dict[str, Any] | None) -> Outcome:
        self.stop()
        executed = None
        with suppress(CourseError):  # it never began, or was ended while papermill wrote the file
            executed = notebooks.read(self.folder / "executed.ipynb")
        return Outcome(status, round(seconds, 2), round(self.peak / 1e6, 1), self.original, executed, error)

    def stop(self) -> None:
        """End every process that was ever seen in the tree: kernels live in sessions of their own."""
        self._look()
        for process in self._seen.values():
            with suppress(psutil.Error):  # it has ended; psutil sees to it that its id is not another's now
                process.kill()
        self._process.wait()
        psutil.wait_procs(list(self._seen.values()), timeout=5)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end things in order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def execute(
    jobs: Sequence[Job], *, parallel: int, cores: int, limits: Limits, observer: Observer | None = None
) -> Iterator[tuple[Job, Outcome]]:
    """Execute notebooks, each in its own kernel, and yield each as it ends.

    Nothing is left running, however this ends: by exhaustion, an exception, Ctrl-C or SIGTERM.

    Args:
        jobs: what to run, in this order.
        parallel: how many at a time.
        cores: shared out among them, as $COURSE_THREADS.
        limits: for each of them.
        observer: told about the progress.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after ending all processes.
    """
    observer = observer or Observer()
    waiting, running = list(jobs), []
    threads = max(1, cores // max(1, min(parallel, len(waiting))))
    temporary = tempfile.TemporaryDirectory(prefix="course-run-", ignore_cleanup_errors=True)
    with temporary as folder, _terminated_like_interrupted():
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    running.append(_start(waiting.pop(0), limits, threads, Path(folder)))
                    observer.started(running[-1].job)
                time.sleep(POLL_SECONDS)
                for one in list(running):
                    outcome = one.poll()
                    if outcome is None:
                        cell = kernel.running_cell(one.folder)
                        seconds = time.monotonic() - one.began
                        observer.running(one.job, cell["cell"], cell["of"], seconds, one.rss / 1e6)
                        continue
                    running.remove(one)
                    observer.finished(one.job, outcome)
                    yield one.job, outcome
        finally:
            for one in running:
                one.stop()


def _start(job: Job, limits: Limits, threads: int, folder: Path) -> _Running:
    original = notebooks.read(job.notebook.path)
    own = Path(tempfile.mkdtemp(dir=folder, prefix=f"{job.notebook.week}-"))
    one = _Running(job, limits, own, threads, original)
    one.start()
    return one
