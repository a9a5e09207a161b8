"""Configuration files are checked key by key, and what is wrong is named."""

from pathlib import Path

import pytest
import torch
import yaml

from shared.runtime.errors import CourseError
from shared.runtime.files import repository_root
from shared.training.config import DataConfig, TrainConfig, load_run

GOOD = """
data: {corpus: shakespeare, tokenizer: char}
model: {num_layers: 2, num_heads: 2, d_model: 16}
training: {steps: 10, learning_rate: 1e-3, betas: [0.9, 0.99]}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_file_states_the_difference_from_the_defaults(write):
    run = load_run(write(GOOD))
    assert run.data == DataConfig(corpus="shakespeare", tokenizer="char")
    assert run.training == TrainConfig(steps=10, learning_rate=0.001, betas=(0.9, 0.99))
    config = run.model_config(vocab_size=65)
    assert (config.vocab_size, config.num_layers, config.context_length) == (65, 2, 128)


def test_settings_of_the_command_line_come_last(write):
    run = load_run(write(GOOD), ["training.steps=7", "model.position=rope", "training.betas=[0.8, 0.9]"])
    assert (run.training.steps, run.training.betas) == (7, (0.8, 0.9))
    assert run.model["position"] == "rope"


def test_the_dtype_of_the_machine_fills_in_where_the_file_is_silent(write):
    assert load_run(write(GOOD), dtype="bfloat16").training.torch_dtype == torch.bfloat16
    pinned = load_run(write(GOOD), ["training.dtype=float32"], dtype="bfloat16")
    assert pinned.training.torch_dtype == torch.float32


def test_stages_are_read_and_checked(write):
    first, second = (
        "{start: 0, batch_size: 8, context_length: 16}",
        "{start: 5, batch_size: 4, context_length: 32}",
    )
    run = load_run(write(GOOD), [f"training.stages=[{first}, {second}]"])
    assert run.training.stage_at(4).context_length == 16
    assert run.training.stage_at(5).batch_size == 4
    with pytest.raises(CourseError, match=r"stages\[0\].batch_size is 0; it must be at least 1"):
        load_run(write(GOOD), ["training.stages=[{start: 0, batch_size: 0, context_length: 16}]"])
    with pytest.raises(CourseError, match="first must start at 0"):
        load_run(write(GOOD), ["training.stages=[{start: 3, batch_size: 1, context_length: 16}]"])
    with pytest.raises(CourseError, match=r"stages\[0\].start is missing"):
        load_run(write(GOOD), ["training.stages=[{batch_size: 1, context_length: 16}]"])


WRONG = [
    ("training.stepz=3", r"unknown key training.stepz; did you mean steps\?"),
    ("model.num_layer=3", r"unknown key model.num_layer; did you mean num_layers\?"),
    ("data.zzzzz=3", r"unknown key data.zzzzz; known are corpus"),
    ("trainig.steps=3", r"unknown key trainig; did you mean training\?"),
    ("training.steps=0", r"training.steps is 0; it must be at least 1"),
    ("training.steps=ten", r"training.steps is 'ten'; it must be a whole number"),
    ("training.steps=1.5", r"training.steps is 1.5; it must be a whole number"),
    ("training.steps=true", r"training.steps is True; it must be a whole number"),
    ("training.learning_rate=-1", r"training.learning_rate is -1.0; it must be at least 0"),
    ("training.learning_rate=.nan", r"training.learning_rate is nan; it must be at least 0"),
    ("training.learning_rate=fast", r"training.learning_rate is 'fast'; it must be a number"),
    ("training.betas=[0.9]", r"training.betas is \(0.9,\); it must be 2 values, each a number"),
    ("training.betas=[0.9, 1.0]", r"training.betas is \(0.9, 1.0\); it must be from 0.0 to 0.99999"),
    ("training.fused=maybe", r"training.fused is 'maybe'; it must be true or false"),
    ("training.optimizer=sgd", r"training.optimizer is 'sgd'; choose one of adamw, muon"),
    ("training.dtype=float64", r"training.dtype is 'float64'; choose one of float32, bfloat16, float16"),
    ("training.guard=-1", r"training.guard is -1.0; it must be at least 0.0"),
    ("training.tracker=mlflow", r"training.tracker is 'mlflow'; choose one of tensorboard, wandb, none"),
    ("training.patience=2", r"patience is 2 and eval_interval 0"),
    ("training.stages=3", r"training.stages is 3; it must be a list of Stage"),
    (
        "data.path=story.txt",
        r"data.path is 'story.txt' and data.corpus 'shakespeare'; only 'text' has a path",
    ),
    ("data.validation=0.9", r"data.validation is 0.9; it must be from 0.001 to 0.5"),
    ("model.num_layers=two", r"model.num_layers is 'two'; it must be a whole number"),
    ("model.vocab_size=7", r"model.vocab_size is decided by the tokenizer"),
    ("model.preset=gpt5", r"model.preset is 'gpt5'; choose one of gpt2"),
    ("model=3", r"not of the form section.key=value"),
    ("training.steps", r"not of the form section.key=value"),
    ("training.steps=[", r"the value is not valid YAML"),
]


@pytest.mark.parametrize(("setting", "said"), WRONG, ids=[setting for setting, _ in WRONG])
def test_what_is_wrong_is_said(write, setting, said):
    path = write(GOOD)
    with pytest.raises(CourseError, match=said) as caught:
        load_run(path, [setting])
    assert "--set" in str(caught.value) or str(path) in str(caught.value)


FILES = {
    "data: [": r"is not valid YAML \(line 1\)",
    "": "holds no sections",
    "training: 3": "training is 3; it must hold keys",
    "training: {learning_rate: 0.1}": "training.steps is missing",
}


@pytest.mark.parametrize(("content", "said"), FILES.items())
def test_a_file_that_is_no_configuration_is_refused(write, content, said):
    with pytest.raises(CourseError, match=said):
        load_run(write(content))


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(CourseError, match="Cannot read"):
        load_run(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"data: \xff\xfe\xff")
    with pytest.raises(CourseError, match="is not valid YAML"):
        load_run(tmp_path / "latin.yaml")


def test_choices_that_do_not_fit_together_name_the_file(write):
    run = load_run(write(GOOD), ["model.num_heads=3"])
    with pytest.raises(CourseError, match=r"run.yaml: model: d_model 16 must be a multiple of num_heads 3"):
        run.model_config(65)


def test_sizes_that_the_model_must_have_are_named(write):
    run = load_run(write("model: {num_heads: 2}\ntraining: {steps: 1}"))
    with pytest.raises(CourseError, match=r"run.yaml: model: The model settings lack num_layers, d_model"):
        run.model_config(65)


@pytest.mark.parametrize(
    "setting",
    [
        "model.context_length=64",
        "training.stages=[{start: 0, batch_size: 1, context_length: 129}]",
    ],
)
def test_sequences_longer_than_the_models_context_are_refused_before_training(write, setting):
    run = load_run(write(GOOD), [setting])
    with pytest.raises(
        CourseError, match=r"training has sequences of \d+ tokens and model.context_length is"
    ):
        run.model_config(65)


def test_a_preset_is_a_published_model(write):
    run = load_run(write("model: {preset: gpt2, dropout: 0.1}\ntraining: {steps: 1, context_length: 1024}"))
    config = run.model_config(50_257)
    assert (config.num_layers, config.d_model, config.dropout) == (12, 768, 0.1)


def test_a_configuration_made_in_python_is_checked_too():
    with pytest.raises(CourseError, match="steps is 0"):
        TrainConfig(steps=0)
    assert TrainConfig(steps=1, dtype=torch.bfloat16).dtype == "bfloat16"


FOLDER = repository_root() / "configs" / "training"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("translation-"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_of_the_repository_loads_and_comments_each_key(path):
    run = load_run(path)
    run.model_config(run.data.vocab_size)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("  "):
            assert " # " in line, f"{path.name}:{number} has no comment"


def test_the_baseline_is_nanogpts_published_quick_start():
    path = FOLDER / "nanogpt-shakespeare-cpu.yaml"
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {key: sections["model"][key] for key in ("num_layers", "num_heads", "d_model", "bias")} == {
        "num_layers": 4,
        "num_heads": 4,
        "d_model": 128,
        "bias": False,
    }
    published = {
        "steps": 2000,
        "batch_size": 12,
        "context_length": 64,
        "learning_rate": 1e-3,
        "betas": [0.9, 0.99],
        "weight_decay": 0.1,
        "warmup_steps": 100,
        "min_lr_ratio": 0.1,
        "clip": 1.0,
        "fused": False,
    }
    assert {key: sections["training"][key] for key in published} == published
