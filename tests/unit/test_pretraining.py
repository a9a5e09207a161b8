"""The folder of a run and the data of a run: what is refused before training, and what can go on."""

import json

import pytest
import torch

from shared.recipes import pretraining, runs
from shared.runtime.errors import CourseError
from shared.training.checkpointing import list_checkpoints
from shared.training.config import DataConfig, TrainConfig, load_run

TEXT = "to be, or not to be: that is the question.\n" * 30


@pytest.fixture
def story(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    path = tmp_path / "story.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_text_becomes_ids_and_the_held_out_bytes_are_counted(story):
    data = pretraining.token_data(DataConfig(corpus="text", path=str(story), tokenizer="char"))
    whole = data.tokenizer.decode([*data.training, *data.validation])
    assert whole == TEXT
    assert data.validation_bytes == len(data.validation) == len(TEXT) - int(0.9 * len(TEXT))


def test_a_held_out_part_of_one_token_is_refused_before_training(story):
    settings = DataConfig(corpus="text", path=str(story), tokenizer="char", validation=0.001)
    story.write_text(TEXT[:900], encoding="utf-8")
    with pytest.raises(CourseError, match=r"story.txt that is held out has 1 token"):
        pretraining.token_data(settings)
    story.write_text(TEXT, encoding="utf-8")
    assert len(pretraining.token_data(settings).validation) == 2


def begin(folder, data="a", resume=False, rank=0):
    return runs.begin(folder, data, {"model": {}}, resume=resume, rank=rank)


def test_a_new_run_is_written_down_and_a_folder_in_use_is_left_alone(tmp_path):
    assert begin(tmp_path / "run") is False
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"data": "a", "model": {}}
    with pytest.raises(CourseError, match="is not empty; add --resume"):
        begin(tmp_path / "run")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CourseError, match="Cannot write .*file: Not a directory"):
        begin(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("rank", [0, 1])
def test_resuming_where_there_is_no_run_is_refused_and_leaves_nothing(tmp_path, rank):
    with pytest.raises(CourseError, match="No checkpoint in .*; start the run without --resume"):
        begin(tmp_path / "run", resume=True, rank=rank)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_run_is_resumed_on_its_own_data_only(tmp_path, content):
    begin(tmp_path)
    (tmp_path / "step-00000003").mkdir()
    assert begin(tmp_path, resume=True) is True
    assert begin(tmp_path, resume=True, rank=1) is True
    with pytest.raises(CourseError, match="was trained on other data"):
        begin(tmp_path, data="b", resume=True)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CourseError, match="run.json is damaged; delete it"):
        begin(tmp_path, resume=True)


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(story, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
data: {{corpus: text, path: {story}, tokenizer: char}}
model: {{num_layers: 1, num_heads: 1, d_model: 8}}
training: {{steps: 2, batch_size: 2, context_length: 16, dtype: float32}}
""",
        encoding="utf-8",
    )
    run, folder = load_run(config), tmp_path / "run"
    data = pretraining.token_data(run.data)
    begin(folder, data="what the killed run was reading")
    options = {"device": torch.device("cpu"), "progress": False}
    history = pretraining.train_language_model(run, data, folder, resume=True, **options)
    assert history[-1]["step"] == 2
    assert json.loads((folder / "run.json").read_text())["data"] == data.path.name
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002"]
    again = pretraining.train_language_model(run, data, folder, resume=True, **options)
    assert again == history
    assert run.training == TrainConfig(steps=2, batch_size=2, context_length=16)
