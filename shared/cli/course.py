"""`course list`, `run`, `check`, `debug`, `status`, `calibrate` and `devlog`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.cli import streams
from shared.runtime import files
from shared.runtime.errors import CourseError

if TYPE_CHECKING:
    from shared.curriculum.calibration import Spread
    from shared.curriculum.exercises import Verdict
    from shared.curriculum.faults import Curve, Fault
    from shared.curriculum.runner import Entry

Weeks = Annotated[
    list[str] | None,
    typer.Argument(metavar="WEEK", help="week1, 2, or week1/01_attention_mechanisms; all that are ready."),
]
Scale = Annotated[str, typer.Option(help="auto, cpu, gpu or h100x2.")]
Jobs = Annotated[int, typer.Option(min=1, help="Notebooks at a time; they share the cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
Timeout = Annotated[float | None, typer.Option(min=1, help="Seconds for one notebook (at cpu scale 600).")]
MemoryLimit = Annotated[float | None, typer.Option(min=0.1, help="GB for one notebook (at cpu scale 4).")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`, in the order of the help."""
    commands: dict[str, Callable[..., None]] = {
        "list": list_weeks,
        "run": run,
        "check": check,
        "debug": debug,
        "status": status,
        "calibrate": calibrate,
        "devlog": devlog,
    }
    for name, function in commands.items():
        app.command(name)(function)


def list_weeks(as_json: AsJson = False) -> None:
    """The twenty weeks: what each asks, and whether it is written yet.

    Example: course list
    """
    from shared.curriculum import weeks

    found = weeks.discover()
    if as_json:
        streams.print_json(
            [
                {
                    "week": week.slug,
                    "numbers": week.numbers,
                    "title": week.title,
                    "question": week.question,
                    "phase": week.phase,
                    "status": week.status,
                    "folder": week.folder.relative_to(files.repository_root()).as_posix(),
                    "notebooks": [notebook.name for notebook in week.notebooks],
                }
                for week in found
            ]
        )
        return
    from shared.cli import display

    table = display.table("Week", "Title", "The question", "Notebooks", "Status", right=["Week", "Notebooks"])
    phase = 0
    for week in found:
        if week.phase != phase:
            phase = week.phase
            table.add_row("", f"[bold]Phase {phase} · {week.phase_name}[/]", "", "", "")
        count = str(len(week.notebooks)) if week.notebooks else ""
        table.add_row(week.label, week.title, week.question, count, display.coloured(week.status))
    display.stdout().print(table)


def run(
    week: Weeks = None,
    scale: Scale = "auto",
    seed: Annotated[int, typer.Option(min=0, help="The notebooks' parameter `seed`.")] = 0,
    jobs: Jobs = 1,
    save: Annotated[bool, typer.Option("--save", help="Write executed notebooks back in place.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run what has not changed, too.")] = False,
    timeout: Timeout = None,
    memory_limit: MemoryLimit = None,
    as_json: AsJson = False,
) -> None:
    """Execute notebooks, and hold what they measure against their claims.

    Status 0 only if every notebook ran and every claim came out as stated.

    What passed before and has not changed since is not run again.

    Results: artifacts/runs/course/results.json

    Example: course run week1 --jobs 2
    """
    from shared.cli import display
    from shared.cli.progress import RunProgress
    from shared.curriculum import runner

    planned = runner.plan(
        week or [],
        scale=scale,
        seed=seed,
        save=save,
        force=force,
        seconds=timeout,
        memory_gb=memory_limit,
    )
    before = {key: entry.seconds for key, entry in planned.earlier.items()}
    entries = {entry.key: entry for entry in planned.unchanged}
    stopped: BaseException | None = None
    try:
        with RunProgress(planned.jobs, before, jobs) as progress:
            for entry in runner.run(planned, parallel=jobs, save=save, observer=progress):
                entries[entry.key] = entry
    except (KeyboardInterrupt, CourseError) as error:  # what has ended is shown all the same
        stopped = error
    ordered = [entries[key] for key in planned.stamps if key in entries]
    if as_json:
        streams.print_json([asdict(entry) for entry in ordered])
    else:
        _show_run(ordered, {entry.key for entry in planned.unchanged}, display.stdout())
    if isinstance(stopped, KeyboardInterrupt):
        raise typer.Exit(130)
    if stopped is not None:
        raise stopped
    if not all(entry.passed for entry in ordered):
        raise typer.Exit(1)


def _show_run(entries: Sequence["Entry"], unchanged: set[str], console: Any) -> None:
    from shared.cli import display
    from shared.curriculum import runner

    numbers = ["Seconds", "Memory", "Claims"]
    table = display.table("Week", "Notebook", *numbers, "Status", right=numbers)
    for entry in entries:
        note = "not changed since" if entry.key in unchanged else ""
        table.add_row(
            entry.week,
            entry.notebook,
            f"{entry.seconds:.0f}",
            display.memory(entry.peak_rss_mb),
            _claims_held(entry),
            display.coloured(entry.status, note),
        )
    if entries:
        console.print(table)
    for entry in entries:
        _show_problems(entry, console)
    if entries:
        console.print(f"\n{_summary(entries)} Results: {_relative(runner.results_path())}", soft_wrap=True)


def _claims_held(entry: "Entry") -> str:
    claimed = [claim for claim in entry.claims if claim["holds"] is not None]
    return f"{sum(claim['holds'] for claim in claimed)}/{len(claimed)}" if claimed else "—"


def _show_problems(entry: "Entry", console: Any) -> None:
    from rich.markup import escape

    from shared.curriculum.claims import Bound, number

    if entry.error:
        cell = f", cell [{entry.error['cell']}]" if entry.error["cell"] else ""
        console.print(
            f"\n[red]{entry.key}{escape(cell)}[/]: {escape(entry.error['message'])}", soft_wrap=True
        )
        if entry.error["code"]:
            console.print(f"  {escape(entry.error['code'])}", style="bold", soft_wrap=True)
        for line in entry.error["last_lines"]:
            console.print(f"  │ {escape(line)}", style="bright_black", soft_wrap=True)
        return
    for claim in entry.claims:
        bound = Bound(claim["min"], claim["max"])
        value = f"measured {number(claim['measured'])}"
        if claim["measured"] is None:
            value = "never measured, or not finite"
        if not claim["as_stated"]:
            verdict = "holds, though stated not to" if claim["holds"] else "does not hold"
            line = f"{claim['name']} {verdict}: {value}, bound {bound} ({claim['unit']})"
            console.print(f"\n[red]{entry.key}[/]: {escape(line)}", soft_wrap=True)
        elif claim["holds"] is False:
            line = f"{entry.key}: {claim['name']} does not hold, as stated: {value}, bound {bound}"
            console.print(f"\n[yellow]{escape(line)}[/]", soft_wrap=True)


def _summary(entries: Sequence["Entry"]) -> str:
    failed = sum(not entry.passed for entry in entries)
    if failed:
        return f"{failed} of {len(entries)} notebooks did not pass."
    some = "Every notebook" if len(entries) > 1 else "The notebook"
    held = all(claim["holds"] is not False for entry in entries for claim in entry.claims)
    return f"{some} ran, and every claim {'holds' if held else 'came out as stated'}."


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def check(
    week: Annotated[str, typer.Argument(metavar="WEEK", help="week2, or 2.")],
    name: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Exercises; all.")] = None,
    solutions: Annotated[bool, typer.Option("--solutions", help="Check the solutions instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Test your answers to a week's exercises; says what is wrong with them.

    Status 0 only if all of them pass.

    Example: course check week2 causal_mask
    """
    from shared.curriculum import exercises, status, weeks

    found = weeks.find(week)
    verdicts = exercises.check(found.slug, name or [], answers="solutions" if solutions else "exercises")
    if not solutions:
        status.record_exercises(found.slug, verdicts)
    if as_json:
        streams.print_json([asdict(verdict) for verdict in verdicts])
    else:
        _show_verdicts(verdicts, found.folder / exercises.STUBS)
    if any(verdict.status != exercises.PASSED for verdict in verdicts):
        raise typer.Exit(1)


def _show_verdicts(verdicts: Sequence["Verdict"], stubs: Path) -> None:
    from rich.markup import escape

    from shared.cli import display

    console = display.stdout()
    table = display.table("Exercise", "Difficulty", "Minutes", "Tests", "Verdict", right=["Minutes", "Tests"])
    for verdict in verdicts:
        card = verdict.exercise
        difficulty = "●" * card.difficulty + "○" * (5 - card.difficulty)
        tests = f"{verdict.passed}/{verdict.total}"
        table.add_row(card.name, difficulty, str(card.minutes), tests, display.coloured(verdict.status))
    console.print(table)
    for verdict in verdicts:
        if verdict.message:
            console.print(f"\n[bold]{verdict.exercise.name}[/]", soft_wrap=True)
            for line in verdict.message.splitlines():
                console.print(f"  {escape(line)}", soft_wrap=True)
            console.print(f"  [yellow]Hint:[/] {escape(verdict.exercise.hint)}", soft_wrap=True)
    open_ones = [verdict for verdict in verdicts if verdict.status == "not started"]
    if open_ones:
        card = open_ones[0].exercise
        place = f"{_relative(stubs)}, about {card.minutes} min"
        console.print(f"\nNext: [bold]{card.name}[/] in {place}: {escape(card.teaches)}", soft_wrap=True)


def debug(
    week: Annotated[str, typer.Argument(metavar="WEEK", help="week1, or 1.")],
    fault: Annotated[int | None, typer.Option(min=1, help="The number of a case; a random one.")] = None,
    answer: Annotated[str | None, typer.Option(help="Your diagnosis, to be asked nothing.")] = None,
) -> None:
    """The clinic: a fault is hidden in the code; find it by its curve.

    Status 0 if you find it, 1 if not.

    Example: course debug week1 --fault 3
    """
    import random

    from shared.cli import display
    from shared.curriculum import faults, weeks

    found = weeks.find_ready(week)
    every = faults.load(found.slug)
    cases = [one for one in every if one.experiment is not None]
    if not cases:
        raise CourseError(f"{found.slug} has no case for the clinic: none of its faults has an experiment.")
    if answer is not None and fault is None:
        raise CourseError("Say which case the answer is for: --fault N --answer NAME.")
    if fault is not None and fault > len(cases):
        raise CourseError(f"{found.slug} has {len(cases)} cases; choose --fault 1 to {len(cases)}.")
    names = sorted(one.name for one in cases)
    if answer is not None and answer not in names:
        raise CourseError(f"There is no fault {answer!r} in {found.slug}; choose one of {', '.join(names)}.")
    number = fault or random.randint(1, len(cases))
    hidden = cases[number - 1]
    console = display.stdout()
    with display.stderr().status(f"Case {number} of {found.slug}: running it healthy, then with a fault …"):
        healthy = hidden.experiment()
        with hidden.plant():
            broken = hidden.experiment()
    _show_case(number, healthy, broken, console)
    if not _diagnose(hidden, names, answer, number, console):
        raise typer.Exit(1)


def _show_case(number: int, healthy: "Curve", broken: "Curve", console: Any) -> None:
    from shared.cli import display
    from shared.curriculum.claims import number as shown

    console.print(f"\n[bold]Case {number}[/]\n")
    curves = {"healthy": (healthy.x, healthy.y), "with the fault": (broken.x, broken.y)}
    console.print(display.plot(curves, x_label=healthy.x_label, y_label=healthy.y_label))
    table = display.table(healthy.x_label, "healthy", "with the fault", right=["healthy", "with the fault"])
    count = min(len(healthy.x), len(broken.x))
    picked = sorted({round(k * (count - 1) / 4) for k in range(5)})
    for index in picked:
        table.add_row(shown(healthy.x[index]), shown(healthy.y[index]), shown(broken.y[index]))
    console.print(table)


def _diagnose(hidden: "Fault", names: Sequence[str], answer: str | None, number: int, console: Any) -> bool:
    """Ask until the fault is found or the help is used up; True if it was found."""
    from rich.markup import escape

    symptom, seen_by = escape(hidden.symptom), escape(hidden.caught_by)  # "test_x[plain]" is no style
    helps = [f"Hint: {escape(hidden.hint)}", f"Symptom: {symptom}"]
    console.print("\nWhich fault is it?")
    for index, name in enumerate(names, start=1):
        console.print(f"  {index}  {name.replace('_', ' ')}")
    if answer is None and not sys.stdin.isatty():
        console.print(
            f"\nAnswer with: --fault {number} --answer NAME, one of {', '.join(names)}", soft_wrap=True
        )
        return False
    while True:
        given = answer if answer is not None else _ask(names)
        if given == hidden.name:
            console.print(f"\n[green]Right: {hidden.name.replace('_', ' ')}.[/] {symptom}", soft_wrap=True)
            console.print(f"The check that sees it: {seen_by}", soft_wrap=True)
            return True
        console.print(f"\n[red]It is not {given.replace('_', ' ')!r}.[/] {helps.pop(0)}", soft_wrap=True)
        if answer is not None:
            return False
        if not helps:
            console.print(f"It was {hidden.name.replace('_', ' ')}; {seen_by} sees it.", soft_wrap=True)
            return False


def _ask(names: Sequence[str]) -> str:
    while True:
        given = typer.prompt("Number or name").strip()
        if given.isdigit() and 1 <= int(given) <= len(names):
            return names[int(given) - 1]
        if given.replace(" ", "_") in names:
            return given.replace(" ", "_")
        print(f"Please give a number from 1 to {len(names)}, or a name.")


def status(as_json: AsJson = False) -> None:
    """What has run and what came out, exercises solved, artefacts on disk.

    Example: course status
    """
    from shared.curriculum import status as states

    state = states.collect()
    if as_json:
        streams.print_json(asdict(state))
        return
    _show_status(state)


def _show_status(state: Any) -> None:
    from shared.cli import display

    console = display.stdout()
    numbers = ["Seconds", "Memory", "Claims"]
    table = display.table("Notebook", "Last run (UTC)", "Scale", *numbers, "Status", right=numbers)
    for book in state.notebooks:
        entry = book.entry
        note = "changed since" if entry and book.stale else ""
        cells = ("—",) * 5
        if entry:
            when = entry.finished[:16].replace("T", " ")
            memory = display.memory(entry.peak_rss_mb)
            cells = (when, entry.scale, f"{entry.seconds:.0f}", memory, _claims_held(entry))
        table.add_row(book.key, *cells, display.coloured(entry.status if entry else "never run", note))
    console.print(table if state.notebooks else "No week is ready yet.")
    exercises = display.table("Exercises", "Solved", right=["Solved"])
    for week in state.exercises:
        exercises.add_row(week.week, f"{week.solved}/{week.total}")
    if state.exercises:
        console.print()
        console.print(exercises)
    artefacts = display.table("Artefacts", "Number", "Size", right=["Number", "Size"])
    for kind in state.artefacts:
        artefacts.add_row(kind.kind, str(kind.count), display.memory(kind.megabytes))
    if state.artefacts:
        console.print()
        console.print(artefacts)
    console.print(f"\nKept in {_relative(Path(state.home))}", soft_wrap=True)


def calibrate(
    week: Annotated[str, typer.Argument(metavar="WEEK", help="week2, 2, or one notebook.")],
    seeds: Annotated[int, typer.Option(min=2, help="Run with seeds 0 to N - 1.")] = 5,
    scale: Scale = "auto",
    jobs: Jobs = 1,
    timeout: Timeout = None,
    memory_limit: MemoryLimit = None,
) -> None:
    """Measure how far each claim moves with the seed, for claims.yaml.

    Status 1 if a claim came out otherwise than stated with any seed; the spread is written all the same.

    Example: course calibrate week1 --seeds 5 --jobs 2
    """
    from shared.cli.progress import RunProgress
    from shared.curriculum import calibration, execution, notebooks, runner, weeks

    planned = runner.plan([week], scale=scale, force=True, seconds=timeout, memory_gb=memory_limit)
    chosen = [job.notebook for job in planned.jobs]
    todo = tuple(execution.Job(book, scale, seed) for book in chosen for seed in range(seeds))
    before = {key: entry.seconds for key, entry in planned.earlier.items()}
    measured: dict[int, dict[str, float | None]] = {seed: {} for seed in range(seeds)}
    failures: list[Entry] = []
    root = files.repository_root()
    with RunProgress(todo, before, jobs) as progress:
        executed = execution.execute(
            todo, parallel=jobs, cores=planned.cores, limits=planned.limits, observer=progress
        )
        with closing(executed):
            for job, outcome in executed:
                if outcome.status == execution.RAN:
                    measured[job.seed] |= notebooks.measured(outcome.executed)
                else:
                    failures.append(runner.judge(job, outcome, planned.scale, root))
    names = {book.name for book in chosen}
    folder = weeks.find(chosen[0].week).folder
    stated = [claim for claim in runner.week_claims(chosen[0], root) if claim.notebook in names]
    on = calibration.machine(planned.scale, planned.cores)
    found = calibration.spreads(stated, measured, planned.scale, on)
    calibration.write(folder, found)
    _show_spreads(found, failures, _relative(folder / "claims.yaml"))
    if failures or any(spread.disagreeing for spread in found):
        raise typer.Exit(1)


def _show_spreads(found: Sequence["Spread"], failures: Sequence["Entry"], path: str) -> None:
    from rich.text import Text

    from shared.cli import display
    from shared.curriculum.claims import number

    console = display.stdout()
    numbers = ["Mean", "SD", "Min", "Max"]
    table = display.table("Claim", *numbers, "Bound", "Verdict", right=numbers)
    for spread in found:
        cells = ["—"] * 4
        if spread.complete:
            values = spread.calibration()
            cells = [number(getattr(values, key)) for key in ("mean", "sd", "min", "max")]
        bad = ", ".join(map(str, spread.disagreeing))
        verdict = Text(f"not as stated with seed {bad}", "red") if bad else Text("as stated", "green")
        bound = spread.claim.bounds.get(spread.scale)
        table.add_row(spread.claim.name, *cells, str(bound or "—"), verdict)
    console.print(table)
    for entry in failures:
        console.print(f"\nseed {entry.seed}", end="")
        _show_problems(entry, console)
    written = sum(spread.complete for spread in found)
    console.print(f"\n{written} of {len(found)} spreads written to {path}", soft_wrap=True)


def devlog(
    week: Annotated[
        list[str] | None, typer.Argument(metavar="WEEK", help="week1, 2; all with a template.")
    ] = None,
) -> None:
    """Fill the notebooks' numbers into docs/weekly-logs; without WEEK, write its index and figures as well.

    Example: course devlog week2
    """
    from shared.curriculum import devlogs

    for template in devlogs.select(week or []):
        _write_devlog(devlogs.log_path(template), devlogs.render(template).encode())
    if not week:
        for path, content in devlogs.index().items():
            _write_devlog(path, content)


def _write_devlog(path: Path, content: bytes) -> None:
    same = path.exists() and path.read_bytes() == content
    if not same:
        files.atomic_write(path, content)
    print(f"{_relative(path)} {'is up to date' if same else 'written'}")
