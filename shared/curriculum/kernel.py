"""The process that executes one notebook: `python -m shared.curriculum.kernel REQUEST.json`.

Started by `execution`, it runs papermill with a kernel of its own and leaves three files in its folder:
`events.jsonl` (which cell runs), `output.txt` (what the cells print, as they print it) and, at the end,
`result.json` beside the executed notebook.
"""

import json
import os
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.curriculum import notebooks
from shared.runtime import files

LAST_LINES = 15


def _end_with(runner: int) -> None:
    """Leave nothing running when the runner (a process id) is killed in a way that it cannot notice."""

    def watch() -> None:
        import psutil

        while os.getppid() == runner:
            time.sleep(0.5)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended by itself
                child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _first_line(source: str) -> str:
    lines = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return (lines or [""])[0].strip()


def _numbered(cells: list[Any]) -> dict[int, int]:
    """From a cell's position to its number among the code cells a reader sees, from 1."""
    visible = [
        index
        for index, cell in enumerate(cells)
        if cell["cell_type"] == "code" and cell["source"].strip() and not _injected(cell)
    ]
    return {index: number for number, index in enumerate(visible, start=1)}


def _injected(cell: Any) -> bool:
    return notebooks.INJECTED in cell.get("metadata", {}).get("tags", [])


def running_cell(folder: Path) -> dict[str, Any]:
    """The cell that started last: `cell` and `of` are None before the first one."""
    events = folder / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:  # read while it was being written
            continue
    return {"cell": None, "of": None, "code": ""}


def _failure(folder: Path, message: str, last_lines: list[str]) -> dict[str, Any]:
    """What is known about a failure: the cell that ran last, the message, the last lines."""
    running = running_cell(folder)
    return {
        "cell": running["cell"],
        "code": running["code"],
        "message": message,
        "last_lines": last_lines[-LAST_LINES:],
    }


def interrupted(folder: Path, message: str) -> dict[str, Any]:
    """The failure of a notebook that was ended from outside; the last lines are those it printed."""
    output = folder / "output.txt"
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    return _failure(folder, message, text.splitlines())


def _execute(request: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Run the notebook; None if every cell ran, otherwise the failure."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillException, PapermillExecutionError

    events = (folder / "events.jsonl").open("w", encoding="utf-8", buffering=1)
    cells: list[Any] = []
    numbers: dict[int, int] = {}

    def on_cell_start(cell: Any, cell_index: int) -> None:
        number = numbers.get(cell_index)
        if number is not None:
            event = {"cell": number, "of": len(numbers), "code": _first_line(cell["source"])}
            events.write(json.dumps(event) + "\n")

    def on_notebook_start(notebook: Any) -> None:
        cells.extend(notebook["cells"])
        numbers.update(_numbered(cells))

    with events, (folder / "output.txt").open("w", encoding="utf-8", errors="replace") as output:
        try:
            papermill.execute_notebook(
                request["notebook"],
                str(folder / "executed.ipynb"),
                parameters=request["parameters"],
                kernel_name="python3",
                language="python",
                cwd=request["cwd"],
                progress_bar=False,
                request_save_on_cell_execute=False,
                stdout_file=output,
                stderr_file=output,
                start_timeout=120,
                iopub_timeout=60,
                coalesce_streams=True,
                on_notebook_start=on_notebook_start,
                on_cell_start=on_cell_start,
            )
        except PapermillExecutionError as error:
            return _failure(folder, f"{error.ename}: {error.evalue}", _plain(error.traceback, cells))
        except DeadKernelError:
            return interrupted(folder, "The kernel died (a crash in native code, or killed by the system)")
        except (PapermillException, RuntimeError, OSError) as error:
            return _failure(folder, f"{type(error).__name__}: {error}", [])
    return None


def _plain(traceback: list[str], cells: list[Any]) -> list[str]:
    """The lines of a traceback, without terminal colours and with the cell numbers that a reader sees."""
    code = [cell for cell in cells if cell["cell_type"] == "code" and cell["source"].strip()]
    injected = next((number for number, cell in enumerate(code, start=1) if _injected(cell)), len(code))
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(traceback))
    text = re.sub(r"\bIn\[(\d+)\]", lambda match: f"In[{int(match[1]) - (int(match[1]) > injected)}]", text)
    return [line for line in text.splitlines() if line.strip("-")]


def main() -> None:
    """Execute the notebook of the request file named on the command line."""
    path = Path(sys.argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    _end_with(request["runner"])
    failure = _execute(request, path.parent)
    files.atomic_write(path.parent / "result.json", json.dumps(failure))  # half of one is no result


if __name__ == "__main__":
    main()
