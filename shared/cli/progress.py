"""The progress of a run: a bar with an estimate in a terminal, lines elsewhere; on standard error."""

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from shared.cli import display
from shared.curriculum.execution import Job, Observer, Outcome

UNKNOWN_SECONDS = 60.0  # of a notebook that has never run


class RunProgress(Observer):
    """Shows what is running; estimates from how long each notebook took before.

    Args:
        jobs: everything that will run.
        seconds: how long notebooks took before, by key.
        parallel: how many run at a time.
        console: where to draw.
    """

    def __init__(
        self,
        jobs: tuple[Job, ...],
        seconds: Mapping[str, float],
        parallel: int,
        console: Console | None = None,
    ) -> None:
        self._console = console or display.stderr()
        self._expected = {job: seconds.get(job.notebook.key, UNKNOWN_SECONDS) for job in jobs}
        self._parallel = parallel
        self._finished = 0
        self._elapsed: dict[Job, float] = {}
        self._tasks: dict[Job, TaskID] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        total = sum(self._expected.values())
        self._overall = self._bar.add_task("[bold]course", total=total, note="")

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, job: Job) -> None:
        """Add the notebook's own line."""
        self._elapsed[job] = 0.0
        self._tasks[job] = self._bar.add_task(
            _label(job), total=self._expected[job], note="starting a kernel"
        )
        if not self._console.is_terminal:
            self._console.print(f"{_label(job)} …")

    def running(self, job: Job, cell: int | None, of: int | None, seconds: float, rss_mb: float) -> None:
        """Move the bars."""
        self._elapsed[job] = seconds
        where = f"cell {cell}/{of}" if cell else "starting a kernel"
        note = f"{where}, {display.duration(seconds)}, {display.memory(rss_mb)}"
        self._bar.update(self._tasks[job], completed=min(seconds, 0.97 * self._expected[job]), note=note)
        self._move_overall()

    def finished(self, job: Job, outcome: Outcome) -> None:
        """Take the notebook's line away."""
        self._finished += 1
        self._elapsed[job] = self._expected[job]
        self._bar.remove_task(self._tasks[job])
        self._move_overall()
        if not self._console.is_terminal:
            self._console.print(f"{_label(job)} {outcome.status}, {display.duration(outcome.seconds)}")

    def _move_overall(self) -> None:
        done = sum(min(seconds, self._expected[job]) for job, seconds in self._elapsed.items())
        rest = [max(0.0, seconds - self._elapsed.get(job, 0.0)) for job, seconds in self._expected.items()]
        left = max(sum(rest) / self._parallel, max(rest, default=0.0))
        note = f"{self._finished}/{len(self._expected)} notebooks, about {display.duration(left)} left"
        self._bar.update(self._overall, completed=done, note=note)


def _label(job: Job) -> str:
    return f"{job.notebook.key}, seed {job.seed}" if job.seed else job.notebook.key
