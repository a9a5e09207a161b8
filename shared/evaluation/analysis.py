"""From numbers to statements: fitted exponents, spreads, paired differences; the course's figures and tables.

Every figure of the course is made by `figure`, so that all look alike and stay under 60 kB, and has its
numbers below it by `table`, so that the lesson reads without pictures too.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 80


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient · x^exponent, fitted on logarithms.

    Attributes:
        exponent: the slope of log y against log x.
        low, high: confidence interval of the exponent.
        coefficient: y at x = 1.
        r_squared: share of the variance of log y that the line explains.
    """

    exponent: float
    low: float
    high: float
    coefficient: float
    r_squared: float

    def __call__(self, x: float | np.ndarray) -> float | np.ndarray:
        """The fitted y at x."""
        return self.coefficient * np.asarray(x, dtype=float) ** self.exponent


def _student_t(confidence: float, degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, degrees))


def fit_exponent(x: Sequence[float], y: Sequence[float], *, confidence: float = 0.95) -> PowerLaw:
    """Fit y ∝ x^a by ordinary least squares on logarithms, with Student's interval for a.

    The interval takes the residuals of log y to be independent and of one size. It says how well the points
    lie on a line, not whether the law holds beyond them.

    Args:
        x, y: at least three positive pairs, x of at least two values.
        confidence: coverage of the interval.

    Raises:
        ValueError: fewer than three pairs, a value that is not positive, or all x equal.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise ValueError(f"a fit needs three or more pairs, not shapes {x.shape} and {y.shape}")
    if not ((x > 0).all() and (y > 0).all()):  # also false for NaN
        raise ValueError("a power law is fitted to positive numbers only")
    u, v = np.log(x), np.log(y)
    spread = float(((u - u.mean()) ** 2).sum())
    if spread == 0:
        raise ValueError("all x are equal: no exponent can be fitted")
    slope = float(((u - u.mean()) * (v - v.mean())).sum()) / spread
    intercept = float(v.mean() - slope * u.mean())
    residual = float(((v - intercept - slope * u) ** 2).sum())
    half = _student_t(confidence, len(x) - 2) * math.sqrt(residual / (len(x) - 2) / spread)
    total = float(((v - v.mean()) ** 2).sum())
    r_squared = 1 - residual / total if total > 0 else 1.0
    return PowerLaw(slope, slope - half, slope + half, math.exp(intercept), r_squared)


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (n − 1) and number of values; prints as "1.520 ± 0.012 (n = 5)"."""

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        # Two significant digits of the spread say how many digits of the mean mean anything.
        decimals = max(0, 1 - math.floor(math.log10(self.sd))) if self.sd > 0 else 4
        return f"{self.mean:.{decimals}f} ± {self.sd:.{decimals}f} (n = {self.n})"


def mean_sd(values: Sequence[float]) -> Spread:
    """Mean ± standard deviation of repeated measurements, such as one loss a seed.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, dtype=float)
    if values.size == 0:
        raise ValueError("there is nothing to average")
    sd = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return Spread(float(values.mean()), sd, values.size)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences a − b, with its bootstrap confidence interval.

    Attributes:
        mean: in the unit of what was measured.
        low, high: bounds of the interval.
        n: number of pairs.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def significant(self) -> bool:
        """The interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Is a different from b, measured on the same items (seeds, documents, sentences)?

    Percentile bootstrap over pairs (Efron and Tibshirani 1993, chapter 13). With fewer than some ten pairs
    the interval is too narrow: show the pairs as well.

    Args:
        a, b: as many measurements, item by item.
        confidence: coverage of the interval.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two pairs, or different lengths.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"a paired comparison needs two or more pairs, not shapes {a.shape} and {b.shape}")
    difference = a - b
    rng = np.random.default_rng(seed)
    # One resample at a time: a long list of documents times 10,000 would not fit in memory.
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Difference(float(difference.mean()), float(low), float(high), len(difference))


# What is read when axes are made; `figure` leaves the reader's own settings as they are.
STYLE = {
    "figure.dpi": DPI,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    # Okabe and Ito's palette, told apart by colour-blind readers too.
    "axes.prop_cycle": "cycler(color=['0072B2', 'D55E00', '009E73', 'CC79A7', 'E69F00', '56B4E9', '000000'])",
}


def figure(
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] | None = None,
) -> "tuple[Figure, Any]":
    """An empty figure in the course's style.

    Args:
        title: what it shows.
        xlabel, ylabel: what the axes are, with units: "loss (nats per token)".
        rows, columns: a grid of axes that share both labels; one by default.
        size: width and height in inches, 80 pixels each.

    Returns:
        The figure and its axes (one, or an array of rows × columns, flattened).
    """
    import matplotlib.pyplot as plt

    # A notebook's backend turns interactive mode on when it is loaded. Loaded inside the context, that would
    # be undone on leaving it, and every figure after the first would not be shown.
    if not plt.isinteractive() and not plt.get_fignums():
        plt.switch_backend(plt.get_backend())
    with plt.rc_context(STYLE):
        shape = size or (max(6.4, 3.0 * columns), 3.8 if rows == 1 else 2.6 * rows)
        made, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False)
        axes = axes.ravel()
        if len(axes) == 1:
            axes[0].set(xlabel=xlabel, ylabel=ylabel)
            axes[0].set_title(title)
            return made, axes[0]
        made.suptitle(title, fontsize=11, fontweight="bold")
        made.supxlabel(xlabel, fontsize=10)
        made.supylabel(ylabel, fontsize=10)
        return made, axes


def attention_map(
    ax: "Axes",
    weights: np.ndarray,
    *,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draw one head's attention: a row a query, a column a key, darker where the weight is higher.

    Args:
        ax: where to draw.
        weights: (Tq, Tk) in 0 … 1, an array or a tensor; rows sum to one.
        queries, keys: labels of rows and columns, Tq and Tk of them.
        title: usually the head's number.

    Raises:
        ValueError: `weights` is not a matrix, or the labels are not as many as its rows or columns.
    """
    weights = np.asarray(weights, dtype=float)
    if weights.ndim != 2:
        raise ValueError(f"an attention map is a matrix (queries, keys), not {weights.shape}")
    ax.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.grid(False)
    if title:
        ax.set_title(title)
    for axis, labels, count in ((ax.yaxis, queries, weights.shape[0]), (ax.xaxis, keys, weights.shape[1])):
        if labels is None:
            continue
        if len(labels) != count:
            raise ValueError(f"{len(labels)} labels for {count} positions")
        axis.set_ticks(range(count), [_visible(label) for label in labels], fontsize=8)
    if keys is not None and max(map(len, keys), default=0) > 2:
        ax.tick_params(axis="x", labelrotation=90)


def _visible(token: str) -> str:
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")


def _cell(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


class Table:
    """A small table that a notebook shows as HTML, and everything else as aligned text."""

    def __init__(self, rows: Sequence[Sequence[object]], columns: Sequence[str]):
        self.columns = [str(column) for column in columns]
        self.rows = [[_cell(value) for value in row] for row in rows]
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"every row needs {len(self.columns)} cells: {', '.join(self.columns)}")
        self._right = [
            bool(rows) and all(isinstance(row[i], int | float | np.number) for row in rows)
            for i in range(len(self.columns))
        ]

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        aligned = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, self._right, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([aligned[0], "  ".join("─" * width for width in widths), *aligned[1:]])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            styles = ["right" if right else "left" for right in self._right]
            return "".join(
                f'<{tag} style="text-align:{style}">{html.escape(cell)}</{tag}>'
                for cell, style in zip(cells, styles, strict=True)
            )

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        return f"<table><thead><tr>{line(self.columns, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> Table:
    """A table of numbers to stand under a figure: the last expression of a notebook's cell, or `print` it.

    Args:
        rows: one sequence of cells a row; floats are shown with four significant digits, whole numbers with
            thousands separators.
        columns: their headings, with units.

    Raises:
        ValueError: a row of another length than `columns`.
    """
    return Table(rows, columns)
