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
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.curriculum import claims, notebooks, weeks
from shared.curriculum.claims import Verdict
from shared.runtime import files
from shared.runtime.errors import CourseError

FOLDER = Path("docs") / "weekly-logs"
TEMPLATE = ".template.md"
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
    known: dict[str, list[Verdict]] = {}

    def week_verdicts(name: str) -> list[Verdict]:
        if name not in known:
            known[name] = verdicts(name, root)
        return known[name]

    lines = []
    for number, line in enumerate(files.read_text(template).splitlines(keepends=True), start=1):
        try:
            lines.append(_PLACEHOLDER.sub(lambda match: _fill(match, week_verdicts, root), line))
            if left := re.search(r"\{\{.*?\}\}", lines[-1]):
                raise CourseError(
                    f"{left.group()} is no placeholder; write {{{{claim:week1.name}}}} or the like."
                )
        except CourseError as error:
            raise CourseError(f"{template.name}, line {number}: {error}") from error
    return _NOTE.format(template=template.name) + "".join(lines)


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
