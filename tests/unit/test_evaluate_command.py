"""`course evaluate`: the numbers are those of a computation by hand, and bad input is one sentence."""

import json
import math

import pytest
import torch

from shared import cli
from shared.data.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer
from shared.models.gpt import GPT, GPTConfig
from shared.models.model_utils import load_model, save_model
from shared.models.transformer import Transformer, TransformerConfig

TEXT = "a cab, a bed, a bad face; é and a dab of decaf.\n" * 3
CONTEXT = 16


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def save(folder, tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.vocab_size, CONTEXT, num_layers=1, num_heads=2, d_model=16, init_std=0.5)
    save_model(GPT(config), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "char", CharTokenizer.from_text(TEXT))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "bpe", BPETokenizer.train([TEXT], 270, (END_OF_TEXT,)))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(capsys, folder, *more):
    status = cli.main(["evaluate", "--model", str(folder), *map(str, more)])
    return status, *capsys.readouterr()


def report(capsys, folder, *more):
    status, out, _ = run(capsys, folder, *more, "--dtype", "float32", "--json")
    assert status == 0
    return json.loads(out)


def by_hand(folder, ids, window):
    """Nats of every token but the first, window by window, from log-probabilities."""
    model = load_model(folder)
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[start : start + window + 1]])
        log_p = model(piece[:, :-1])[0].log_softmax(-1)
        total -= log_p.gather(-1, piece[:, 1:, None]).sum().item()
    return total


@pytest.mark.parametrize("window", [CONTEXT, 5])
def test_every_token_is_predicted_once_and_the_numbers_follow(capsys, characters, text, window):
    found = report(capsys, characters, "--data", text, "--window", window)
    nats = by_hand(characters, CharTokenizer.from_text(TEXT).encode(TEXT), window)
    assert (found["tokens"], found["window"], found["stride"]) == (len(TEXT) - 1, window, window)
    assert found["bytes"] == len(TEXT.encode()) - 1  # nothing precedes the first character
    assert found["nats_per_token"] == pytest.approx(nats / (len(TEXT) - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)


def test_an_end_of_text_token_lets_the_first_token_be_predicted(capsys, pairs, text):
    tokenizer = BPETokenizer.train([TEXT], 270, (END_OF_TEXT,))
    end = tokenizer.special_tokens[END_OF_TEXT]
    ids = [end, *tokenizer.encode(TEXT), end]
    found = report(capsys, pairs, "--data", text)
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, len(TEXT.encode()))
    nats = by_hand(pairs, ids, CONTEXT)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_a_folder_is_read_whole(capsys, pairs, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(TEXT, encoding="utf-8")
    found = report(capsys, pairs, "--data", folder)
    assert (found["documents"], found["bytes"]) == (2, 2 * len(TEXT.encode()))


def test_of_a_corpus_the_part_that_is_held_out_is_read(capsys, pairs):
    from shared.data import corpora

    for share in (0.1, 0.02):
        held_out = corpora.load("stories").split(share)[1]
        found = report(capsys, pairs, "--corpus", "stories", "--validation", share)
        assert found["bytes"] == sum(len(document.text.encode()) for document in held_out)
        assert "stories" in found["text"]


def test_without_json_the_numbers_go_to_stdout_with_window_and_stride(capsys, characters, text):
    status, out, err = run(capsys, characters, "--data", text, "--dtype", "float32")
    assert status == 0
    for part in (
        "nats per token",
        "perplexity",
        "bits per byte",
        "windows of 16 tokens, stride 16",
        "float32",
    ):
        assert part in out
    assert " s" in err


def refused(capsys, folder, *more):
    status, out, err = run(capsys, folder, *more)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    return err


def test_bad_input_is_one_sentence(capsys, characters, pairs, text, tmp_path):
    assert "Name one text" in refused(capsys, characters)
    assert "Name one text" in refused(capsys, characters, "--data", text, "--corpus", "stories")
    assert "Name one text" in refused(capsys, characters, "--corpus", "text")
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", "--data", text)
    assert "nowhere" in refused(capsys, characters, "--data", tmp_path / "nowhere")
    assert "no corpus 'novels'" in refused(capsys, characters, "--corpus", "novels")
    assert "the model's context 16" in refused(capsys, characters, "--data", text, "--window", "17")
    assert "--dtype is 'int8'" in refused(capsys, characters, "--data", text, "--dtype", "int8")
    assert "--validation is 1.5" in refused(capsys, pairs, "--corpus", "stories", "--validation", "1.5")
    text.write_bytes(b"ab\xff")
    assert "not UTF-8 at byte 2" in refused(capsys, characters, "--data", text)
    text.write_text("a Zebra")
    assert "Z" in refused(capsys, characters, "--data", text)


def test_an_encoder_decoder_is_refused(capsys, text, tmp_path):
    model = Transformer(TransformerConfig(9, num_layers=1, num_heads=1, d_model=4, d_ff=4))
    save_model(model, tmp_path / "model", CharTokenizer.from_text("abc"))
    refused(capsys, tmp_path / "model", "--data", text)
