"""How soon `course --help` and `course list` answer, in a fresh process each time."""

import statistics
import subprocess
import sys
import time
from typing import Any

COMMANDS = {"course --help": ["--help"], "course list": ["list"]}


def run(quick: bool = False, rounds: int = 11) -> dict[str, Any]:
    """Seconds from start to end of each command; median and slowest, beside Python's own start.

    Args:
        quick: three rounds.
        rounds: runs of each command, in turn.

    Returns:
        One row a command.
    """
    commands = {"python -c pass": [sys.executable, "-c", "pass"]}
    commands |= {name: [sys.executable, "-m", "shared", *words] for name, words in COMMANDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range((3 if quick else rounds) + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if turn:  # the first fills the page cache
                seconds[name].append(time.perf_counter() - began)
    return {"commands": [_row(name, times) for name, times in seconds.items()]}


def _row(name: str, times: list[float]) -> dict[str, Any]:
    return {
        "command": name,
        "median_seconds": round(statistics.median(times), 3),
        "slowest_seconds": round(max(times), 3),
    }
