"""The model that comes with the course: complete, undamaged, documented, and what its files say it is."""

import json
import re

import numpy as np
import pytest
import torch

from shared.data import tokenizers
from shared.inference.generation import generate
from shared.models import model_utils, qwen3
from shared.recipes import base_model, model_card
from shared.runtime import artifacts, files
from shared.training.config import load_run

TEXT = """function os.path.join(a, *p)

Join two or more pathname components, inserting '/' as needed.

    >>> os.path.join("usr", "lib")
    'usr/lib'
"""


@pytest.fixture(scope="module")
def folder():
    """Where it lies; a course without it is not complete, so nothing here is skipped."""
    return base_model.shipped_model()


@pytest.fixture(scope="module")
def record(folder):
    return artifacts.lineage(folder)


@pytest.fixture(scope="module")
def card(folder):
    return (folder / model_card.CARD).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.load(folder / model_utils.TOKENIZER)


@pytest.fixture(scope="module")
def model(folder):
    return model_utils.load_model(folder)


def section(card, heading):
    """The text of the card's section whose heading begins so."""
    found = re.search(rf"^## {heading}.*?\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    assert found, f"the card has no section {heading!r}"
    return found[1]


def test_all_its_files_together_fit_into_the_repository(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= base_model.LARGEST


def test_every_file_is_the_one_that_the_run_wrote(folder, record):
    there = {
        path.name: files.sha256_file(path) for path in folder.iterdir() if path.name != artifacts.LINEAGE
    }
    assert there == {name: entry["sha256"] for name, entry in record["files"].items()}
    assert {model_utils.CONFIG, model_utils.WEIGHTS, model_utils.TOKENIZER, model_card.CARD} <= set(there)


def test_its_lineage_is_that_of_the_configuration_in_the_repository(record, model):
    key = {name: record[name] for name in ("kind", "config", "parents", "scale")}
    assert record["key"] == files.sha256_json(key)
    assert record["kind"] == "models/pydoc-gpt"
    run = load_run(base_model.config_path("cpu").with_name("pydoc-gpt.yaml"), dtype="bfloat16")
    wanted = json.loads(json.dumps(run.training.identity()))
    assert record["config"]["training"] == wanted
    config = base_model.model_config(run, model.config.vocab_size)
    assert qwen3.settings(config) == qwen3.settings(model.config)  # all but how the weights began
    assert record["config"]["shares"] == base_model.load_mix(run.data.corpus).corpora
    last = record["metrics"]["curve"][-1]
    assert last["step"] == run.training.steps


def test_no_package_was_trained_on_that_is_held_out(record):
    held_out = set(record["data"]["held_out"])
    assert len(held_out) >= 5
    for corpus in record["data"]["corpora"].values():
        assert not held_out & set(corpus["training"]["packages"])
        assert set(corpus["validation"]["packages"]) <= held_out
        assert corpus["validation"]["seen_lines"] < 0.05


def test_the_card_names_every_package_with_its_licence(record, card):
    data = section(card, "Data")
    rows = {}
    for line in data.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 6:
            rows[cells[0].strip()] = cells
    for corpus in record["data"]["corpora"].values():
        for part in ("training", "validation"):
            for package, row in corpus[part]["packages"].items():
                assert row["license"], f"{package} has no licence"
                assert rows[package][1:3] == [row["version"], row["license"].replace("|", "\\|")]
                held_out = package in record["data"]["held_out"]
                assert (rows[package][5] == "held out") == held_out


def test_the_card_tells_scores_recipe_and_curve_as_the_run_measured_them(folder, record, card):
    metrics = record["metrics"]
    scores = section(card, "Bits per byte")
    assert f"| this model | {metrics['bits_per_byte']:.3f} |" in scores
    for way, found in metrics["baselines"].items():
        assert f"| {way} | {found['all']:.3f} |" in scores
    training = section(card, "Training")
    settings = record["config"]["training"]
    assert f"| updates | {settings['steps']:,} |" in training
    evaluated = [point for point in metrics["curve"] if "val_loss" in point]
    assert len(evaluated) >= 4
    for point in evaluated:
        assert f"| {point['step']:,} | {point['tokens'] / 1e6:.2f} | {point['loss']:.3f} | " in training
    assert f"]({model_card.CURVE})" in training
    assert "<svg" in (folder / model_card.CURVE).read_text(encoding="utf-8")


def test_the_samples_in_the_card_are_what_the_model_writes(model, tokenizer, card):
    shown = section(card, "Samples")
    for way in model_card.WAYS:
        assert f"### {way.capitalize()}" in shown
    for prompt in model_card.PROMPTS:
        assert shown.count(f"{prompt}⟨…⟩") == len(model_card.WAYS)
    # Rounding differs between processors and may turn a close choice, so only most of the beginnings.
    end = tokenizer.special_tokens[tokenizers.END_OF_TEXT]
    prompts = [[end, *tokenizer.encode(prompt)] for prompt in model_card.PROMPTS]
    texts = map(tokenizer.decode, generate(model, prompts, 6, stop_ids=[end]))
    same = [f"{prompt}⟨…⟩{text}" in shown for prompt, text in zip(model_card.PROMPTS, texts, strict=True)]
    assert sum(same) >= len(same) - 2, same


def test_the_card_says_what_the_model_cannot_do(card):
    limits = section(card, "What it cannot do")
    assert len(re.findall(r"^- ", limits, re.MULTILINE)) >= 4


def test_transformers_loads_it_and_gives_the_same_logits_and_tokens(folder, model, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == qwen3.ARCHITECTURE
    assert theirs.num_parameters() == model.num_parameters()
    ids = tokenizer.encode(TEXT)
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == ids
    with torch.no_grad():
        expected, logits = theirs(torch.tensor([ids])).logits, model(torch.tensor([ids]))[0]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_its_weights_are_bfloat16_and_finite(folder):
    from safetensors.torch import load_file

    for name, tensor in load_file(folder / model_utils.WEIGHTS).items():
        assert tensor.dtype == torch.bfloat16, name
        assert tensor.isfinite().all(), name


def test_it_predicts_documentation_far_better_than_chance(model, tokenizer):
    ids = torch.tensor([[tokenizer.special_tokens[tokenizers.END_OF_TEXT], *tokenizer.encode(TEXT)]])
    with torch.no_grad():
        logits, loss = model(ids[:, :-1], ids[:, 1:])
    assert loss < 0.6 * np.log(tokenizer.vocab_size)
    shuffled = logits[:, torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(0))]
    other = torch.nn.functional.cross_entropy(shuffled.flatten(0, 1), ids[:, 1:].flatten())
    assert other > loss + 2  # what it says is about this text at this place
