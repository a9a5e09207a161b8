"""Devlogs: every number from the notebooks' outputs."""

import base64
import json

import pytest
from course_root import CLAIM, WEEK, code, notebook

from shared.curriculum import devlogs
from shared.curriculum.claims import Claims
from shared.runtime import files
from shared.runtime.errors import CourseError

PIXELS = b"\x89PNG and so on"
FRONT = "---\nline: It is {{claim:week1.good}}.\nfigure: week1/01_good, A curve\n---\n"


@pytest.fixture
def root(tmp_path):
    """A course whose one notebook carries a measurement of 0.75 in its output."""
    folder = tmp_path / WEEK
    folder.mkdir(parents=True)
    (folder / "claims.yaml").write_text(CLAIM.format(claim="good", name="01_good"))
    claims = Claims("week1", "01_good", scale="cpu", root=tmp_path)
    claims.measure("good", 0.75)
    cell = code("claims.show()")
    data = {"application/vnd.course.claims+json": claims.record(), "text/plain": "a table"}
    cell["outputs"] = [{"output_type": "display_data", "data": data, "metadata": {}}]
    figure = code('figure("A curve", "x", "y");')
    png = base64.b64encode(PIXELS).decode()
    figure["outputs"] = [{"output_type": "display_data", "data": {"image/png": png}, "metadata": {}}]
    made = notebook(figure, cell)
    made["metadata"]["course"] = {"seconds": 12.34, "peak_rss_mb": 456.7}
    (folder / "01_good.ipynb").write_text(json.dumps(made))
    (tmp_path / devlogs.FOLDER).mkdir(parents=True)
    return tmp_path


def render(root, text):
    template = root / devlogs.FOLDER / "week-01.template.md"
    template.write_text(text, encoding="utf-8")
    rendered = devlogs.render(template, root)
    note, _, rest = rendered.partition("\n")
    assert "week-01.template.md" in note
    return rest


@pytest.mark.parametrize(
    ("placeholder", "shown"),
    [
        ("{{claim:week1.good}}", "0.75"),
        ("{{claim:week1.good|.1%}}", "75.0%"),
        ("{{claim:1.good|.3f}}", "0.750"),
        ("{{claim:week1.good.bound}}", "≥ 0.5"),
        ("{{claim:week1.good.verdict}}", "holds"),
        ("{{claim:week1.good.unit}}", "fraction"),
        ("{{claim:week1.good.null}}", "0"),
        ("{{notebook:week1/01_good.seconds|.0f}}", "12"),
        ("{{notebook:week1/01_good.peak_rss_mb}}", "456.7"),
    ],
)
def test_a_placeholder_becomes_what_the_notebook_measured(root, placeholder, shown):
    assert render(root, f"It is {placeholder}.\n") == f"It is {shown}.\n"


def test_a_template_that_is_not_utf8_is_named(root):
    template = root / devlogs.FOLDER / "week-01.template.md"
    template.write_bytes(b"caf\xe9")
    with pytest.raises(CourseError, match=r"week-01.template.md is not UTF-8 \(byte 3\)"):
        devlogs.render(template, root)


def test_a_table_of_a_weeks_claims_is_markdown(root):
    lines = render(root, "{{claims:week1}}\n").splitlines()
    assert lines[0] == "| Claim | Source | Measured | Unit | Bound | Verdict |"
    assert lines[2] == "| The value is at least one half. | ours | 0.75 | fraction | ≥ 0.5 | holds |"


@pytest.mark.parametrize(
    ("placeholder", "complaint"),
    [
        ("{{claim:week1.bad}}", "week1 makes no claim 'bad'"),
        ("{{claim:week99.good}}", "no week 'week99'"),
        ("{{claim:good}}", "'good' must be week.claim"),
        ("{{claim:week1.good.colour}}", "'colour' is no field of a claim"),
        ("{{claim:week1.good.mean}}", "has no value yet; use `course calibrate`"),
        ("{{claim:week1.good|.2q}}", "'.2q' in .* is no format for 0.75"),
        ("{{notebook:week1/01_good.colour}}", "'colour' is not known of a notebook"),
        ("{{notebook:week1/09.seconds}}", "no notebook '09'"),
        ("{{clam:week1.good}}", "is no placeholder"),
    ],
)
def test_a_placeholder_that_means_nothing_is_refused_with_its_line(root, placeholder, complaint):
    with pytest.raises(CourseError, match=f"week-01.template.md, line 2: .*{complaint}"):
        render(root, f"fine\nIt is {placeholder}.\n")


def test_a_claim_that_was_never_measured_has_no_number(root):
    path = root / WEEK / "01_good.ipynb"
    path.write_text(path.read_text().replace('"measured": 0.75', '"measured": null'))
    with pytest.raises(CourseError, match="use `course run --save` first"):
        render(root, "{{claim:week1.good}}")


def test_templates_are_found_by_week(root):
    template = root / devlogs.FOLDER / "week-01.template.md"
    template.write_text("")
    assert devlogs.select(["1"], root) == [template]
    assert devlogs.select([], root) == [template]
    assert devlogs.log_path(template).name == "week-01.md"
    with pytest.raises(CourseError, match=r"There is no docs/weekly-logs/week-17-18.template.md"):
        devlogs.select(["18"], root)


def write_template(root, text):
    (root / devlogs.FOLDER / "week-01.template.md").write_text(text, encoding="utf-8")


def test_the_index_has_a_weeks_line_with_its_number_and_the_figure_of_its_notebook(root):
    write_template(root, f"{FRONT}\n# Week 1\n")
    content = devlogs.index(root)
    folder = root / devlogs.FOLDER
    assert content.pop(folder / "figures" / "week-01.png") == PIXELS
    text = content.pop(folder / "README.md").decode()
    assert not content
    assert text.endswith(
        "## [Week 1 · Attention and the Transformer](week-01.md)\n\nIt is 0.75.\n\n"
        "[![A curve](figures/week-01.png)](week-01.md)\n"
    )


def test_what_is_meant_for_the_index_is_no_part_of_the_devlog(root):
    assert render(root, f"{FRONT}\n# Week 1\n") == "# Week 1\n"
    with pytest.raises(CourseError, match="week-01.template.md, line 6: .*'bad'"):
        render(root, f"{FRONT}\n{{{{claim:week1.bad}}}}\n")


@pytest.mark.parametrize(
    ("front", "complaint"),
    [
        ("# Week 1\n", "week-01.template.md must begin with ---, a `line:`"),
        (FRONT.replace("line:", "lines:"), "week-01.template.md must begin with ---, a `line:`"),
        (FRONT.replace(", A curve", ""), "week-01.template.md must begin with ---, a `line:`"),
        (FRONT.replace("line: It", "line: [It"), "week-01.template.md does not begin with valid YAML"),
        (FRONT.replace(".good", ".bad"), "week-01.template.md, line 2: week1 makes no claim 'bad'"),
        (FRONT.replace("A curve", "A line"), "the figure 'A line', and week1/01_good shows 0 of that title"),
    ],
)
def test_a_template_that_says_nothing_for_the_index_is_refused(root, front, complaint):
    write_template(root, front)
    with pytest.raises(CourseError, match=complaint):
        devlogs.index(root)


def test_the_committed_index_says_what_the_committed_notebooks_say():
    folder = files.repository_root() / devlogs.FOLDER
    expected = devlogs.index()
    there = {folder / devlogs.INDEX, *(folder / devlogs.FIGURES).iterdir()}
    assert there == set(expected), "run `course devlog`, and delete the figures that no week names"
    for path, content in expected.items():
        assert path.read_bytes() == content, f"run `course devlog` to write {path.name}"
