"""The README tells the truth about what is here."""

import re

from shared.curriculum import weeks
from shared.runtime.files import repository_root

ROOT = repository_root()
README = (ROOT / "README.md").read_text(encoding="utf-8")


def week_row(week: weeks.Week) -> str:
    """The row of the README's table that a week should have."""
    title = week.title
    if week.status == "ready":
        title = f"[{title}]({week.folder.relative_to(ROOT)}/)"
    return f"| {week.label} | {title} | {week.question} | {week.status} |"


def test_the_table_of_weeks_is_that_of_course_list():
    for week in weeks.discover():
        assert week_row(week) in README


def test_every_file_and_folder_that_the_readme_names_is_there():
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"`((?:shared|configs|docs|tests|phase\d-[a-z]+)(?:/[\w.-]+)*/?)`", README)
    missing = [path for path in linked + named if "://" not in path and not (ROOT / path).exists()]
    assert not missing


def test_the_commands_of_the_readme_exist():
    import click
    from typer.main import get_command

    from shared.cli import app

    group = get_command(app)
    known = set(group.list_commands(click.Context(group)))
    used = set(re.findall(r"^course (\w+)", README, flags=re.MULTILINE))
    assert used
    assert used <= known
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target} is not a target"


def test_the_configurations_of_the_readme_exist():
    for path in re.findall(r"configs/[\w/.-]+\.yaml", README):
        assert (ROOT / path).exists(), f"{path} is not there"
