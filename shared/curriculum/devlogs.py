"""Devlogs: numbers in `docs/weekly-logs/week-NN.md` come from the committed notebooks, never from a keyboard.

The template beside it, `week-NN.template.md`, is Markdown with these placeholders:

    {{claim:week2.val_bpb}}              the measurement, as the tables show it
    {{claim:week2.val_bpb|.2f}}          the same in a Python format
    {{claim:week2.val_bpb.bound}}        a field: measured, bound, verdict, unit, says, source, null,
                                         or mean, sd, min, max of the calibration
    {{claims:week2}}                     a table of all claims of the week
    {{notebook:week2/03_train_a_gpt.seconds|.0f}}   what it cost: seconds or peak_rss_mb

Measurements are read from the outputs of the notebooks as they stand in the repository, means and spreads
from `claims.yaml`: whoever has the repository can render the same devlog.

A template begins with what the index of all weeks, `README.md`, says about its week:

    ---
    line: One sentence, with placeholders as above.
    figure: week2/03_train_a_gpt, Two recipes on the same text
    ---

that is a notebook and the title of one of its figures, which is copied out of the committed output.
"""

import base64
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.curriculum import claims, notebooks, weeks
from shared.curriculum.claims import Verdict
from shared.runtime import files
from shared.runtime.errors import CourseError

FOLDER = Path("docs") / "weekly-logs"
TEMPLATE = ".template.md"
INDEX, FIGURES = "README.md", "figures"
PLANNING = "../DevLog-000-planning.md"
_FRONT = re.compile(r"---\n(.*?\n)---\n\n?", re.DOTALL)
_IMAGES = {"image/png": ".png", "image/svg+xml": ".svg"}
_PLACEHOLDER = re.compile(r"\{\{(claim|claims|notebook):([^{}|]+?)(?:\|([^{}]*))?\}\}")
_NOTE = "<!-- Written by `course devlog` from {template} and the notebooks' outputs; edit the template. -->\n"
_FIELDS: dict[str, Callable[[Verdict], float | str | None]] = {
    "measured": lambda verdict: verdict.measured,
    "bound": lambda verdict: str(verdict.bound or "—"),
    "verdict": lambda verdict: verdict.words,
    "unit": lambda verdict: verdict.claim.unit,
    "says": lambda verdict: verdict.claim.says,
    "source": lambda verdict: verdict.claim.source,
    "null": lambda verdict: verdict.claim.null,
    "mean": lambda verdict: getattr(verdict.claim.calibrated, "mean", None),
    "sd": lambda verdict: getattr(verdict.claim.calibrated, "sd", None),
    "min": lambda verdict: getattr(verdict.claim.calibrated, "min", None),
    "max": lambda verdict: getattr(verdict.claim.calibrated, "max", None),
}


def verdicts(week: str, root: Path | None = None) -> list[Verdict]:
    """The claims of a week, with what its committed notebooks measured.

    Raises:
        CourseError: no such week, or one of its files is not readable.
    """
    found = weeks.find(week, root)
    records = {book.name: notebooks.claims_record(notebooks.read(book.path)) for book in found.notebooks}
    result = []
    for claim in claims.load(found.folder):
        record = records.get(claim.notebook) or {"scale": "cpu", "claims": []}
        measured = {entry["name"]: entry["measured"] for entry in record["claims"]}
        result.append(claim.judge(measured.get(claim.name), record["scale"]))
    return result


def templates(root: Path | None = None) -> list[Path]:
    """The devlog templates that there are, in order."""
    root = root or files.repository_root()
    return sorted((root / FOLDER).glob(f"*{TEMPLATE}"))


def log_path(template: Path) -> Path:
    """The devlog that a template renders to."""
    return template.with_name(template.name.removesuffix(TEMPLATE) + ".md")


def template_of(week: weeks.Week, root: Path | None = None) -> Path:
    """Where a week's template is: `docs/weekly-logs/week-02.template.md`."""
    root = root or files.repository_root()
    number = "-".join(f"{number:02d}" for number in week.numbers)
    return root / FOLDER / f"week-{number}{TEMPLATE}"


def select(names: Sequence[str], root: Path | None = None) -> list[Path]:
    """The templates of the weeks `names`; all for none.

    Raises:
        CourseError: no such week, or it has no template.
    """
    if not names:
        found = templates(root)
        if not found:
            raise CourseError(f"There is no devlog template in {FOLDER}; write week-01{TEMPLATE}.")
        return found
    chosen = []
    for name in names:
        path = template_of(weeks.find(name, root), root)
        if not path.exists():
            raise CourseError(f"There is no {FOLDER / path.name}; write the devlog's template first.")
        chosen.append(path)
    return chosen


def render(template: Path, root: Path | None = None) -> str:
    """The devlog: the template with every placeholder filled in.

    Raises:
        CourseError: a placeholder names a week, claim, notebook or field that there is not, a claim that has
            not been measured, or a bad format; template and line are named.
    """
    text = files.read_text(template)
    front = _FRONT.match(text)
    return _NOTE.format(template=template.name) + _filled(text, front.end() if front else 0, template, root)


def _filled(text: str, start: int, template: Path, root: Path | None) -> str:
    """The template's text from `start` on, which is the beginning of a line, with its placeholders filled."""
    known: dict[str, list[Verdict]] = {}

    def week_verdicts(name: str) -> list[Verdict]:
        if name not in known:
            known[name] = verdicts(name, root)
        return known[name]

    lines = []
    first = text.count("\n", 0, start) + 1
    for number, line in enumerate(text[start:].splitlines(keepends=True), start=first):
        try:
            lines.append(_PLACEHOLDER.sub(lambda match: _fill(match, week_verdicts, root), line))
            if left := re.search(r"\{\{.*?\}\}", lines[-1]):
                raise CourseError(
                    f"{left.group()} is no placeholder; write {{{{claim:week1.name}}}} or the like."
                )
        except CourseError as error:
            raise CourseError(f"{template.name}, line {number}: {error}") from error
    return "".join(lines)


def index(root: Path | None = None) -> dict[Path, bytes]:
    """The index of all weeks that have a template: one line and one figure each.

    Returns:
        Path -> content of `README.md` and of each figure in `figures/`.

    Raises:
        CourseError: a template does not begin with its line and figure, the line has a placeholder that
            cannot be filled, or the figure is not in the notebook's committed output.
    """
    folder = (root or files.repository_root()) / FOLDER
    content: dict[Path, bytes] = {}
    sections = []
    for week in weeks.discover(root):
        template = template_of(week, root)
        if not template.exists():
            continue
        line, notebook, title = _front_matter(template, root)
        suffix, image = _image(notebook, title, template, root)
        log = log_path(template)
        path = folder / FIGURES / f"{log.stem}{suffix}"
        content[path] = image
        sections.append(
            f"## [Week {week.label} · {week.title}]({log.name})\n\n{line}\n\n"
            f"[![{title}]({FIGURES}/{path.name})]({log.name})\n"
        )
    note = _NOTE.format(template="the templates")
    opening = (
        f"{note}# What came out, week by week\n\n"
        f"One line and one figure a week, from its committed notebooks; [how it was planned]({PLANNING}).\n"
    )
    content[folder / INDEX] = "\n".join([opening, *sections]).encode()
    return content


def _front_matter(template: Path, root: Path | None) -> tuple[str, str, str]:
    """What a template says for the index: its line, placeholders filled; a notebook; a figure's title."""
    import yaml

    text = files.read_text(template)
    front = _FRONT.match(text)
    try:
        values = yaml.safe_load(_filled(text[: front.end(1)], 4, template, root)) if front else None
    except yaml.YAMLError as error:
        raise CourseError(f"{template.name} does not begin with valid YAML between two lines ---.") from error
    entries = [values.get(key) for key in ("line", "figure")] if isinstance(values, dict) else []
    if not all(isinstance(entry, str) for entry in entries) or "," not in "".join(entries[1:]):
        raise CourseError(
            f"{template.name} must begin with ---, a `line:`, a `figure: week/notebook, its title`, and ---."
        )
    notebook, _, title = entries[1].partition(",")
    return entries[0].strip(), notebook.strip(), title.strip()


def _image(notebook: str, title: str, template: Path, root: Path | None) -> tuple[str, bytes]:
    """File suffix and content of the figure that a notebook's cell with `title` in it shows."""
    found = [
        (suffix, notebooks.text(output["data"][mime]))
        for cell, output in notebooks.outputs(notebooks.read(weeks.find_notebook(notebook, root).path))
        for mime, suffix in _IMAGES.items()
        if mime in output.get("data", {}) and f'"{title}"' in notebooks.text(cell["source"])
    ]
    if len(found) != 1:
        raise CourseError(
            f"{template.name} wants the figure {title!r}, and {notebook} shows {len(found)} of that title; "
            "name another, or run it with --save."
        )
    suffix, data = found[0]
    return suffix, data.encode() if suffix == ".svg" else base64.b64decode(data)


def _fill(match: re.Match[str], week_verdicts: Callable[[str], list[Verdict]], root: Path | None) -> str:
    kind, what, style = match.groups()
    if kind == "claims":
        return _table(week_verdicts(what))
    value = _claim_value(what, week_verdicts) if kind == "claim" else _notebook_value(what, root)
    if style is None:
        return value if isinstance(value, str) else claims.number(value)
    try:
        return format(value, style)
    except ValueError as error:
        raise CourseError(f"{style!r} in {match.group()} is no format for {value!r}.") from error


def _claim_value(what: str, week_verdicts: Callable[[str], list[Verdict]]) -> float | str:
    parts = what.split(".")
    if len(parts) not in (2, 3):
        raise CourseError(f"{what!r} must be week.claim or week.claim.field.")
    week, name, field = (*parts, "measured")[:3]
    for verdict in week_verdicts(week):
        if verdict.claim.name == name:
            if field not in _FIELDS:
                raise CourseError(f"{field!r} is no field of a claim; choose from {', '.join(_FIELDS)}.")
            value = _FIELDS[field](verdict)
            if value is None:
                remedy = "calibrate" if field != "measured" else "run --save"
                raise CourseError(f"{what!r} has no value yet; use `course {remedy}` first.")
            return value
    raise CourseError(f"{week} makes no claim {name!r}.")


def _notebook_value(what: str, root: Path | None) -> float:
    name, _, field = what.rpartition(".")
    course = notebooks.read(weeks.find_notebook(name, root).path)["metadata"].get("course", {})
    if field not in ("seconds", "peak_rss_mb"):
        raise CourseError(f"{field!r} is not known of a notebook; choose seconds or peak_rss_mb.")
    if field not in course:
        raise CourseError(f"{name} has not been saved by a run; use `course run --save`.")
    return course[field]


def _table(found: Sequence[Verdict]) -> str:
    rows = ["| Claim | Source | Measured | Unit | Bound | Verdict |", "|---|---|---|---|---|---|"]
    for verdict in found:
        claim = verdict.claim
        cells = (
            claim.says,
            claim.source,
            claims.number(verdict.measured),
            claim.unit,
            str(verdict.bound or "—"),
        )
        note = f"{verdict.words}: {claim.why}" if claim.why and verdict.scale == "cpu" else verdict.words
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, note)) + " |")
    return "\n".join(rows)
