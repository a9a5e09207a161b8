"""What the commands read from standard input and write to standard output for programs."""

import json
import math
import sys

from shared.runtime.errors import CourseError


def print_json(value: object) -> None:
    """Print `value` as JSON that any parser takes: numbers that are not finite are null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_argument(text: str) -> str:
    """`text`, or all of standard input where it is "-".

    Raises:
        CourseError: standard input is not UTF-8.
    """
    if text != "-":
        return text
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CourseError(f"Standard input is not UTF-8 at byte {error.start}; convert it first.") from error
