"""What a week says it will show, written down before it runs, and what was measured on this machine.

Each week folder holds `claims.yaml`, a list of claims:

    - name: cached_equals_uncached
      says: Greedy decoding with a KV cache gives the same tokens as without.
      source: Vaswani et al. 2017, §3.2.3
      notebook: 01_generation_engine
      unit: fraction of equal tokens
      bounds: {cpu: {min: 1.0}}
      null: 0.0
      calibrated: {seeds: 5, mean: 1.0, sd: 0.0, min: 1.0, max: 1.0, on: "2 cores, torch 2.13.0"}

`bounds` has one entry a scale; at a scale without one the statement is measured and shown, but not claimed.
`null` is what a model that learnt nothing, or the broken version, would score: a claim whose null is within
the bound would hold whatever happens, and is refused. `calibrated` is written by `course calibrate`.

A statement that is known not to hold at CPU scale keeps the bound that it would need and says so:

      holds: false
      why: One minute of training is not enough; five minutes are (see the devlog).

It is then reported as not holding, with the measurement. Should it hold after all, that is as much a
disagreement with what is written as the reverse, and the run fails until `claims.yaml` is put right.
"""

import difflib
import html
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shared.curriculum import weeks
from shared.runtime import files
from shared.runtime.errors import CourseError

FILE = "claims.yaml"
MIME = "application/vnd.course.claims+json"
SCALES = ("cpu", "gpu", "h100x2")  # as shared.runtime.scale.NAMES, which would import torch

_REQUIRED = ("name", "says", "source", "notebook", "unit", "bounds", "null")
_OPTIONAL = ("calibrated", "holds", "why")
_CALIBRATED = ("seeds", "mean", "sd", "min", "max", "on")


@dataclass(frozen=True)
class Bound:
    """The interval, ends included, in which a measurement has to lie; None is open."""

    min: float | None = None
    max: float | None = None

    def holds(self, value: float) -> bool:
        """Whether `value` lies within; never true of NaN."""
        if math.isnan(value):
            return False
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        if self.min is None:
            return f"≤ {number(self.max)}"
        if self.max is None:
            return f"≥ {number(self.min)}"
        if self.min == self.max:
            return f"= {number(self.min)}"
        return f"{number(self.min)} to {number(self.max)}"


@dataclass(frozen=True)
class Calibration:
    """How a measurement spread over seeds 0 … n − 1: `sd` is the sample's, `on` names the machine."""

    seeds: int
    mean: float
    sd: float
    min: float
    max: float
    on: str


@dataclass(frozen=True)
class Claim:
    """One statement with the bound that tests it. See the module's docstring for each key.

    Attributes:
        expected: what is stated at `cpu` scale: True, or False for a statement known not to hold there.
        why: the reason for the latter, empty otherwise.
    """

    name: str
    says: str
    source: str
    notebook: str
    unit: str
    bounds: Mapping[str, Bound]
    null: float
    calibrated: Calibration | None = None
    expected: bool = True
    why: str = ""

    def expected_at(self, scale: str) -> bool:
        """Whether the statement is meant to hold at `scale`; only `cpu` can have a known exception."""
        return self.expected or scale != "cpu"

    def judge(self, measured: float | None, scale: str) -> "Verdict":
        """Set `measured` (None: it never was) against the bound at `scale`."""
        return Verdict(self, scale, measured)


@dataclass(frozen=True)
class Verdict:
    """One claim, at one scale, with its measurement; `measured` is None if there is none."""

    claim: Claim
    scale: str
    measured: float | None

    @property
    def bound(self) -> Bound | None:
        """The bound at this scale; None: not claimed here."""
        return self.claim.bounds.get(self.scale)

    @property
    def holds(self) -> bool | None:
        """The measurement is finite and within the bound. None: not claimed at this scale."""
        if self.bound is None:
            return None
        return self._finite and self.bound.holds(self.measured)

    @property
    def _finite(self) -> bool:
        return self.measured is not None and math.isfinite(self.measured)

    @property
    def as_stated(self) -> bool:
        """What was seen agrees with what `claims.yaml` states; without a finite measurement it never does."""
        if not self._finite:
            return False
        return self.holds is None or self.holds == self.claim.expected_at(self.scale)

    @property
    def words(self) -> str:
        """The verdict in a few words."""
        if self.measured is None:
            return "not measured"
        if self.holds is None:
            return "not claimed here"
        if self.holds:
            return "holds" if self.as_stated else "holds, though stated not to"
        return "does not hold, as stated" if self.as_stated else "does not hold"

    def as_json(self) -> dict[str, Any]:
        """The entry of `results.json`; a measurement that is not finite is null there."""
        bound = self.bound or Bound()
        return {
            "name": self.claim.name,
            "measured": self.measured if self._finite else None,
            "unit": self.claim.unit,
            "min": bound.min,
            "max": bound.max,
            "holds": self.holds,
            "as_stated": self.as_stated,
        }


def number(value: float | None) -> str:
    """A number as the tables show it: four significant digits, whole numbers whole, "—" for none."""
    if value is None:
        return "—"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}"


# Reading claims.yaml. Every message names the file, the claim and the key.


class _Problem(Exception):  # noqa: N818 - carries the half sentence that `load` completes
    pass


def load(folder: Path) -> tuple[Claim, ...]:
    """The claims of a week folder, checked. A folder without `claims.yaml` has none.

    Raises:
        CourseError: the file is not as the module's docstring says; file, claim and key are named.
    """
    path = Path(folder) / FILE
    return parse(files.read_text(path), path.parent) if path.exists() else ()


def parse(text: str, folder: Path) -> tuple[Claim, ...]:
    """The claims that `text` makes, as the `claims.yaml` of a week folder.

    Raises:
        CourseError: as `load`.
    """
    shown = f"{folder.name}/{FILE}"
    claims: list[Claim] = []
    for position, entry in enumerate(_entries(text, shown), start=1):
        name = entry.get("name") if isinstance(entry, dict) else None
        label = f"claim {name!r}" if isinstance(name, str) else f"claim {position}"
        try:
            claim = _claim(entry)
            if claim.name in {other.name for other in claims}:
                raise _Problem("key 'name' is used twice; give each claim its own")
            _check_notebook(claim, folder)
        except _Problem as problem:
            raise CourseError(f"{shown}, {label}: {problem}.") from None
        claims.append(claim)
    return tuple(claims)


@cache
def _loader() -> type:
    """A YAML loader whose keys are text (bare `null:`, `on:` are not) and unique; 1e-5 is a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                if key in mapping:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is given twice", key_node.start_mark
                    )
                mapping[key] = self.construct_object(value_node, deep=True)
            return mapping

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader


def _entries(text: str, shown: str) -> list[Any]:
    import yaml

    try:
        data = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date with month 13 is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise CourseError(f"{shown}{where} is not valid YAML: {reason}.") from error
    if data is None:
        return []
    if not isinstance(data, list):
        raise CourseError(f"{shown} must be a list of claims, each starting with '- name:'.")
    return data


def _claim(entry: Any) -> Claim:
    if not isinstance(entry, dict):
        raise _Problem("must be a mapping of keys to values")
    _check_keys(entry)
    for key in ("name", "says", "source", "notebook", "unit"):
        _text(entry[key], key)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", entry["name"]):
        raise _Problem("key 'name' must be lower-case letters, digits and underscores")
    claim = Claim(
        name=entry["name"],
        says=" ".join(entry["says"].split()),
        source=entry["source"],
        notebook=entry["notebook"].removesuffix(".ipynb"),
        unit=entry["unit"],
        bounds=_bounds(entry["bounds"]),
        null=_number(entry["null"], "null"),
        calibrated=_calibrated(entry["calibrated"]) if "calibrated" in entry else None,
        expected=_flag(entry.get("holds", True)),
        why=" ".join(_text(entry["why"], "why").split()) if "why" in entry else "",
    )
    if claim.expected == bool(claim.why):
        raise _Problem("keys 'holds: false' and 'why' go together; give both or neither")
    if not claim.expected and "cpu" not in claim.bounds:
        raise _Problem("key 'holds' is about cpu scale; give 'bounds' an entry for cpu")
    for scale, bound in claim.bounds.items():
        if bound.holds(claim.null):
            raise _Problem(
                f"key 'null': {number(claim.null)} is within the bound at {scale} ({bound}), so the "
                "claim would hold even if nothing worked; tighten 'bounds' or measure something else"
            )
    return claim


def _check_keys(entry: dict[str, Any]) -> None:
    for key in entry:
        if key not in (*_REQUIRED, *_OPTIONAL):
            close = difflib.get_close_matches(key, (*_REQUIRED, *_OPTIONAL), n=1)
            raise _Problem(f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    missing = [key for key in _REQUIRED if key not in entry]
    if missing:
        raise _Problem(f"key {missing[0]!r} is missing")


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Problem(f"key {key!r} must be text, not {value!r}")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Problem(f"key {key!r} must be a number, not {value!r}")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Problem(f"key 'holds' must be true or false, not {value!r}")
    return value


def _bounds(value: Any) -> dict[str, Bound]:
    if not isinstance(value, dict) or not value:
        raise _Problem("key 'bounds' must give at least one scale, such as {cpu: {min: 0.98}}")
    for scale in value:
        if scale not in SCALES:
            raise _Problem(f"key 'bounds' has unknown scale {scale!r}; choose from {', '.join(SCALES)}")
    return {scale: _bound(ends, f"bounds.{scale}") for scale, ends in value.items()}


def _bound(value: Any, key: str) -> Bound:
    if not isinstance(value, dict) or not value or set(value) - {"min", "max"}:
        raise _Problem(f"key {key!r} must have min, max or both, not {value!r}")
    bound = Bound(**{end: _number(limit, f"{key}.{end}") for end, limit in value.items()})
    if bound.min is not None and bound.max is not None and bound.min > bound.max:
        raise _Problem(f"key {key!r} has a min above its max")
    return bound


def _calibrated(value: Any) -> Calibration:
    if not isinstance(value, dict):
        raise _Problem("key 'calibrated' must be a mapping; let `course calibrate` write it")
    for key in set(value) ^ set(_CALIBRATED):
        state = "is missing" if key in _CALIBRATED else "is unknown"
        raise _Problem(f"key 'calibrated.{key}' {state}; let `course calibrate` write it")
    on = _text(value["on"], "calibrated.on")
    seeds = value["seeds"]
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 2:
        raise _Problem(f"key 'calibrated.seeds' must be a whole number of at least 2, not {seeds!r}")
    numbers = {key: _number(value[key], f"calibrated.{key}") for key in ("mean", "sd", "min", "max")}
    return Calibration(seeds=seeds, on=on, **numbers)


def _check_notebook(claim: Claim, folder: Path) -> None:
    there = sorted(path.stem for path in folder.glob("*.ipynb"))
    if there and claim.notebook not in there:
        raise _Problem(
            f"key 'notebook': there is no {claim.notebook}.ipynb beside it; there are {', '.join(there)}"
        )


# In a notebook.


class Claims:
    """The claims of one notebook: predict, measure, show.

    Args:
        week: such as "week1".
        notebook: file name without `.ipynb`.
        scale: the scale the notebook runs at (`machine.name`).
        seed: the seed it runs with.
        root: the course's folder; by default the one that holds the working folder (a notebook's own week),
            and failing that the repository.

    Raises:
        CourseError: no such week, `claims.yaml` is malformed, or it claims nothing for this notebook.
    """

    def __init__(
        self, week: str, notebook: str, *, scale: str, seed: int = 0, root: Path | None = None
    ) -> None:
        if scale not in SCALES:
            raise CourseError(f"Unknown scale {scale!r}; choose one of {', '.join(SCALES)}.")
        found = weeks.find(week, root or _working_root())
        self.week, self.notebook, self.scale, self.seed = found.slug, notebook, scale, seed
        everything = load(found.folder)
        self._elsewhere = {claim.name: claim.notebook for claim in everything if claim.notebook != notebook}
        self._claims = {claim.name: claim for claim in everything if claim.notebook == notebook}
        if not self._claims:
            raise CourseError(
                f"{found.folder.name}/{FILE} has no claim for notebook {notebook!r}; "
                "write what it will show before running it."
            )
        self._guesses: dict[str, float] = {}
        self._measured: dict[str, float] = {}

    def predict(self, name: str, guess: float) -> None:
        """Write down the reader's guess, before the measurement; `show` sets them side by side.

        Raises:
            CourseError: this notebook makes no such claim.
        """
        self._guesses[self._find(name).name] = float(guess)

    def measure(self, name: str, value: float) -> None:
        """Record the measured value (a number, or a tensor or array of one element), in the claim's unit.

        Raises:
            CourseError: this notebook makes no such claim.
        """
        self._measured[self._find(name).name] = float(value)

    def _find(self, name: str) -> Claim:
        if name in self._claims:
            return self._claims[name]
        if name in self._elsewhere:
            raise CourseError(
                f"Claim {name!r} belongs to notebook {self._elsewhere[name]}, not to {self.notebook}; "
                f"correct its 'notebook' key in {FILE}, or measure it there."
            )
        close = difflib.get_close_matches(name, self._claims, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(self._claims)}."
        raise CourseError(f"{self.week}/{self.notebook} makes no claim {name!r}; {hint}")

    def verdicts(self) -> list[Verdict]:
        """Every claim of this notebook with its measurement, in the order of `claims.yaml`."""
        return [claim.judge(self._measured.get(name), self.scale) for name, claim in self._claims.items()]

    def show(self) -> None:
        """Display the table claim, guess, measured, bound, verdict, and name what was never measured.

        The same record travels in the output as JSON (MIME type `MIME`), where the runner, the devlogs and
        the site read it.
        """
        bundle = {
            "text/plain": self.text(),
            "text/html": self.html(),
            MIME: self.record(),
        }
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            get_ipython = None
        if get_ipython is None or get_ipython() is None:
            print(bundle["text/plain"])
        else:
            display(bundle, raw=True)

    def record(self) -> dict[str, Any]:
        """What `show` embeds: week, notebook, scale, seed; the claims as in `results.json`, with guesses."""
        return {
            "week": self.week,
            "notebook": self.notebook,
            "scale": self.scale,
            "seed": self.seed,
            "claims": [
                {**verdict.as_json(), "guess": _finite(self._guesses.get(verdict.claim.name))}
                for verdict in self.verdicts()
            ],
        }

    def _rows(self) -> list[tuple[Verdict, str, str]]:
        return [
            (verdict, number(self._guesses.get(verdict.claim.name)), str(verdict.bound or "—"))
            for verdict in self.verdicts()
        ]

    def _notes(self) -> list[str]:
        unmeasured = [verdict.claim.name for verdict in self.verdicts() if verdict.measured is None]
        notes = []
        if unmeasured:
            notes.append(
                f"Never measured: {', '.join(unmeasured)}. Call claims.measure(name, value) before this cell."
            )
        for verdict in self.verdicts():
            if verdict.claim.why and self.scale == "cpu":
                notes.append(f"{verdict.claim.name}: {verdict.claim.why}")
        return notes

    def text(self) -> str:
        """The table in plain text, at most 110 characters wide."""
        header = ("Claim", "Your guess", "Measured", "Bound", "Verdict")
        body = [
            (verdict.claim.says, guess, number(verdict.measured), bound, verdict.words)
            for verdict, guess, bound in self._rows()
        ]
        width = max(20, 110 - sum(max(len(row[i]) for row in [header, *body]) + 2 for i in range(1, 5)))
        return "\n".join([*_columns([header, *body], width), *self._notes()])

    def html(self) -> str:
        """The table as HTML for light and dark themes: only the verdict brings its own colour."""
        cells = "".join(f"<th style='text-align:left'>{name}</th>" for name in _HTML_HEADER)
        rows = "".join(_html_row(*row) for row in self._rows())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return f"<table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>{notes}"


_HTML_HEADER = ("Claim", "Source", "Your guess", "Measured", "Unit", "Bound", "Verdict")
_GREEN, _AMBER, _RED, _GREY = "#1a7f37", "#9a6700", "#cf222e", "#6e7781"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _working_root() -> Path | None:
    """The course folder around the working folder of a notebook (…/phase1-x/week1-y); None elsewhere."""
    folder = Path.cwd()
    return folder.parents[1] if len(folder.parents) > 1 and (folder / FILE).exists() else None


def _columns(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(1, len(rows[0]))]
    lines: list[str] = []
    for index, (says, *rest) in enumerate(rows):
        wrapped = textwrap.wrap(says, width) or [""]
        cells = "  ".join(cell.ljust(w) for cell, w in zip(rest, widths, strict=True))
        lines.append(f"{wrapped[0].ljust(width)}  {cells}".rstrip())
        lines.extend(wrapped[1:])
        if index == 0:
            lines.append("─" * (width + sum(widths) + 2 * len(widths)))
    return lines


def _html_row(verdict: Verdict, guess: str, bound: str) -> str:
    claim = verdict.claim
    colour = _RED
    if verdict.as_stated:
        colour = {True: _GREEN, False: _AMBER, None: _GREY}[verdict.holds]
    mark = "" if verdict.holds is None else "✓ " if verdict.holds else "✗ "
    values = (claim.says, claim.source, guess, number(verdict.measured), claim.unit, bound)
    cells = "".join(f"<td style='text-align:left'>{html.escape(value)}</td>" for value in values)
    return (
        f"<tr>{cells}<td style='text-align:left;color:{colour};font-weight:600'>"
        f"{mark}{html.escape(verdict.words)}</td></tr>"
    )
