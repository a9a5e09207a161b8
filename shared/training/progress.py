"""One progress line for a training run: a bar in a terminal, one line that is rewritten in a notebook."""

import sys
import time
from typing import Any


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def duration(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


class Progress:
    """Shows step, loss and the time left, at most twice a second, on stderr or in the notebook's output.

    Where stderr is neither (a log file), one line a minute. Use as a context manager.
    """

    def __init__(self, total: int, start: int, enabled: bool) -> None:
        self.total, self.first, self.enabled = total, start, enabled
        self.began = self.shown = time.perf_counter()
        self.notebook, self.terminal = _in_notebook(), sys.stderr.isatty()
        self.interval = 0.5 if self.notebook or self.terminal else 60.0
        self.display: Any = None

    def __enter__(self) -> "Progress":
        return self

    def update(self, step: int, loss: float, validation: float | None) -> None:
        """Show `step` updates made, if it is time to."""
        now = time.perf_counter()
        if self.enabled and now - self.shown >= self.interval:
            self.shown = now
            self._show(self._line(step, loss, validation, now))

    def note(self, line: str) -> None:
        """Leave a line of its own on stderr, above the progress line."""
        if self.enabled:
            sys.stderr.write("\r\x1b[2K" * self.terminal + line + "\n")
            sys.stderr.flush()

    def finish(self, step: int, loss: float, validation: float | None) -> None:
        """Leave one line behind that says what came out."""
        if self.enabled:
            took = time.perf_counter() - self.began
            line = f"{step:,} steps in {duration(took)}, {_losses(loss, validation)}"
            self._show(line, last=True)

    def _line(self, step: int, loss: float, validation: float | None, now: float) -> str:
        done = step / self.total
        left = (now - self.began) / max(1, step - self.first) * (self.total - step)
        filled = int(24 * done)
        bar = "━" * filled + "─" * (24 - filled)
        losses = _losses(loss, validation)
        return f"{bar} {step:,}/{self.total:,} steps, {losses}, {duration(left)} left"

    def _show(self, line: str, last: bool = False) -> None:
        if self.notebook:
            self._show_in_notebook(line)
        elif self.terminal:
            sys.stderr.write(f"\r\x1b[2K{line}" + "\n" * last)
            sys.stderr.flush()
        else:
            print(line, file=sys.stderr, flush=True)

    def _show_in_notebook(self, line: str) -> None:
        from IPython.display import display

        content = {"text/plain": line}
        if self.display is None:
            self.display = display(content, raw=True, display_id=True)
        else:
            self.display.update(content, raw=True)

    def __exit__(self, *error: object) -> None:
        if self.enabled and self.terminal and error[0] is not None:
            sys.stderr.write("\n")


def _losses(loss: float, validation: float | None) -> str:
    return f"loss {loss:.3f}" + (f", validation {validation:.3f}" if validation is not None else "")
