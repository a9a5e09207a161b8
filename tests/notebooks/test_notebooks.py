"""Notebooks, claims and devlogs as they stand in the repository: executed, in order, and in agreement."""

import pytest

from shared.curriculum import claims, devlogs, notebooks, weeks
from shared.runtime import files

READY = [week for week in weeks.discover() if week.status == weeks.READY]
WEEKS = [week.slug for week in READY]
NOTEBOOKS = [pytest.param(book, id=book.key) for week in READY for book in week.notebooks]


@pytest.mark.parametrize("book", NOTEBOOKS)
def test_a_committed_notebook_was_executed_from_the_code_it_holds(book):
    notebook = notebooks.read(book.path)
    assert notebooks.problems(notebook) == []
    course = notebook["metadata"]["course"]
    assert (course["scale"], course["seed"]) == ("cpu", 0)
    assert str(files.repository_root()) not in book.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("book", NOTEBOOKS)
def test_a_notebook_shows_the_claims_it_makes(book):
    notebook = notebooks.read(book.path)
    stated = {claim.name for claim in claims.load(book.path.parent) if claim.notebook == book.name}
    assert stated, f"{book.key} claims nothing"
    assert set(notebooks.measured(notebook)) == stated
    record = notebooks.claims_record(notebook)
    assert (record["week"], record["notebook"]) == (book.week, book.name)


@pytest.mark.parametrize("book", NOTEBOOKS)
def test_a_notebook_is_within_its_budget(book):
    course = notebooks.read(book.path)["metadata"]["course"]
    assert course["seconds"] <= 90
    assert course["peak_rss_mb"] <= 4000


@pytest.mark.parametrize("slug", WEEKS)
def test_what_the_committed_notebooks_measured_agrees_with_their_claims(slug):
    for verdict in devlogs.verdicts(slug):
        assert verdict.as_stated, f"{verdict.claim.name}: {verdict.words} ({verdict.measured})"


@pytest.mark.parametrize("slug", WEEKS)
def test_every_claim_is_calibrated_over_five_seeds_and_none_disagreed(slug):
    for claim in claims.load(weeks.find(slug).folder):
        assert claim.calibrated is not None, f"{claim.name}: run `course calibrate {slug}`"
        assert claim.calibrated.seeds >= 5, claim.name
        ends = (claim.calibrated.min, claim.calibrated.max)
        assert all(claim.judge(end, "cpu").as_stated for end in ends), f"{claim.name}: {ends}"


@pytest.mark.parametrize("slug", WEEKS)
def test_a_ready_week_has_everything_that_a_week_has(slug):
    week = weeks.find(slug)
    for name in (
        "README.md",
        "claims.yaml",
        "faults.py",
        "exercises.py",
        "solutions.py",
        "test_exercises.py",
    ):
        assert (week.folder / name).exists(), f"{slug} lacks {name}"
    assert devlogs.template_of(week).exists(), f"{slug} lacks the template of its devlog"


@pytest.mark.parametrize("template", [pytest.param(path, id=path.name) for path in devlogs.templates()])
def test_a_committed_devlog_says_what_the_committed_notebooks_say(template):
    log = devlogs.log_path(template)
    assert log.exists(), f"run `course devlog` to write {log.name}"
    assert log.read_text(encoding="utf-8") == devlogs.render(template)


def test_there_is_something_to_test():
    """Without a ready week every test above would be skipped, and the suite green."""
    assert {"week1", "week2"} <= set(WEEKS)
