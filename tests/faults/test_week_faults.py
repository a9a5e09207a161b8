"""Checks that are proven able to fail: each fault is planted, and a named check has to see it."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from shared.curriculum import execution, faults, runner, weeks

ROOT = Path(__file__).parents[2]
WEEKS = [
    week for week in weeks.discover() if week.status == weeks.READY or (week.folder / faults.FILE).exists()
]
FAULTS = [(week.slug, fault) for week in WEEKS for fault in faults.load(week.slug)]
BY_TEST = [pytest.param(slug, f, id=f"{slug}/{f.name}") for slug, f in FAULTS if "::" in f.caught_by]
BY_CLAIM = [pytest.param(slug, f, id=f"{slug}/{f.name}") for slug, f in FAULTS if "::" not in f.caught_by]


@pytest.mark.parametrize("slug", [week.slug for week in WEEKS])
def test_a_week_has_at_least_six_faults_and_each_says_something(slug):
    found = faults.load(slug)
    assert len(found) >= 6
    for fault in found:
        assert len(fault.symptom) > 20, f"{fault.name} has no symptom"
        assert len(fault.hint) > 10, f"{fault.name} has no hint"
        assert fault.name.replace("_", " ") not in fault.hint.lower(), f"{fault.name}: the hint gives it away"


@pytest.mark.slow
@pytest.mark.parametrize(("slug", "fault"), BY_TEST)
def test_a_planted_fault_turns_its_test_red(slug, fault, tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "shared.curriculum.fault_plugin", fault.caught_by]
    settings = {"COURSE_FAULT": f"{slug}/{fault.name}", "COURSE_REPORT": str(report), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=600
    )
    records = json.loads(report.read_text()) if report.exists() else []
    assert done.returncode in (0, 1), f"{fault.caught_by} could not be run:\n{done.stdout}{done.stderr}"
    own = [r for r in records if r["test"] == fault.caught_by or r["test"].startswith(f"{fault.caught_by}[")]
    assert own, f"{fault.caught_by} did not run:\n{done.stdout}"
    red = [record for record in own if record["outcome"] == "failed"]
    assert red, f"{fault.caught_by} stays green with {fault.name} planted"
    assert (red[0]["phase"], red[0]["error"]) == ("call", "assertion"), f"not a failed check: {red[0]}"


@pytest.mark.slow
@pytest.mark.parametrize(("slug", "fault"), BY_CLAIM)
def test_a_planted_fault_turns_its_claim_red(slug, fault):
    name = fault.caught_by.removeprefix(faults.CLAIM)
    week = weeks.find(slug)
    claim = next(claim for claim in runner.week_claims(week.notebooks[0], ROOT) if claim.name == name)
    book = weeks.find_notebook(f"{slug}/{claim.notebook}")
    job = execution.Job(book, "cpu", 0, fault=f"{slug}/{fault.name}")
    running = execution.execute([job], parallel=1, cores=2, limits=runner.LIMITS["cpu"])
    with closing(running):
        _, outcome = next(running)
    entry = runner.judge(job, outcome, "cpu", ROOT)
    if outcome.error:  # an assertion in an earlier cell saw it first
        assert outcome.error["message"].startswith("AssertionError"), outcome.error
    held = {found["name"]: found["as_stated"] for found in entry.claims}
    assert not held[name], f"claim {name} holds with {fault.name} planted"


def test_a_fault_that_no_check_sees_would_be_noticed(tmp_path):
    """The control of the tests above: the plugin reports a test that stays green as green."""
    (tmp_path / "test_blind.py").write_text("def test_sees_nothing():\n    assert True\n")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "shared.curriculum.fault_plugin", "test_blind.py"],
        cwd=tmp_path,
        env={**os.environ, "COURSE_REPORT": str(report)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [record for record in json.loads(report.read_text()) if record["phase"] == "call"]
    wanted = {"test": "test_blind.py::test_sees_nothing", "outcome": "passed", "error": None}
    assert [record | {"phase": None} for record in calls] == [wanted | {"phase": None}]
