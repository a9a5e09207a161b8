"""`course bench`: measurements that anybody can repeat, each a ratio within one run where it can be."""

import inspect
import platform
from collections.abc import Mapping
from types import ModuleType
from typing import Annotated, Any

import typer

from shared.cli import streams
from shared.curriculum import weeks
from shared.runtime import files
from shared.runtime.errors import CourseError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Name → module in tests/benchmarks, function, and what docs/benchmarks calls it.
BENCHMARKS = {
    "time-to-loss": ("bench_time_to_loss", "run", "Time to loss"),
    "ablation": ("bench_time_to_loss", "ablation", "What each ingredient of the recipe earns"),
    "train": ("bench_train", "run", "Training speed"),
    "trainer-overhead": ("bench_trainer_overhead", "run", "Trainer overhead"),
    "generation": ("bench_generation", "run", "Generation"),
    "tokenizer": ("bench_tokenizer", "run", "Tokenizer training"),
    "cli": ("bench_cli", "run", "Start of the command line"),
}
LIBRARIES = ("torch", "numpy", "transformers", "tokenizers")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.", show_default=False)],
    quick: Annotated[
        bool, typer.Option("--quick", help="See that it runs; the numbers mean little.")
    ] = False,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Pairs of runs, for time-to-loss (default 3).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write docs/benchmarks/NAME.md.")] = False,
) -> None:
    """Measure one thing: baseline and course take turns in the same run, on a machine that does nothing else.

    Example: course bench time-to-loss --pairs 3 --write
    """
    if name not in BENCHMARKS:
        raise CourseError(f"There is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}.")
    if quick and write:
        raise CourseError("A quick run is too short to be written down; leave out --quick or --write.")
    module_name, function_name, title = BENCHMARKS[name]
    function = getattr(_module(module_name), function_name)
    options: dict[str, Any] = {"quick": quick}
    if pairs is not None:
        if "pairs" not in inspect.signature(function).parameters:
            raise CourseError(f"The benchmark {name!r} has no pairs; leave out --pairs.")
        options["pairs"] = pairs
    result = function(**options)
    command = f"course bench {name}" + (f" --pairs {pairs}" if pairs else "") + " --write"
    page = render(title, inspect.getdoc(function) or "", command, machine(), result)
    if write:
        files.atomic_write(files.repository_root() / "docs" / "benchmarks" / f"{name}.md", page)
    if as_json:
        streams.print_json({"machine": machine(), **result})
    else:
        print(page, end="")


def _module(name: str) -> ModuleType:
    path = files.repository_root() / "tests" / "benchmarks" / f"{name}.py"
    if not path.exists():
        raise CourseError(f"{path} is missing; benchmarks run from a clone of the repository.")
    return weeks.import_file(path, name)


def machine() -> dict[str, str]:
    """Processor, cores, memory, number formats and versions: what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    from shared.runtime import hardware

    found = hardware.detect()
    versions = []
    for library in LIBRARIES:
        try:
            versions.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return {
        "processor": hardware.cpu_name(),
        "cores": str(found.cores),
        "memory": f"{found.memory_gb:.0f} GB",
        "number format": found.bf16_reason,
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def render(
    title: str, about: str, command: str, machine: Mapping[str, str], result: Mapping[str, Any]
) -> str:
    """A Markdown page: what was measured, how to repeat it, on what, and the numbers.

    Lists of mappings become tables, and so do mappings; what is left is one table of names and values.
    """
    summary = about.split("\n\nArgs:")[0]
    lines = [f"# {title}", "", summary, "", f"Repeat: `{command}`", ""]
    lines += _table([{"machine": key, "": value} for key, value in machine.items()])
    single = {key: value for key, value in result.items() if not isinstance(value, (list, Mapping))}
    if single:
        lines += _table([{"measured": _words(key), "": value} for key, value in single.items()])
    for key, value in result.items():
        if isinstance(value, (list, Mapping)) and value:
            lines += [f"## {_words(key).capitalize()}", "", *_nested(value)]
    return "\n".join(lines)


def _nested(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return _table([{"": _words(key), "value": item} for key, item in value.items()])
    if all(isinstance(row, Mapping) for row in value):
        return _table(value)
    return [*(f"- {item}" for item in value), ""]


def _table(rows: list[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    header = "| " + " | ".join(_words(column) for column in columns) + " |"
    rule = "|" + "|".join("---" for _ in columns) + "|"
    body = ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return [header, rule, *body, ""]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("|", "\\|")
