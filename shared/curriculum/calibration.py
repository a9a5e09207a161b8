"""How far a claim's measurement moves with the seed: run, and write it beside the bound in `claims.yaml`."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.curriculum import claims
from shared.curriculum.claims import Calibration, Claim
from shared.runtime import files
from shared.runtime.errors import CourseError


@dataclass(frozen=True)
class Spread:
    """One claim's measurements, seed by seed (None: not measured), at one scale."""

    claim: Claim
    scale: str
    measured: tuple[float | None, ...]
    on: str

    @property
    def complete(self) -> bool:
        """Every seed gave a measurement."""
        return None not in self.measured

    @property
    def disagreeing(self) -> list[int]:
        """The seeds at which the claim did not come out as stated."""
        verdicts = [self.claim.judge(value, self.scale) for value in self.measured]
        return [seed for seed, verdict in enumerate(verdicts) if not verdict.as_stated]

    def calibration(self) -> Calibration:
        """Mean, sample standard deviation and ends of the measurements.

        Raises:
            CourseError: a seed gave none.
        """
        values = [value for value in self.measured if value is not None]
        if not self.complete:
            raise CourseError(f"Claim {self.claim.name!r} was not measured with every seed.")
        return Calibration(
            seeds=len(values),
            mean=statistics.fmean(values),
            sd=statistics.stdev(values),
            min=min(values),
            max=max(values),
            on=self.on,
        )


def machine(scale: str, cores: int) -> str:
    """What `calibrated.on` says of this machine: "2 cores, torch 2.13.0", or "gpu scale, torch 2.13.0"."""
    from importlib import metadata

    version = metadata.version("torch").partition("+")[0]
    where = f"{cores} core{'s' * (cores > 1)}" if scale == "cpu" else f"{scale} scale"
    return f"{where}, torch {version}"


def spreads(
    stated: Sequence[Claim], measured: Mapping[int, Mapping[str, float | None]], scale: str, on: str
) -> list[Spread]:
    """The spread of each claim over `measured`, which maps a seed to its measurements by claim."""
    return [
        Spread(claim, scale, tuple(measured[seed].get(claim.name) for seed in sorted(measured)), on)
        for claim in stated
    ]


def write(folder: Path, found: Sequence[Spread]) -> None:
    """Put the spreads into `claims.yaml`: each claim's `calibrated` line is set, and nothing else is touched.

    Raises:
        CourseError: the file cannot be written, or is laid out so that a line cannot be placed safely.
    """
    path = folder / claims.FILE
    text = new = files.read_text(path)
    before = claims.parse(text, folder)
    for spread in found:
        if spread.complete:
            new = _with_calibration(new, spread)
    try:
        after = claims.parse(new, folder)
    except CourseError:
        after = ()
    if [_without_calibration(claim) for claim in after] != [_without_calibration(claim) for claim in before]:
        raise CourseError(
            f"{folder.name}/{claims.FILE} is laid out so that it cannot be edited safely; start each claim "
            "with '- name: …' and give each key its own line."
        )
    if new != text:
        files.atomic_write(path, new)


def _without_calibration(claim: Claim) -> Claim:
    return replace(claim, calibrated=None)


def _with_calibration(text: str, spread: Spread) -> str:
    """`text` with the claim's `calibrated` replaced, or added after its last key."""
    lines = text.splitlines(keepends=True)
    start, end = _block(lines, spread.claim.name)
    indent = " " * (len(lines[start]) - len(lines[start].lstrip()) + 2)
    line = f"{indent}calibrated: {_flow(spread.calibration())}\n"
    for index in range(start, end):
        if re.match(rf"{indent}calibrated\s*:", lines[index]):
            last = index + 1
            while last < end and re.match(rf"{indent}\s+\S", lines[last]):  # an entry over several lines
                last += 1
            return "".join([*lines[:index], line, *lines[last:]])
    while end > start and not _is_content(lines[end - 1]):
        end -= 1
    if not lines[end - 1].endswith("\n"):
        lines[end - 1] += "\n"
    return "".join([*lines[:end], line, *lines[end:]])


def _block(lines: Sequence[str], name: str) -> tuple[int, int]:
    """First line of the claim `name`, and the line after its last."""
    starts = [index for index, line in enumerate(lines) if re.match(r"\s*- ", line)]
    for index in starts:
        if re.match(rf"\s*-\s+name:\s*['\"]?{re.escape(name)}['\"]?\s*(#.*)?$", lines[index]):
            margin = len(lines[index]) - len(lines[index].lstrip())
            later = [
                other
                for other in starts
                if other > index and len(lines[other]) - len(lines[other].lstrip()) <= margin
            ]
            return index, later[0] if later else len(lines)
    raise CourseError(
        f"In {claims.FILE}, claim {name!r} does not start with '- name: {name}'; put its name first."
    )


def _is_content(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _flow(calibration: Calibration) -> str:
    numbers = ", ".join(
        f"{key}: {_yaml_number(getattr(calibration, key))}" for key in ("mean", "sd", "min", "max")
    )
    return f'{{seeds: {calibration.seeds}, {numbers}, on: "{calibration.on}"}}'


def _yaml_number(value: float) -> str:
    """Six significant digits, written so that YAML reads a number (1.0e-05, not 1e-05)."""
    text = f"{value:.6g}"
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text if "." in text or "e" in text else f"{text}.0"
