"""The base model at toy size: corpora, tokenizer, shards, training, resume, saved model, card."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

from shared.data import corpora, tokenizers
from shared.data.corpora import Corpus, Document
from shared.evaluation.metrics import gzip_bits_per_byte, zstd_bits_per_byte
from shared.models import model_utils, qwen3
from shared.recipes import base_model, model_card
from shared.runtime import artifacts, files
from shared.runtime.errors import CourseError
from shared.training.config import TrainConfig, load_run

CONFIG = """
data: {corpus: pydoc, vocab_size: 320, validation: 0.4}
model: {num_layers: 2, num_heads: 2, num_kv_heads: 1, d_model: 16, d_ff: 32, norm: rmsnorm, position: rope,
        activation: swiglu, qk_norm: true, bias: false, zero_init: true}
training: {steps: 120, batch_size: 8, context_length: 32, optimizer: muon, schedule: wsd, warmup_steps: 5,
           learning_rate: 0.01, min_lr_ratio: 0.0, eval_interval: 60, checkpoint_interval: 40, keep: 9,
           dtype: float32, tracker: none}
"""
PACKAGES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx")
MIX = base_model.Mix(
    corpora={"python-docs": 0.6, "python-code": 0.4},
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"),
    tokenizer_megabytes=1.0,
    baseline_megabytes=1.0,
)
COPIED = "A text that two packages have in common, to the letter, and that is rather long."


def documents(kind, number):
    """`number` documents of each package, about itself; the last two packages share one."""
    made = []
    for package in PACKAGES:
        for i in range(number):
            text = f"Return the {i}th {package} of the zoo, and the size of it in {kind} units.\n" * (
                i % 3 + 1
            )
            made.append(Document(f"{package}.f{i}", "function", f"f{i}(x)", text, package, "1.0", "MIT"))
    made += [Document(f"{p}.copy", "module", "", COPIED, p, "1.0", "MIT") for p in PACKAGES]
    return made


class Streamed:
    """Documents that can be gone through again and again, as those of `python-code`."""

    def __init__(self, made):
        self.made = made

    def __iter__(self):
        return iter(self.made)


def toy_corpus(name):
    kind, number = {"python-docs": ("metric", 20), "python-code": ("imperial", 12)}[name]
    made = documents(kind, number)
    manifest = {"sha256": name, "bytes": sum(len(d.text) for d in made)}
    return Corpus(name, manifest, Streamed(made), "package")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run at toy size, on two corpora that stand in for the environment's."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(corpora, "load", toy_corpus)
    monkeypatch.setattr(base_model, "load_mix", lambda _: MIX)
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return load_run(path)


def train(run, data, directory, **options):
    return base_model.train_base_model(
        run, data, directory, device=torch.device("cpu"), progress=False, **options
    )


def test_no_package_is_in_training_and_held_out_in_any_corpus(run):
    data = base_model.mixed_data(run)
    held_out = set(data.manifest["held_out"])
    assert 0 < len(held_out) < len(PACKAGES)
    for name, part in data.manifest["corpora"].items():
        assert set(part["validation"]["packages"]) == held_out
        assert set(part["training"]["packages"]) == set(PACKAGES) - held_out
        training, validation = (
            data.tokenizer.decode(stream[name]) for stream in (data.training, data.validation)
        )
        for package in PACKAGES:
            assert (f"{package} of the zoo" in validation) == (package in held_out)
            assert (f"{package} of the zoo" in training) == (package not in held_out)


def test_a_text_of_the_training_part_is_not_held_out_again(run):
    data = base_model.mixed_data(run)
    texts = [data.tokenizer.decode(data.training[name]) for name in data.training]
    assert sum(text.count(COPIED) for text in texts) == 1  # a second time it would be a duplicate
    assert not any(COPIED in data.tokenizer.decode(tokens) for tokens in data.validation.values())


def test_a_share_of_the_documents_can_be_kept_and_held_out(run, monkeypatch):
    whole = base_model.mixed_data(run).manifest["corpora"]
    mix = dataclasses.replace(MIX, keep={"python-docs": 0.5}, held_out={"python-code": 0.3})
    monkeypatch.setattr(base_model, "load_mix", lambda _: mix)
    part = base_model.mixed_data(run).manifest["corpora"]
    for name, which, share in (
        ("python-docs", "training", 0.5),
        ("python-docs", "validation", 1.0),
        ("python-code", "training", 1.0),
        ("python-code", "validation", 0.3),
    ):
        fraction = part[name][which]["documents"] / whole[name][which]["documents"]
        assert fraction == pytest.approx(share, abs=0.12 if share < 1 else 0.03), (name, which)


def test_lines_that_training_has_too_are_measured():
    lines: set[int] = set()
    known, new = "x" * 60, "y" * 40
    list(base_model._noting_lines([f"{known}\nshort"], lines))
    overlap = [0, 0]
    list(base_model._comparing_lines([f"short\n  {known}\n{new}"], lines, overlap))
    assert overlap == [60, 100]


def test_the_shards_hold_documents_between_ends_of_text_and_count_their_bytes(run):
    data = base_model.mixed_data(run)
    end = data.tokenizer.special_tokens[tokenizers.END_OF_TEXT]
    assert list(data.tokenizer.special_tokens) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    for name, tokens in data.validation.items():
        part = data.manifest["corpora"][name]["validation"]
        assert tokens[0] == tokens[-1] == end
        assert int((np.asarray(tokens) == end).sum()) == part["documents"] + 1
        text = model_card.plain_text(tokens, data.tokenizer)
        assert len(text) - text.count(model_card.SEPARATOR) == part["bytes"]
        assert text.split(model_card.SEPARATOR)[1].startswith(
            b"source " if name == "python-code" else b"function "
        )


def test_held_out_documents_come_back_by_package_as_they_went_in(run):
    data = base_model.mixed_data(run)
    texts = base_model.held_out_texts(data)
    for name, packages in texts.items():
        assert set(packages) == set(data.manifest["held_out"])
        for package, found in packages.items():
            made = [d for d in toy_corpus(name).documents if d.package == package and d.text != COPIED]
            assert found == [base_model.render(name, d) for d in made]
        size = sum(len(text.encode()) for found in packages.values() for text in found)
        assert size == data.validation_bytes(name)


@pytest.mark.parametrize(
    ("corpus", "name", "kind", "signature", "expected"),
    [
        ("python-docs", "os.path.join", "function", "join(a,\n     *p)", "function os.path.join(a, *p)"),
        ("python-docs", "a.B.run", "function", "async run(self) -> int", "function a.B.run(self) -> int"),
        ("python-docs", "a.B.x#2", "function", "x(self, v)", "function a.B.x(self, v)"),
        ("python-docs", "builtins.len", "function", "", "function builtins.len"),
        ("python-docs", "help.lambda", "topic", "", "topic lambda"),
        ("python-code", "json.decoder", "module", "", "source json.decoder"),
    ],
)
def test_a_document_opens_with_its_kind_and_full_name(corpus, name, kind, signature, expected):
    document = Document(name, kind, signature, "Text.  \r\n", "p", "1", "MIT")
    assert base_model.render(corpus, document) == f"{expected}\n\nText."


def test_streams_take_turns_by_their_shares_evenly():
    which, number, counts = base_model.interleaved([0.6, 0.4], period=10)
    assert counts.tolist() == [6, 4]
    assert np.bincount(which).tolist() == [6, 4]
    for stream in (0, 1):
        assert number[which == stream].tolist() == list(range(counts[stream]))
        running = np.cumsum(which == stream)
        assert np.abs(running - counts[stream] / 10 * np.arange(1, 11)).max() < 1
    with pytest.raises(CourseError, match="too small"):
        base_model.interleaved([0.9999, 0.0001])


def test_batches_mix_by_share_and_visit_each_window_once_an_epoch():
    streams = [np.arange(0, 1000), np.arange(10_000, 10_400)]
    config = TrainConfig(steps=10, batch_size=10, context_length=8)
    batch = base_model.mixed_batches(streams, [0.7, 0.3], config)
    starts = []
    for step in range(10):
        inputs, targets = batch(step)
        assert inputs.shape == targets.shape == (10, 8)
        assert torch.equal(inputs + 1, targets)
        starts += inputs[:, 0].tolist()
    first = [start for start in starts if start < 10_000]
    assert len(first) == 70
    assert len(set(first)) == 70
    again = base_model.mixed_batches(streams, [0.7, 0.3], config)
    assert torch.equal(again(7)[0], batch(7)[0])  # a function of the step alone
    assert not torch.equal(batch(8)[0], batch(7)[0])


def test_the_whole_path_gives_a_model_that_transformers_loads_with_the_same_logits(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = base_model.mixed_data(run)
    history = train(run, data, tmp_path / "run")
    scored = [entry for entry in history if "val_loss" in entry]
    assert scored[-1]["val_loss"] < scored[0]["val_loss"] < math.log(data.tokenizer.vocab_size)

    identity = {"tokens": data.path.name, "shares": {"python-docs": 0.6, "python-code": 0.4}}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == identity
    folder = tmp_path / "run" / "model"
    ours = model_utils.load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == qwen3.ARCHITECTURE
    ids = torch.from_numpy(np.asarray(data.validation["python-docs"][:64]).astype(np.int64)).view(2, 32)
    with torch.no_grad():
        difference = (theirs(ids).logits - ours(ids)[0]).abs().max()
    assert difference < 1e-5
    assert {tensor.dtype for tensor in model_utils._read_weights(folder).values()} == {torch.bfloat16}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "function bee.f1(x)\n\nReturn the 1th bee\u00e9."
    assert tokenizer(text).input_ids == data.tokenizer.encode(text)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer("<|im_start|>").input_ids == [data.tokenizer.special_tokens["<|im_start|>"]]

    record = artifacts.lineage(folder)
    assert record["parents"] == [artifacts.lineage(data.path)["key"]]
    scores = base_model.summary(base_model.held_out_scores(ours, data, 32), data)
    assert record["metrics"]["bits_per_byte"] == pytest.approx(scores["bits_per_byte"], abs=1e-6)
    for name, entry in record["files"].items():
        assert entry["sha256"] == files.sha256_file(folder / name)
    assert set(record["files"]) == {path.name for path in folder.iterdir()} - {artifacts.LINEAGE}
    curve = record["metrics"]["curve"]
    assert [point["val_loss"] for point in curve if "val_loss" in point] == [e["val_loss"] for e in scored]
    assert [point["loss"] for point in curve] == [e["loss"] for e in history if "loss" in e]
    check_card((folder / model_card.CARD).read_text(encoding="utf-8"), record["metrics"], data)
    assert (folder / model_card.CURVE).read_text(encoding="utf-8").count("<path") > 2


def check_card(card, metrics, data):
    """What the card says is what was measured."""
    assert f"| this model | {metrics['bits_per_byte']:.3f} |" in card
    for way, scores in metrics["baselines"].items():
        assert f"| {way} | {scores['all']:.3f} | {scores['python-docs']:.3f} |" in card
        better = re.search(r"It is better than ([^.]*)\.", card)[1]
        assert (way in better) == (scores["all"] > metrics["bits_per_byte"])
    for package in PACKAGES:
        held_out = "held out" if package in data.manifest["held_out"] else ""
        assert re.search(rf"^\| {package} \| 1\.0 \| MIT \| \d+ \| [\d.]+ \| {held_out} \|$", card, re.M)
    for prompt in model_card.PROMPTS:
        assert card.count(f"{prompt}⟨…⟩") == len(model_card.WAYS)
    assert "# What it cannot do" in card


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(run, tmp_path):
    from safetensors.torch import load_file

    data = base_model.mixed_data(run)
    whole = train(run, data, tmp_path / "whole")
    for step in (80, 120):  # as if it had been killed after its first checkpoint
        folder = tmp_path / "whole" / f"step-{step:08d}"
        folder.rename(tmp_path / f"gone-{step}")
    (tmp_path / "whole" / "model").rename(tmp_path / "first")
    resumed = train(run, data, tmp_path / "whole", resume=True)
    assert [e["loss"] for e in resumed if "loss" in e] == [e["loss"] for e in whole if "loss" in e]
    one, other = (
        load_file(path / "model.safetensors") for path in (tmp_path / "first", tmp_path / "whole" / "model")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_not_resumed_with_other_shares(run, tmp_path, monkeypatch):
    data = base_model.mixed_data(run)
    (tmp_path / "run" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"data": {"tokens": data.path.name, "shares": {}}}))
    with pytest.raises(CourseError, match="was trained on other data"):
        train(run, data, tmp_path / "run", resume=True)


def test_artefacts_are_made_once_and_keyed_by_what_decides_them(run, monkeypatch):
    first = base_model.mixed_data(run)
    monkeypatch.setattr(base_model, "_write_tokens", lambda *_: pytest.fail("made again"))
    assert base_model.mixed_data(run).path == first.path
    assert artifacts.lineage(first.path)["config"]["validation"] == 0.4
    tokenizer = base_model._tokenizer(run, first.mix)
    assert artifacts.lineage(first.path)["parents"] == [artifacts.lineage(tokenizer)["key"]]
    monkeypatch.undo()


def test_base_model_builds_the_configuration_of_its_scale_once(run, monkeypatch):
    monkeypatch.setattr(base_model, "config_path", lambda scale: run.path)
    path = base_model.base_model("cpu")
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "curve.svg",
        "lineage.json",
    }
    monkeypatch.setattr(base_model, "train_base_model", lambda *_, **__: pytest.fail("built again"))
    assert base_model.base_model("cpu") == path
    assert tokenizers.load(base_model.base_tokenizer("cpu") / "tokenizer.json").vocab_size == 320


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.activation=relu2", "cannot express .*activation = 'relu2'"),
        ("model.d_ff=1000000", "MB in bfloat16 and the repository has room for 40 MB"),
    ],
)
def test_a_model_that_could_not_be_shipped_is_refused_before_training(run, change, message):
    with pytest.raises(CourseError, match=message):
        base_model.model_config(load_run(run.path, [change]), 320)


@pytest.mark.parametrize("scale", ["cpu", "gpu", "h100x2"])
def test_the_configurations_of_the_course_can_be_shipped(scale):
    run = load_run(base_model.config_path(scale))
    config = base_model.model_config(run, run.data.vocab_size)
    assert config.kv_heads < config.num_heads
    assert config.qk_norm
    assert config.tie_embeddings
    mix = base_model.load_mix(run.data.corpus)
    assert list(mix.corpora) == ["python-docs", "python-code"]


def test_the_model_that_is_shipped_is_of_ten_to_sixteen_million_parameters():
    from shared.models.gpt import GPT

    path = base_model.config_path("cpu").with_name("pydoc-gpt.yaml")
    run = load_run(path)
    config = base_model.model_config(run, run.data.vocab_size)
    with torch.device("meta"):
        assert 10e6 < GPT(config).num_parameters() < 16e6
    short = load_run(base_model.config_path("cpu"))
    tokens = [run.training.tokens_by_context()[0][1] for run in (short, run)]
    assert tokens[1] > 10 * tokens[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpora": {}}, "corpora names none"),
        ({"corpora": {"python-docs": 0.5}}, "add up to 0.5, not 1"),
        ({"corpora": {"python-docs": 1.5}}, r"corpora.python-docs is 1.5; it must be more than 0"),
        ({"keep": {"stories": 0.5}}, "keep names 'stories', which is not among"),
        ({"held_out": {"python-docs": 2}}, "held_out.python-docs is 2;"),
        ({"keep": {"python-docs": 0}}, "keep.python-docs is 0;"),
        ({"special_tokens": ("<pad>",)}, r"lacks <\|endoftext\|>"),
        ({"tokenizer_megabytes": float("nan")}, "tokenizer_megabytes is nan"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(change, message):
    settings = {
        "corpora": {"python-docs": 1.0},
        "special_tokens": ("<|endoftext|>",),
        "tokenizer_megabytes": 1.0,
        "baseline_megabytes": 1.0,
    }
    base_model.Mix(**settings)
    with pytest.raises(CourseError, match=message):
        base_model.Mix(**(settings | change))


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(CourseError, match="no mix of corpora configs/data"):
        base_model.load_mix("python-docs-and-more")
    with pytest.raises(CourseError, match="Unknown scale 'tpu'"):
        base_model.base_tokenizer("tpu")


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    arguments = ["--config", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "run")]
    assert base_model.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("base_model: Cannot read")
    assert error.count("\n") == 1


def test_the_command_trains_and_refuses_a_folder_in_use(run, tmp_path, capsys):
    arguments = ["--config", str(run.path), "--out", str(tmp_path / "out"), "--set", "training.steps=3"]
    assert base_model.main(arguments) == 0
    assert "bits per byte on held-out packages" in capsys.readouterr().out
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert base_model.main(arguments) == 2
    assert "is not empty; add --resume" in capsys.readouterr().err
    assert base_model.main([*arguments, "--resume"]) == 0


def test_baselines_charge_for_the_same_bytes_and_priming_helps(run):
    data = base_model.mixed_data(run)
    found = model_card.baselines(data.training, data.validation, data.mix.corpora, data.tokenizer, 1.0)
    text = model_card.plain_text(data.validation["python-docs"], data.tokenizer)
    size = data.validation_bytes("python-docs")
    assert found["gzip -9"]["python-docs"] == pytest.approx(gzip_bits_per_byte(text) * len(text) / size)
    alone = zstd_bits_per_byte(text) * len(text) / size
    assert found["zstd -19, primed"]["python-docs"] < 0.95 * alone
    assert found["8-gram"]["all"] < 3  # 8 knowing nothing
    for scores in found.values():
        sizes = {name: data.validation_bytes(name) for name in data.validation}
        bits = sum(scores[name] * size for name, size in sizes.items())
        assert scores["all"] == pytest.approx(bits / sum(sizes.values()))


def test_a_sample_of_the_training_text_is_spread_over_all_of_it():
    tokens = np.arange(100 * model_card.PIECE)
    sample = model_card.sample_tokens(tokens, 10 * model_card.PIECE)
    assert len(sample) == 10 * model_card.PIECE
    assert (sample[0], sample[-1]) == (tokens[0], tokens[-1])
    assert len(model_card.sample_tokens(tokens[:50], 100)) == 50


def test_a_thinned_curve_keeps_every_evaluation():
    history = [{"step": step, "tokens": 8 * step, "loss": 5 - step / 100, "lr": 0.1} for step in range(250)]
    history[17] |= {"val_loss": 4.5, "val_bits_per_byte": 2.5}
    points = model_card.points(history, most=50)
    assert 50 <= len(points) <= 51
    assert points[0] == {"step": 0, "tokens": 0, "loss": 5.0}
    assert [point["step"] for point in points if "val_loss" in point] == [17]
    assert points == sorted(points, key=lambda point: point["step"])


def test_backticks_in_a_sample_do_not_end_its_block():
    section = model_card._samples_section({"greedy": {"x": "````\nstill inside"}})
    assert section.count("`````") == 2


def test_the_shipped_model_is_there_or_it_is_said_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model.files, "repository_root", lambda: tmp_path)
    with pytest.raises(CourseError, match=r"models/phase1/pydoc-gpt; fetch the whole repository"):
        base_model.shipped_model()
    folder = tmp_path / "models" / "phase1" / "pydoc-gpt"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert base_model.shipped_model() == folder
