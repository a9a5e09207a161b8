"""Notebook files: what code they hold, what they measured, and how an executed one is written back.

A notebook is read and written as plain JSON (format 4), so that looking into all of them costs milliseconds.
"""

import base64
import copy
import json
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.curriculum.claims import MIME
from shared.runtime import files
from shared.runtime.errors import CourseError

Json = dict[str, Any]

STEPS = (
    "The question",
    "Predict",
    "Derive",
    "The same, from `shared`",
    "The experiment",
    "Claims",
    "Break it",
    "Go on",
)
FIGURE_BYTES = 60_000
PARAMETERS, INJECTED = "parameters", "injected-parameters"
_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_COST = re.compile(r"(<!-- cost -->).*?(<!-- /cost -->)", re.DOTALL)
_ABSOLUTE = re.compile(r"(?<![\w./~-])/(?:home|root|Users|tmp|var|opt|usr|mnt|private)/[\w.-]+")


def read(path: Path) -> Json:
    """The notebook at `path`.

    Raises:
        CourseError: it is missing, or not a notebook of format 4.
    """
    with files.explained("read the notebook", path):
        data = Path(path).read_bytes()
    try:
        notebook = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CourseError(f"{path.parent.name}/{path.name} is not a readable notebook: {error}.") from error
    if not _is_format_4(notebook):
        raise CourseError(f"{path.parent.name}/{path.name} is not a readable notebook of format 4.")
    return notebook


def _is_format_4(notebook: object) -> bool:
    return (
        isinstance(notebook, dict)
        and notebook.get("nbformat") == 4
        and isinstance(notebook.get("metadata"), dict)
        and isinstance(notebook.get("cells"), list)
        and all(isinstance(cell, dict) and {"cell_type", "source"} <= set(cell) for cell in notebook["cells"])
    )


def dumps(notebook: Json) -> str:
    """A notebook as Jupyter writes it: sorted keys, one space of indent, a newline at the end."""
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def text(value: str | list[str]) -> str:
    """A source or an output, which the format keeps as one string or as lines."""
    return value if isinstance(value, str) else "".join(value)


def code_cells(notebook: Json) -> list[Json]:
    """The code cells that hold code, without the one that papermill injects."""
    return [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and text(cell["source"]).strip() and INJECTED not in tags(cell)
    ]


def tags(cell: Json) -> list[str]:
    """A cell's tags."""
    return cell.get("metadata", {}).get("tags", [])


def source_sha256(notebook: Json) -> str:
    """SHA-256 of the code: sources of the code cells in order. Prose and outputs do not count."""
    return files.sha256_json(
        [[text(cell["source"]), PARAMETERS in tags(cell)] for cell in code_cells(notebook)]
    )


def outputs(notebook: Json) -> Iterator[tuple[Json, Json]]:
    """Every output with its cell."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            yield cell, output


def claims_record(notebook: Json) -> Json | None:
    """What the last `claims.show()` recorded: week, notebook, scale, seed, claims; None if there was none."""
    records = [output["data"][MIME] for _, output in outputs(notebook) if MIME in output.get("data", {})]
    return records[-1] if records else None


def measured(notebook: Json) -> dict[str, float | None]:
    """The measurements that an executed notebook carries, by claim."""
    record = claims_record(notebook) or {"claims": []}
    return {claim["name"]: claim["measured"] for claim in record["claims"]}


# Writing an executed notebook back.


def saved(original: Json, executed: Json, record: Mapping[str, Any], root: Path) -> Json:
    """The notebook as committed: sources and metadata of `original`, outputs of `executed`, nothing volatile.

    Args:
        original: the notebook before it ran.
        executed: papermill's result for it, with or without an injected cell.
        record: scale, seed, seconds and peak_rss_mb of the run, kept as `metadata.course`.
        root: the course's folder; this and other paths of the machine are taken out of the outputs.
    """
    result = copy.deepcopy(original)
    results = iter(code_cells(executed))
    count = 0
    for cell in result["cells"]:
        cell.get("metadata", {}).pop("papermill", None)
        cell.get("metadata", {}).pop("execution", None)
        if cell["cell_type"] == "markdown":
            cell["source"] = _with_cost(cell["source"], record)
        if cell["cell_type"] != "code":
            continue
        cell["outputs"], cell["execution_count"] = [], None
        if text(cell["source"]).strip():
            count += 1
            ran = next(results)
            cell["execution_count"] = count if ran["execution_count"] is not None else None
            cell["outputs"] = [_clean(output, count, root) for output in ran["outputs"]]
    course = {"source_sha256": source_sha256(original), **record}
    result["metadata"] = {**_METADATA, "course": course}
    return result


def _with_cost(source: str | list[str], record: Mapping[str, Any]) -> str | list[str]:
    """Fill in `<!-- cost -->…<!-- /cost -->`, the notebook's cost in its first step."""
    joined = text(source)
    if not _COST.search(joined):
        return source
    seconds, gigabytes = record["seconds"], record["peak_rss_mb"] / 1000
    cost = f"{seconds:.0f} s and {gigabytes:.1f} GB at `{record['scale']}` scale"
    return _COST.sub(rf"\g<1>{cost}\g<2>", joined).splitlines(keepends=True)


def _clean(output: Json, count: int, root: Path) -> Json:
    output = copy.deepcopy(output)
    output.get("metadata", {}).pop("papermill", None)
    if "execution_count" in output:
        output["execution_count"] = count
    if "text" in output:
        output["text"] = _without_machine(text(output["text"]), root).splitlines(keepends=True)
    for mime, data in output.get("data", {}).items():
        if mime.startswith("text/") or mime == "image/svg+xml":
            clean = re.sub(r"<dc:date>.*?</dc:date>", "", _without_machine(text(data), root))
            output["data"][mime] = clean.splitlines(keepends=True)
    return output


def _without_machine(value: str, root: Path) -> str:
    """`value` without the paths and the name of this machine."""
    value = re.sub(r"/\S*?/ipykernel_\d+/\d+\.py", "<notebook>", value)
    places = [
        (str(root), "."),
        (sys.prefix, ".venv"),
        (str(Path.home()), "~"),
        (tempfile.gettempdir(), "<tmp>"),
    ]
    for path, shown in places:
        if len(path) > 1:
            value = re.sub(re.escape(path) + r"(?![\w-])", shown, value)
    host = socket.gethostname()
    if len(host) > 4:  # a shorter one may well be a word
        value = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "localhost", value)
    return value


# What a committed notebook must be.


def problems(notebook: Json) -> list[str]:
    """Why a notebook is not fit to be committed, one sentence each; empty if it is."""
    return [*_structure_problems(notebook), *_execution_problems(notebook), *_output_problems(notebook)]


def _structure_problems(notebook: Json) -> Iterator[str]:
    markdown = [text(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    headings = re.findall(r"^## (\d\..*?)\s*$", "\n".join(markdown), re.MULTILINE)
    wanted = [f"{number}. {step}" for number, step in enumerate(STEPS, start=1)]
    if headings != wanted:
        yield f"Its numbered headings must be the eight steps {wanted}, not {headings}."
    parameters = [text(cell["source"]) for cell in notebook["cells"] if PARAMETERS in tags(cell)]
    if len(parameters) != 1:
        yield f"It must have one cell tagged `parameters`, not {len(parameters)}."
    elif {line.split("#")[0].strip() for line in parameters[0].splitlines()} - {""} != {
        'scale = "auto"',
        "seed = 0",
    }:
        yield 'Its parameters cell must hold scale = "auto" and seed = 0, and nothing else.'
    if notebook["metadata"].get("kernelspec", {}).get("language") != "python":
        yield "Its metadata lacks kernelspec.language, which papermill needs."


def _execution_problems(notebook: Json) -> Iterator[str]:
    course = notebook["metadata"].get("course", {})
    if course.get("source_sha256") != source_sha256(notebook):
        yield "Its outputs do not come from the code it holds; run it with --save."
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"It was not executed from top to bottom: execution counts {counts}."
    if any(output["output_type"] == "error" for _, output in outputs(notebook)):
        yield "It holds the output of an error."
    if any("papermill" in cell.get("metadata", {}) or INJECTED in tags(cell) for cell in notebook["cells"]):
        yield "It holds what papermill leaves behind; save it with --save."
    record = claims_record(notebook)
    if record is None:
        yield "It shows no table of claims."
    elif (record["scale"], record["seed"]) != (course.get("scale"), course.get("seed")):
        yield "Its claims were measured at another scale or seed than its metadata says."


def _output_problems(notebook: Json) -> Iterator[str]:
    for cell, output in outputs(notebook):
        for mime, data in output.get("data", {}).items():
            size = _figure_bytes(mime, data)
            if size > FIGURE_BYTES:
                yield f"A figure of cell [{cell['execution_count']}] has {size / 1000:.0f} kB, more than 60."
    for cell in notebook["cells"]:
        for value in _texts(cell):
            if found := _ABSOLUTE.search(value):
                yield f"It names a path of the machine it ran on: {found.group()}."


def _figure_bytes(mime: str, data: str | list[str]) -> int:
    if mime == "image/svg+xml":
        return len(text(data).encode())
    return len(base64.b64decode(text(data))) if mime.startswith("image/") else 0


def _texts(cell: Json) -> Iterator[str]:
    yield text(cell["source"])
    for output in cell.get("outputs", ()):
        yield text(output.get("text", ""))
        for mime, data in output.get("data", {}).items():
            if mime.startswith("text/"):
                yield text(data)
