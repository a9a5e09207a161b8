"""Notebook files: the hash of their code, and what makes one unfit to be committed."""

import base64
import copy
import json
import socket

import pytest
from course_root import code, markdown, notebook

from shared.curriculum import notebooks
from shared.runtime.errors import CourseError

RECORD = {"scale": "cpu", "seed": 0, "seconds": 12.3, "peak_rss_mb": 456.7}
CLAIMS_DATA = {notebooks.MIME: {"week": "week1", "notebook": "01_a", "scale": "cpu", "seed": 0, "claims": []}}


def stream(text):
    return {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}


@pytest.fixture
def original():
    steps = [markdown(f"## {n}. {step}\n") for n, step in enumerate(notebooks.STEPS, start=1)]
    return notebook(*steps[:5], code("print(1)"), steps[5], code("claims.show()"), *steps[6:])


@pytest.fixture
def executed(original):
    result = copy.deepcopy(original)
    cells = [cell for cell in result["cells"] if cell["cell_type"] == "code"]
    for count, cell in zip((1, 3, 4), cells, strict=True):  # 2 was the injected cell
        cell["execution_count"] = count
        cell["metadata"]["papermill"] = {"duration": 1.0}
    cells[1]["outputs"] = [stream("1\n")]
    cells[2]["outputs"] = [{"output_type": "display_data", "data": CLAIMS_DATA, "metadata": {}}]
    injected = code("seed = 0", notebooks.INJECTED)
    injected["execution_count"] = 2
    result["cells"].insert(1, injected)
    result["metadata"]["papermill"] = {"input_path": "/somewhere"}
    return result


@pytest.fixture
def saved(original, executed, tmp_path):
    return notebooks.saved(original, executed, RECORD, tmp_path)


def last_code(nb):
    return notebooks.code_cells(nb)[-1]


def test_the_hash_depends_on_code_and_on_nothing_else(original):
    before = notebooks.source_sha256(original)
    prose, joined, edited = (copy.deepcopy(original) for _ in range(3))
    prose["cells"][1]["source"] = "other prose"
    joined["cells"][0]["source"] = "".join(original["cells"][0]["source"])
    last_code(edited)["source"] = ["claims.show() "]
    assert notebooks.source_sha256(prose) == before
    assert notebooks.source_sha256(joined) == before
    assert notebooks.source_sha256(edited) != before


def test_a_saved_notebook_is_fit_to_be_committed(saved):
    assert notebooks.problems(saved) == []


def test_saving_numbers_the_cells_without_the_injected_one(saved):
    assert [cell["execution_count"] for cell in notebooks.code_cells(saved)] == [1, 2, 3]
    assert "papermill" not in json.dumps(saved)
    assert saved["metadata"]["course"]["seconds"] == 12.3


def test_saving_twice_gives_the_same_file(original, executed, saved, tmp_path):
    again = notebooks.saved(saved, executed, RECORD, tmp_path)
    assert notebooks.dumps(again) == notebooks.dumps(saved)


def test_saving_fills_in_what_the_notebook_costs(original, executed, tmp_path):
    original["cells"][1]["source"] = "Costs <!-- cost -->nothing known<!-- /cost -->."
    cell = notebooks.saved(original, executed, RECORD, tmp_path)["cells"][1]
    assert (
        notebooks.text(cell["source"]) == "Costs <!-- cost -->12 s and 0.5 GB at `cpu` scale<!-- /cost -->."
    )


def test_saving_takes_paths_and_the_host_name_out_of_outputs(original, executed, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "my-machine")
    text = f"{tmp_path}/shared/x.py on my-machine, not on-my-machine2, /tmp/ipykernel_12/345.py:3\n"
    notebooks.code_cells(executed)[1]["outputs"] = [stream(text)]
    output = notebooks.code_cells(notebooks.saved(original, executed, RECORD, tmp_path))[1]["outputs"][0]
    assert output["text"] == ["./shared/x.py on localhost, not on-my-machine2, <notebook>:3\n"]


PNG = {"image/png": base64.b64encode(bytes(60_001)).decode()}
DAMAGES = {
    "code edited": (
        lambda nb: last_code(nb).update(source="claims.show() "),
        "do not come from the code it holds",
    ),
    "order": (lambda nb: last_code(nb).update(execution_count=7), "not executed from top to bottom"),
    "a cell not run": (
        lambda nb: last_code(nb).update(execution_count=None),
        "not executed from top to bottom",
    ),
    "no claims": (lambda nb: last_code(nb).update(outputs=[]), "shows no table of claims"),
    "other seed": (lambda nb: nb["metadata"]["course"].update(seed=1), "at another scale or seed"),
    "a step missing": (lambda nb: nb["cells"].pop(1), "must be the eight steps"),
    "parameters": (
        lambda nb: nb["cells"][0].update(source="scale = 'cpu'\nseed = 0"),
        "parameters cell must hold",
    ),
    "no parameters": (lambda nb: nb["cells"][0].update(metadata={}), "must have one cell tagged"),
    "kernel": (lambda nb: nb["metadata"].pop("kernelspec"), "lacks kernelspec.language"),
    "error": (
        lambda nb: last_code(nb)["outputs"].append({"output_type": "error", "traceback": []}),
        "the output of an error",
    ),
    "large figure": (
        lambda nb: last_code(nb)["outputs"].append({"output_type": "display_data", "data": PNG}),
        "has 60 kB, more than 60",
    ),
    "path": (
        lambda nb: last_code(nb)["outputs"].append(stream("see /home/me/x.py\n")),
        "path of the machine",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_makes_a_notebook_unfit_is_named(saved, case):
    change, complaint = DAMAGES[case]
    change(saved)
    assert any(complaint in problem for problem in notebooks.problems(saved)), notebooks.problems(saved)


def test_web_addresses_and_relative_paths_are_no_paths_of_the_machine(saved):
    last_code(saved)["outputs"].append(stream("https://x.org/home/me ./tmp/x a/tmp/b ~/tmp/x\n"))
    assert notebooks.problems(saved) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"nbformat": 3, "metadata": {}, "cells": []}',
        '{"nbformat": 4}',
        '{"nbformat": 4, "metadata": {}, "cells": [{"cell_type": "code"}]}',
    ],
)
def test_a_file_that_is_no_notebook_is_refused(tmp_path, content):
    path = tmp_path / "week1" / "01_x.ipynb"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(CourseError, match="week1/01_x.ipynb is not a readable notebook"):
        notebooks.read(path)
