"""Writing a claim's spread into `claims.yaml` without touching the rest."""

import pytest

from shared.curriculum import calibration, claims
from shared.runtime.errors import CourseError

FILE = """\
# What the week shows.

- name: first   # its name
  says: One.
  source: ours
  notebook: 01_a
  unit: fraction
  bounds:
    cpu: {min: 0.5}
  null: 0.0

# The second.
- name: second
  says: Two.
  source: ours
  notebook: 01_a
  unit: fraction
  calibrated: {seeds: 2, mean: 1.0, sd: 0.0,
    min: 1.0, max: 1.0, on: "elsewhere"}
  bounds: {cpu: {max: 1.5}}
  null: 2.0"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / claims.FILE).write_text(FILE)
    return tmp_path


def calibrate(folder, **measured):
    stated = [claim for claim in claims.load(folder) if claim.name in measured]
    by_seed = {
        seed: {name: values[seed] for name, values in measured.items()}
        for seed in range(len(next(iter(measured.values()))))
    }
    found = calibration.spreads(stated, by_seed, "cpu", "2 cores, torch 2.13.0")
    calibration.write(folder, found)
    return found


@pytest.mark.parametrize(
    ("scale", "cores", "start"), [("cpu", 1, "1 core, "), ("cpu", 2, "2 cores, "), ("gpu", 16, "gpu scale, ")]
)
def test_a_spread_names_where_it_was_measured(scale, cores, start):
    assert calibration.machine(scale, cores).startswith(f"{start}torch 2")


def test_a_spread_is_added_after_the_claims_last_key(folder):
    calibrate(folder, first=[0.6, 0.7, 0.8])
    line = '  calibrated: {seeds: 3, mean: 0.7, sd: 0.1, min: 0.6, max: 0.8, on: "2 cores, torch 2.13.0"}\n'
    assert (folder / claims.FILE).read_text() == FILE.replace("  null: 0.0\n", f"  null: 0.0\n{line}")


def test_an_old_spread_is_replaced_even_over_several_lines(folder):
    calibrate(folder, second=[1.0, 1.25])
    old = FILE[FILE.index("  calibrated") : FILE.index("  bounds: {cpu: {max")]
    numbers = "mean: 1.125, sd: 0.176777, min: 1.0, max: 1.25"
    line = f'  calibrated: {{seeds: 2, {numbers}, on: "2 cores, torch 2.13.0"}}\n'
    assert (folder / claims.FILE).read_text() == FILE.replace(old, line)


def test_writing_again_changes_nothing(folder):
    calibrate(folder, first=[0.6, 0.7], second=[1.0, 1.25])
    once = (folder / claims.FILE).read_text()
    calibrate(folder, first=[0.6, 0.7], second=[1.0, 1.25])
    assert (folder / claims.FILE).read_text() == once
    assert [claim.calibrated.seeds for claim in claims.load(folder)] == [2, 2]


def test_tiny_numbers_are_written_as_yaml_reads_numbers(folder):
    calibrate(folder, second=[1e-7, 3e-7])
    assert claims.load(folder)[1].calibrated.mean == pytest.approx(2e-7, rel=1e-9)


def test_a_claim_that_a_seed_did_not_measure_keeps_its_old_spread(folder):
    found = calibrate(folder, second=[1.0, None])
    assert (folder / claims.FILE).read_text() == FILE
    assert found[0].disagreeing == [1]


def test_seeds_that_break_the_bound_are_named(folder):
    assert calibrate(folder, first=[0.6, 0.4, 0.7, 0.1])[0].disagreeing == [1, 3]


def test_a_file_whose_other_lines_would_change_is_never_touched(folder, monkeypatch):
    text = FILE.replace("  says: One.\n", "  says: |\n    - name: second\n    means nothing.\n")
    (folder / claims.FILE).write_text(text)
    monkeypatch.setattr(calibration.files, "atomic_write", None)  # not even to put it right afterwards
    with pytest.raises(CourseError, match="cannot be edited safely"):
        calibrate(folder, second=[1.0, 1.25])
    assert (folder / claims.FILE).read_text() == text


def test_a_layout_that_cannot_be_edited_safely_is_refused_and_kept(folder):
    text = FILE.replace("- name: first   # its name\n  says: One.", "- says: One.\n  name: first")
    (folder / claims.FILE).write_text(text)
    with pytest.raises(CourseError, match="put its name first"):
        calibrate(folder, first=[0.6, 0.7])
    assert (folder / claims.FILE).read_text() == text
