"""`train_translation.py` as a reader starts it, on small files of the real schema."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from shared.models.model_utils import load_model
from shared.runtime.files import repository_root

pytestmark = pytest.mark.slow
ROOT = repository_root()
SCRIPT = ROOT / "phase1-fundamentals" / "week1-attention" / "train_translation.py"
CONFIG = ROOT / "configs" / "training" / "translation-multi30k.yaml"
SMALL = [
    "data.vocab_size=320", "data.longest=40", "translation.extra_length=8", "model.max_length=48",
    "model.num_layers=1", "model.num_heads=2", "model.d_model=48", "model.d_ff=96", "model.dropout=0.0",
    "training.steps=150", "training.batch_size=16", "training.warmup_steps=30", "training.learning_rate=0.01",
    "training.checkpoint_interval=75", "training.eval_interval=75", "training.dtype=float32",
]  # fmt: skip
NUMBERS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf"}


@pytest.fixture
def environment(tmp_path):
    """$COURSE_DATA with a Multi30k of 240 'captions' of five numbers each, in English and German."""
    folder = tmp_path / "data" / "multi30k"
    folder.mkdir(parents=True)
    captions = list(itertools.product(NUMBERS, repeat=5))
    random.Random(0).shuffle(captions)
    parts = {"train": captions[:200], "val": captions[200:220], "test": captions[220:240]}
    for name, part in parts.items():
        rows = [{"en": " ".join(words), "de": " ".join(NUMBERS[word] for word in words)} for words in part]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {**os.environ, "COURSE_DATA": str(tmp_path / "data"), "COURSE_HOME": str(tmp_path / "home")}


def train(environment, *arguments, processes=1, settings=()):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    changes = [part for setting in [*SMALL, *settings] for part in ("--set", setting)]
    command = [*launcher, str(SCRIPT), "--config", str(CONFIG), *changes, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def result(process):
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_it_learns_to_translate_and_saves_a_model_that_loads(environment, tmp_path):
    found = result(train(environment, "--out", tmp_path / "run"))
    assert found["step"] == 150
    assert found["test_bleu"] > 60  # an untrained model scores below 5
    model = load_model(tmp_path / "run" / "model")
    assert model.config.d_model == 48


def test_a_resumed_run_ends_like_one_that_was_never_stopped(environment, tmp_path):
    whole = result(train(environment, "--out", tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    checkpoints = sorted((tmp_path / "stopped").glob("step-*"))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])  # as if it had been stopped half way
    assert result(train(environment, "--out", tmp_path / "stopped", "--resume")) == whole


def test_two_processes_train_under_torchrun(environment, tmp_path):
    found = result(train(environment, "--out", tmp_path / "run", processes=2))
    assert found["step"] == 150
    assert found["test_bleu"] > 60


def test_a_corpus_that_is_not_there_ends_with_one_sentence(environment, tmp_path):
    environment["COURSE_DATA"] = str(tmp_path)
    process = train(environment, "--out", tmp_path / "run")
    assert process.returncode != 0
    assert process.stderr.startswith("train_translation: The corpus multi30k is not on this machine")
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()
