import json
import sys

import pytest
import torch

from shared import cli
from shared.cli.generate import text_pieces
from shared.data.tokenizers import BPETokenizer, CharTokenizer
from shared.models.gpt import GPT, GPTConfig
from shared.models.model_utils import save_model
from shared.models.transformer import Transformer, TransformerConfig


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def a_model(vocab_size, **choices):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size, 32, num_layers=1, num_heads=2, d_model=16, init_std=0.5, **choices))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = CharTokenizer.from_text("abcdefgh \n")
    path = tmp_path_factory.mktemp("saved") / "model"
    save_model(a_model(tokenizer.vocab_size), path, tokenizer)
    return path


def run(capsys, folder, *more, prompt="abc"):
    status = cli.main(["generate", "--model", str(folder), "--prompt", prompt, *more])
    return status, *capsys.readouterr()


def test_the_text_goes_to_stdout_and_everything_else_to_stderr(capsys, folder):
    status, out, err = run(capsys, folder, "--max-new-tokens", "20", "--seed", "1")
    assert status == 0
    assert out.startswith("abc")
    assert len(out) == 3 + 20 + 1
    assert "20 tokens" in err
    assert "seed 1" in err


def test_streamed_whole_and_json_give_the_same_text(capsys, folder):
    settings = ("--seed", "5", "--top-k", "6", "--top-p", "0.9", "--min-p", "0.01", "--max-new-tokens", "15")
    streamed = run(capsys, folder, *settings)[1]
    whole = run(capsys, folder, *settings, "--no-stream")[1]
    report = json.loads(run(capsys, folder, *settings, "--json")[1])
    assert streamed == whole == report["prompt"] + report["completion"] + "\n"
    assert (report["tokens"], report["seed"]) == (15, 5)
    assert run(capsys, folder, *settings[2:], "--seed", "6")[1] != streamed


def test_the_printed_seed_repeats_the_text(capsys, folder):
    first = json.loads(run(capsys, folder, "--json", "--temperature", "1.5")[1])
    again = json.loads(run(capsys, folder, "--json", "--temperature", "1.5", "--seed", str(first["seed"]))[1])
    assert again["completion"] == first["completion"]


def test_a_character_split_over_tokens_is_printed_once_it_is_complete():
    tokenizer = BPETokenizer.train(["aéz"], 256 + 1)  # bytes only: é is two tokens
    ids, kept = tokenizer.encode("aéz"), []
    assert len(ids) == 4
    assert list(text_pieces(tokenizer, iter(ids), kept)) == ["a", "é", "z"]
    assert kept == ids
    assert list(text_pieces(tokenizer, iter(ids[:2]), [])) == ["a", "\ufffd"]


def test_the_prompt_can_come_from_standard_input(capsys, folder, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gh")))
    _, out, _ = run(capsys, folder, "--max-new-tokens", "3", prompt="-")
    assert out.startswith("gh")
    assert len(out) == 6
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gh\xff")))
    assert "not UTF-8 at byte 2" in refused(capsys, folder, prompt="-")


def refused(capsys, folder, *more, prompt="abc"):
    status, out, err = run(capsys, folder, *more, prompt=prompt)
    assert status == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    return err


def test_a_missing_folder_is_one_sentence(capsys, tmp_path):
    assert "nowhere" in refused(capsys, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("size", [None, 0, 10])
def test_a_missing_or_truncated_file_is_one_sentence_that_names_it(capsys, folder, tmp_path, name, size):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    if size is None:
        (broken / name).unlink()
    else:
        (broken / name).write_bytes((folder / name).read_bytes()[:size])
    assert name in refused(capsys, broken)


def test_an_empty_or_too_long_prompt_is_one_sentence(capsys, folder):
    assert "empty" in refused(capsys, folder, prompt="")
    assert "33 tokens and the model's context holds 32" in refused(capsys, folder, prompt="a" * 33)


@pytest.mark.parametrize(
    "option", [("--temperature", "-1"), ("--top-k", "0"), ("--top-p", "0"), ("--min-p", "7")]
)
def test_a_setting_out_of_range_is_one_sentence(capsys, folder, option):
    refused(capsys, folder, *option)


def test_an_encoder_decoder_is_refused(capsys, tmp_path):
    model = Transformer(TransformerConfig(9, num_layers=1, num_heads=1, d_model=4, d_ff=4))
    save_model(model, tmp_path / "model", CharTokenizer.from_text("abc"))
    assert "holds a Transformer" in refused(capsys, tmp_path / "model")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(capsys, tmp_path):
    save_model(a_model(3), tmp_path / "model", CharTokenizer.from_text("abcdef"))
    assert "has 6 tokens and the model 3" in refused(capsys, tmp_path / "model")
