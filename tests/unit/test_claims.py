"""Claims: reading them, measuring them, showing them."""

import json
import math
import subprocess
import sys

import pytest
import yaml
from course_root import WEEK, add_notebook
from hypothesis import given
from hypothesis import strategies as st

from shared.curriculum import claims
from shared.curriculum.claims import Bound, Claims
from shared.runtime import scale
from shared.runtime.errors import CourseError

GOOD = """\
- name: val_bpb
  says: A small model beats gzip.
  source: ours
  notebook: 03_train
  unit: bits per byte
  bounds: {cpu: {max: 2.5}, gpu: {min: 1.0, max: 1.5}}
  null: 8.0
- name: beats_zstd
  says: It beats zstd
    that was given the training text.
  source: ours
  notebook: 03_train
  unit: bits per byte
  bounds: {cpu: {max: -1e-3}}
  null: 0.5
  holds: false
  why: One minute is not enough.
"""


@pytest.fixture
def root(tmp_path):
    write(tmp_path, GOOD)
    return tmp_path


def write(root, text):
    (root / WEEK).mkdir(parents=True, exist_ok=True)
    (root / WEEK / claims.FILE).write_text(text, encoding="utf-8")


def notebook_claims(root, name="03_train", scale="cpu"):
    return Claims("week1", name, scale=scale, root=root)


def test_the_scales_are_those_of_the_runtime():
    assert claims.SCALES == scale.NAMES


def test_a_claim_is_read_with_all_its_keys(root):
    claim, other = claims.load(root / WEEK)
    assert (claim.name, claim.notebook, claim.unit, claim.null) == (
        "val_bpb",
        "03_train",
        "bits per byte",
        8.0,
    )
    assert claim.bounds == {"cpu": Bound(max=2.5), "gpu": Bound(1.0, 1.5)}
    assert claim.expected
    assert other.says == "It beats zstd that was given the training text."
    assert other.bounds["cpu"].max == -0.001
    assert not other.expected


def test_a_week_without_claims_has_none(tmp_path):
    assert claims.load(tmp_path) == ()


def changed(old, new):
    """The well-formed file with the first `old` replaced."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


MALFORMED = {
    "bad YAML": ("- name: [unclosed\n", "line 2.* is not valid YAML"),
    "not a list": ("name: x\n", "must be a list of claims"),
    "not a mapping": ("- just text\n", "claim 1: must be a mapping"),
    "key twice": (changed("  unit: bits", "  unit: x\n  unit: bits"), "key 'unit' is given twice"),
    "missing key": (changed("  unit: bits per byte\n", ""), "'val_bpb': key 'unit' is missing"),
    "unknown key": (changed("  unit:", "  units:"), "unknown key 'units'; did you mean 'unit'"),
    "wrong type": (
        changed("null: 8.0", "null: eight"),
        "'val_bpb': key 'null' must be a number, not 'eight'",
    ),
    "text expected": (changed("unit: bits per byte", "unit: 3"), "key 'unit' must be text, not 3"),
    "not a number": (changed("max: 2.5", "max: .nan"), r"key 'bounds.cpu.max' must be a number"),
    "true for a number": (changed("max: 2.5", "max: true"), r"key 'bounds.cpu.max' must be a number"),
    "unknown scale": (changed("gpu:", "tpu:"), "key 'bounds' has unknown scale 'tpu'"),
    "no scale": (changed("{cpu: {max: 2.5}, gpu: {min: 1.0, max: 1.5}}", "{}"), "at least one scale"),
    "open bound": (changed("{max: 2.5}", "{}"), "key 'bounds.cpu' must have min, max or both"),
    "misspelt end": (changed("{max: 2.5}", "{maximum: 2.5}"), "key 'bounds.cpu' must have min, max or both"),
    "empty interval": (changed("min: 1.0, max: 1.5", "min: 2.0, max: 1.5"), "min above its max"),
    "null that passes": (
        changed("null: 8.0", "null: 2.5"),
        r"key 'null': 2.5 is within the bound at cpu \(≤ 2.5\)",
    ),
    "null that passes elsewhere": (changed("null: 8.0", "null: 1.2"), "key 'null'"),
    "name twice": (changed("name: beats_zstd", "name: val_bpb"), "claim 'val_bpb': key 'name' is used twice"),
    "bad name": (changed("name: val_bpb", "name: Val bpb"), "key 'name' must be lower-case"),
    "holds without why": (changed("  why: One minute is not enough.\n", ""), "go together"),
    "why without holds": (changed("  holds: false\n", ""), "go together"),
    "holds of another type": (changed("holds: false", "holds: perhaps"), "key 'holds' must be true or false"),
    "a date that is none": (changed("source: ours", "source: 2024-13-45"), "not valid YAML: month must be"),
    "a control character": (changed("source: ours", "source: \0"), "not valid YAML: unacceptable character"),
    "nested without end": ("- " + "[" * 5000, "not valid YAML: maximum recursion"),
    "null spelt otherwise": (changed("  null: 8.0", "  ~: 8.0"), "unknown key '~'"),
    "calibrated by hand": (changed("null: 8.0", "null: 8.0\n  calibrated: {mean: 1.0}"), "key 'calibrated."),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_claims_are_refused_naming_file_claim_and_key(tmp_path, case):
    text, complaint = MALFORMED[case]
    write(tmp_path, text)
    with pytest.raises(CourseError, match=complaint) as caught:
        claims.load(tmp_path / WEEK)
    assert "week1-attention/claims.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_claims_that_are_not_text_are_refused(root):
    (root / WEEK / claims.FILE).write_bytes(b"- name: \xff\n")
    with pytest.raises(CourseError, match="claims.yaml is not UTF-8"):
        claims.load(root / WEEK)


def test_a_claim_for_a_notebook_that_does_not_exist_is_refused(root):
    add_notebook(root, "03_trian", "1")
    with pytest.raises(
        CourseError, match=r"'val_bpb': key 'notebook': there is no 03_train.ipynb .* 03_trian"
    ):
        claims.load(root / WEEK)


@given(st.floats(allow_nan=True), st.floats(allow_nan=False, allow_infinity=False))
def test_a_bound_holds_exactly_between_its_ends(value, end):
    assert Bound(min=end).holds(value) == (value >= end)
    assert Bound(max=end).holds(value) == (value <= end)
    assert Bound(end, end).holds(value) == (value == end)


def test_the_verdict_depends_on_measurement_bound_and_what_is_stated(root):
    plain, exception = claims.load(root / WEEK)
    assert plain.judge(2.4, "cpu").words == "holds"
    assert plain.judge(2.6, "cpu").words == "does not hold"
    assert plain.judge(math.nan, "cpu").words == "does not hold"
    assert plain.judge(None, "cpu").words == "not measured"
    assert plain.judge(2.4, "h100x2").words == "not claimed here"
    assert plain.judge(2.4, "h100x2").holds is None
    assert exception.judge(0.1, "cpu").words == "does not hold, as stated"
    assert exception.judge(-0.1, "cpu").words == "holds, though stated not to"
    agreed = [plain.judge(2.4, "cpu"), exception.judge(0.1, "cpu"), plain.judge(9.0, "h100x2")]
    disagreed = [plain.judge(2.6, "cpu"), exception.judge(-0.1, "cpu"), exception.judge(None, "cpu")]
    assert all(verdict.as_stated for verdict in agreed)
    assert not any(verdict.as_stated for verdict in disagreed)
    assert not exception.judge(0.1, "cpu").holds


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_agrees_with_nothing(root, value):
    for claim in claims.load(root / WEEK):
        for scale_name in claims.SCALES:
            verdict = claim.judge(value, scale_name)
            assert not verdict.as_stated
            assert not verdict.holds
            written = claim.judge(verdict.as_json()["measured"], scale_name)  # what the runner reads back
            assert (written.holds, written.as_stated) == (verdict.holds, verdict.as_stated)


def test_measuring_a_tensor_of_one_element_is_measuring_its_number(root):
    import torch

    notebook = notebook_claims(root)
    notebook.measure("val_bpb", torch.tensor(2.25))
    assert notebook.verdicts()[0].measured == 2.25


@pytest.mark.parametrize("method", ["measure", "predict"])
def test_a_claim_that_nobody_made_cannot_be_measured(root, method):
    notebook = notebook_claims(root)
    with pytest.raises(CourseError, match="makes no claim 'val_bpd'; did you mean 'val_bpb'"):
        getattr(notebook, method)("val_bpd", 1.0)


def test_a_claim_of_another_notebook_cannot_be_measured(root):
    write(root, GOOD.replace("notebook: 03_train", "notebook: 01_bpe", 1))
    with pytest.raises(CourseError, match="Claim 'val_bpb' belongs to notebook 01_bpe, not to 03_train"):
        notebook_claims(root).measure("val_bpb", 1.0)


def test_a_notebook_without_claims_and_an_unknown_scale_are_refused(root):
    with pytest.raises(CourseError, match="has no claim for notebook '09_other'"):
        notebook_claims(root, "09_other")
    with pytest.raises(CourseError, match="Unknown scale 'tpu'"):
        notebook_claims(root, scale="tpu")


def test_the_table_sets_the_guess_beside_the_measurement(root):
    notebook = notebook_claims(root)
    notebook.predict("val_bpb", 1.75)
    notebook.measure("val_bpb", 2.25)
    row = notebook.text().splitlines()[2]
    assert row.split("  ")[0] == "A small model beats gzip."
    assert row.split()[-5:] == ["1.75", "2.25", "≤", "2.5", "holds"]
    assert "<td style='text-align:left'>1.75</td><td style='text-align:left'>2.25</td>" in notebook.html()


def test_the_table_names_claims_that_were_never_measured(root):
    notebook = notebook_claims(root)
    notebook.measure("val_bpb", 2.25)
    for shown in (notebook.text(), notebook.html()):
        assert "Never measured: beats_zstd." in shown
        assert "not measured" in shown


def test_the_table_gives_the_reason_of_a_stated_exception(root):
    notebook = notebook_claims(root)
    notebook.measure("beats_zstd", 0.1)
    assert "beats_zstd: One minute is not enough." in notebook.text()
    assert "✗ does not hold, as stated" in notebook.html()


def test_html_of_a_claim_is_escaped(tmp_path):
    write(tmp_path, GOOD.replace("A small model beats gzip.", "x < y & <b>bold</b>"))
    assert "x &lt; y &amp; &lt;b&gt;bold&lt;/b&gt;" in notebook_claims(tmp_path).html()


def test_the_record_is_strict_json_even_for_a_diverged_run(root):
    notebook = notebook_claims(root)
    notebook.predict("val_bpb", math.inf)
    notebook.measure("val_bpb", math.nan)
    record = json.loads(json.dumps(notebook.record(), allow_nan=False))
    assert record["claims"][0]["measured"] is None
    assert record["claims"][0]["holds"] is False


def test_showing_outside_a_notebook_prints_the_table(root, capsys):
    notebook_claims(root).show()
    assert "A small model beats gzip." in capsys.readouterr().out


def test_claims_are_read_without_importing_torch():
    code = "import sys, shared.curriculum.claims, shared.curriculum.notebooks; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_loader_reads_plain_numbers_as_yaml_does():
    loader = claims._loader()
    for text in ("1", "1.5", "-2.0", "1.0e-5", "true", "text", "1_000"):
        assert yaml.load(f"- {text}", loader) == yaml.safe_load(f"- {text}"), text
    assert yaml.load("- 1e-5", loader) == [1e-5]
