"""Tables, plots and progress bars of the command line. Only rich is imported here."""

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 120  # where the output is no terminal, tables are not squeezed into 80 columns

COLOURS = {
    "passed": "green",
    "ready": "green",
    "failed": "red",
    "error": "red",
    "timeout": "red",
    "memory": "red",
    "failing": "red",
    "too slow": "red",
    "not started": "yellow",
    "planned": "bright_black",
    "never run": "yellow",
}


def stdout() -> Console:
    """The console for results."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def stderr() -> Console:
    """The console for progress."""
    return Console(highlight=False, stderr=True)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the course's look; the columns in `right` are aligned to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    made.header_style = "bold"
    return made


def coloured(status: str, note: str = "") -> Text:
    """A status word in its colour, with a note in parentheses."""
    text = Text(status, style=COLOURS.get(status, ""))
    return text.append(f" ({note})", style="bright_black") if note else text


def duration(seconds: float) -> str:
    """ "8 s", "3 min 20 s", "2 h 5 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def memory(megabytes: float) -> str:
    """ "850 MB", "1.2 GB" (powers of ten)."""
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def plot(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    width: int = 64,
    height: int = 15,
) -> Text:
    """Curves as characters, with numbers on both axes: a marker and a colour each, so that either is enough.

    Args:
        curves: name to (x, y); values that are not finite are left out.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        width: columns of the drawing area.
        height: its lines.

    Raises:
        ValueError: no curve has a finite point.
    """
    points = {name: _finite(*curve) for name, curve in curves.items()}
    everything = [point for found in points.values() for point in found]
    if not everything:
        raise ValueError("nothing to plot: no point is finite")
    x_low, x_high = _ends([x for x, _ in everything])
    y_low, y_high = _ends([y for _, y in everything])
    cells: dict[tuple[int, int], int] = {}
    for index, found in enumerate(points.values()):
        for x, y in _dense(found, width):
            column = round((x - x_low) / (x_high - x_low) * (width - 1))
            row = round((y_high - y) / (y_high - y_low) * (height - 1))
            cells.setdefault((row, column), index)
    labels = {0: y_high, height // 2: (y_high + y_low) / 2, height - 1: y_low}
    return _draw(list(points), cells, labels, (x_low, x_high), x_label, y_label, width, height)


_MARKERS = (("●", "green"), ("×", "red"), ("+", "cyan"))


def _finite(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    limit = 1e300  # beyond it differences overflow
    return [(a, b) for a, b in zip(x, y, strict=True) if abs(a) < limit and abs(b) < limit]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _dense(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """The points, and enough between each two to leave no gap in x."""
    if not points:
        return []
    span = (points[-1][0] - points[0][0]) or 1.0
    dense = [points[0]]
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, round(abs(x1 - x0) / abs(span) * width))
        dense += [(x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps) for k in range(1, steps + 1)]
    return dense


def _draw(
    names: Sequence[str],
    cells: Mapping[tuple[int, int], int],
    labels: Mapping[int, float],
    x_ends: tuple[float, float],
    x_label: str,
    y_label: str,
    width: int,
    height: int,
) -> Text:
    text = Text(f"{y_label}\n", style="bold")
    for row in range(height):
        label = f"{labels[row]:.4g}" if row in labels else ""
        text.append(f"{label:>9} {'┤' if label else '│'}", style="not bold")
        for column in range(width):
            marker, colour = _MARKERS[cells[row, column]] if (row, column) in cells else (" ", "")
            text.append(marker, style=f"not bold {colour}")
        text.append("\n")
    low, high = (f"{end:.4g}" for end in x_ends)
    text.append(f"{'':>9} └{'─' * width}\n", style="not bold")
    text.append(f"{'':>11}{low}{high:>{width - len(low)}}\n", style="not bold")
    text.append(f"{'':>11}{x_label:^{width}}\n", style="not bold")
    for name, (marker, colour) in zip(names, _MARKERS, strict=False):
        text.append(f"{'':>11}{marker} {name}   ", style=f"not bold {colour}")
    return text
