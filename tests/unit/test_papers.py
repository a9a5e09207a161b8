"""The notes on papers say which line of `shared` computes which equation; here the line is looked up."""

import re
from pathlib import Path

import pytest

from shared.runtime import files

ROOT = files.repository_root()
NOTES = sorted((ROOT / "docs" / "papers").glob("*.md"))
ROW = re.compile(r"^\|.*`(?P<path>shared/[\w/]+\.py)`.*\|$")
CODE = re.compile(r"(`+)(?P<code>.+?)\1")
LINK = re.compile(r"\]\((?!https?://)(?P<target>[^)#]+)(?:#[^)]*)?\)")


def quotes(note: str) -> list[tuple[str, list[str]]]:
    """Each table row that names a file of `shared`: the file, and the code quoted in the row's last cell."""
    found = []
    for line in note.splitlines():
        if match := ROW.match(line.strip()):
            last = re.split(r"(?<!\\)\|", line.strip().strip("|"))[-1]
            found.append((match["path"], [code["code"].replace(r"\|", "|") for code in CODE.finditer(last)]))
    return found


def one_line(code: str) -> str:
    return " ".join(code.split())


def missing(note: str, root: Path = ROOT) -> list[str]:
    """What a note quotes and the code does not hold, each as one line."""
    problems = []
    for path, fragments in quotes(note):
        source = root / path
        if not source.exists():
            problems.append(f"{path} does not exist")
            continue
        text = one_line(source.read_text(encoding="utf-8"))
        if not fragments:
            problems.append(f"a row names {path} and quotes no code of it in its last cell")
        problems += [f"{path} does not hold: {code}" for code in fragments if one_line(code) not in text]
    return problems


def test_there_is_a_note_for_each_paper_of_the_first_two_weeks():
    assert len(NOTES) >= 10


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.stem)
def test_every_quoted_line_is_in_the_file_that_it_is_quoted_from(path):
    note = path.read_text(encoding="utf-8")
    assert len(quotes(note)) >= 2, "the note maps fewer than two equations to code"
    assert missing(note) == []


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.stem)
def test_every_link_of_a_note_leads_somewhere(path):
    targets = [match["target"] for match in LINK.finditer(path.read_text(encoding="utf-8"))]
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.stem)
def test_every_note_is_on_the_reading_list_of_a_week(path):
    lists = [readme.read_text(encoding="utf-8") for readme in ROOT.glob("phase*/*/README.md")]
    assert any(f"docs/papers/{path.name}" in text for text in lists)


def test_a_line_that_is_not_there_and_a_file_that_is_not_there_are_seen(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "x.py").write_text("a = b | c\nd = (\n    e\n)\n", encoding="utf-8")
    note = """
| (1) | `shared/x.py` | `a = b \\| c` |
| (2) | `shared/x.py` | `d = ( e )` |
| (3) | `shared/x.py` | `a = b + c` |
| (4) | `shared/y.py` | `a` |
| (5) | `shared/x.py` | see there |
"""
    assert missing(note, tmp_path) == [
        "shared/x.py does not hold: a = b + c",
        "shared/y.py does not exist",
        "a row names shared/x.py and quotes no code of it in its last cell",
    ]
