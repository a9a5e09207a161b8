"""The plan of the weeks, and what a reader's names mean."""

import pytest
from course_root import WEEK, add_notebook

from shared.curriculum import weeks
from shared.runtime.errors import CourseError


@pytest.fixture
def root(tmp_path):
    add_notebook(tmp_path, "01_attention_mechanisms", "1")
    add_notebook(tmp_path, "02_annotated_transformer", "1")
    return tmp_path


def test_the_plan_holds_twenty_weeks_in_order(root):
    numbers = [number for week in weeks.discover(root) for number in week.numbers]
    assert numbers == list(range(1, 21))


def test_a_week_is_ready_when_its_folder_holds_notebooks(root):
    ready = [week.slug for week in weeks.discover(root) if week.status == weeks.READY]
    assert ready == ["week1"]


def test_adding_a_folder_adds_a_week(root):
    folder = root / "phase1-fundamentals" / "week3-bert"
    folder.mkdir()
    (folder / "01_tokenizer_experiments.ipynb").write_text("{}")
    week = weeks.find("3", root)
    assert week.status == weeks.READY
    assert [notebook.key for notebook in week.notebooks] == ["week3/01_tokenizer_experiments"]


def test_a_misspelt_week_folder_is_reported(root):
    folder = root / "phase1-fundamentals" / "week3-brt"
    folder.mkdir()
    (folder / "01_x.ipynb").write_text("{}")
    with pytest.raises(CourseError, match="week3-brt holds notebooks but is not in the plan"):
        weeks.discover(root)


@pytest.mark.parametrize("name", ["1", "week1", "week01", "Week1", "week1/", "week1-attention", WEEK])
def test_a_week_can_be_named_in_several_ways(root, name):
    assert weeks.find(name, root).slug == "week1"


@pytest.mark.parametrize("name", ["17", "week18", "17-18", "17–18", "week17-18"])
def test_two_weeks_that_share_a_folder_answer_to_both_numbers(root, name):
    assert weeks.find(name, root).slug == "week17-18"


@pytest.mark.parametrize("name", ["0", "21", "99", "", "week", "1x", "../week1"])
def test_an_unknown_week_is_refused_with_those_there_are(root, name):
    with pytest.raises(CourseError, match=r"There is no week .*; the course has week1 to week19-20\."):
        weeks.find(name, root)


def test_a_planned_week_cannot_be_selected(root):
    with pytest.raises(CourseError, match="week4 is planned and not written yet; ready: week1"):
        weeks.select(["week4"], root)


def test_no_names_select_everything_that_is_ready(root):
    assert [notebook.name for notebook in weeks.select([], root)] == [
        "01_attention_mechanisms",
        "02_annotated_transformer",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "week1/02_annotated_transformer",
        "1/02",
        "week1/02_annotated_transformer.ipynb",
        f"{WEEK}/02_annotated_transformer.ipynb",
    ],
)
def test_a_notebook_can_be_named_in_several_ways(root, name):
    assert [notebook.key for notebook in weeks.select([name], root)] == ["week1/02_annotated_transformer"]


def test_selected_notebooks_come_once_and_in_course_order(root):
    chosen = weeks.select(["1/02", "week1", "1/01"], root)
    assert [notebook.name[:2] for notebook in chosen] == ["01", "02"]


def test_an_unknown_notebook_is_refused_with_those_there_are(root):
    with pytest.raises(CourseError, match=r"no notebook '03' in week1; it has 01_attention_mechanisms, 02_"):
        weeks.select(["week1/03"], root)


def test_an_ambiguous_notebook_is_refused(root):
    with pytest.raises(CourseError, match="Several notebooks start with '0'"):
        weeks.select(["week1/0"], root)


def test_a_course_without_any_notebook_is_said(tmp_path):
    with pytest.raises(CourseError, match="No week is ready"):
        weeks.select([], tmp_path)


def test_a_week_file_that_does_not_load_names_file_and_line(tmp_path):
    path = tmp_path / "week1-attention" / "faults.py"
    path.parent.mkdir()
    path.write_text("x = 1\ny = missing\n")
    with pytest.raises(
        CourseError, match=r"week1-attention/faults.py does not load: NameError: .* \(line 2\)"
    ):
        weeks.import_file(path, "some_faults")
    path.write_text("x = 1\ndef y(:\n")
    with pytest.raises(CourseError, match=r"faults.py does not load: SyntaxError: [^(]*\(line 2\)\.$"):
        weeks.import_file(path, "some_faults")
