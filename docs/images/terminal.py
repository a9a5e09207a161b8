"""Draws what a command prints in a terminal, as an SVG picture for the README.

python docs/images/terminal.py docs/images/course-run.svg course run
"""

import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 84  # columns
SHOW_CURSOR = "\x1b[?25h"


def output_of(command: list[str]) -> str:
    """What `command` writes to a terminal of `WIDTH` columns, colours included."""
    os.environ |= {"COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    written = bytearray()

    def read(descriptor: int) -> bytes:
        chunk = os.read(descriptor, 4096)
        written.extend(chunk)
        return chunk

    pty.spawn(command, read)
    text = written.decode().replace("\r\n", "\n")
    last = text.rsplit(SHOW_CURSOR, 1)[-1]  # a progress display hides the cursor until it is wiped away
    return re.sub(r"\x1b\[\d*[AK]|\r", "", last)


def picture(text: str, title: str) -> str:
    """SVG of `text`, without the font that Rich would have the browser fetch."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text.from_ansi(text.strip("\n")))
    svg = console.export_svg(title=title)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "Menlo, Consolas, DejaVu Sans Mono, monospace")


if __name__ == "__main__":
    target, *command = sys.argv[1:]
    Path(target).write_text(picture(output_of(command), " ".join(command)), encoding="utf-8")
