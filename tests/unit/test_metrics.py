import argparse
import gzip
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.evaluation import metrics


class Recorder(nn.Module):
    """A causal language model whose logits depend on the whole prefix, and which notes what it was asked."""

    def __init__(self, vocab_size=11):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocab_size, vocab_size)
        self.predicted = []
        self.was_training = []

    def logits(self, ids):
        return self.embedding(ids).cumsum(1)

    def forward(self, ids, targets):
        self.predicted += targets.flatten().tolist()
        self.was_training.append(self.training)
        return None, F.cross_entropy(self.logits(ids).float().flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("n", [2, 3, 8, 9, 16, 17, 18, 40, 57])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_token_but_the_first_is_predicted_exactly_once_and_in_order(n, batch_size):
    model = Recorder(vocab_size=64)
    score = metrics.evaluate_lm(model, list(range(n)), context_length=8, batch_size=batch_size)
    assert model.predicted == list(range(1, n))
    assert score.tokens == n - 1


def test_the_score_is_the_sum_over_windows_computed_one_by_one():
    model, T = Recorder(), 8
    tokens = torch.randint(11, (53,), generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for start in range(0, 52, T):
        window = tokens[start : start + T + 1]
        logp = F.log_softmax(model.logits(window[None, :-1]), dim=-1)[0]
        expected -= logp[torch.arange(len(window) - 1), window[1:]].double().sum().item()
    score = metrics.evaluate_lm(model, tokens, context_length=T, batch_size=3)
    assert score.total_nats == pytest.approx(expected, rel=1e-6)
    assert score.nats_per_token == pytest.approx(expected / 52, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(expected / 52), rel=1e-5)
    assert score.bits_per_byte(104) == pytest.approx(expected / math.log(2) / 104, rel=1e-6)


def test_the_batch_size_and_the_container_do_not_change_the_score(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 11, 100).astype(np.uint16)
    mapped = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="w+", shape=100)
    mapped[:] = tokens
    scores = [
        metrics.evaluate_lm(Recorder(), data, context_length=8, batch_size=size).total_nats
        for data, size in [(tokens, 1), (mapped, 5), (tokens.tolist(), 32)]
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_the_model_is_scored_in_evaluation_mode_and_put_back():
    for training in (True, False):
        model = Recorder().train(training)
        metrics.evaluate_lm(model, list(range(10)), context_length=4)
        assert model.training is training
        assert not any(model.was_training)


def test_autocast_reaches_the_model():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, ids, targets):
            self.seen = self.layer(F.one_hot(ids, 4).float()).dtype
            return None, torch.tensor(1.0)

    model = Linear()
    metrics.evaluate_lm(model, [0, 1, 2, 3], context_length=3, dtype=torch.bfloat16)
    assert model.seen == torch.bfloat16
    metrics.evaluate_lm(model, [0, 1, 2, 3], context_length=3)
    assert model.seen == torch.float32


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="1 tokens"):
        metrics.evaluate_lm(Recorder(), [1], context_length=8)


def test_a_uniform_model_over_256_bytes_pays_eight_bits_per_byte():
    n = 1000
    assert metrics.nats_to_bits_per_byte(n * math.log(256), n) == pytest.approx(8)
    assert metrics.perplexity(math.log(256)) == pytest.approx(256)
    with pytest.raises(ValueError, match="n_bytes"):
        metrics.nats_to_bits_per_byte(1.0, 0)


def test_bleu_is_100_for_a_copy_and_follows_the_formula_for_a_near_miss():
    reference = "the cat sat on the mat today"
    assert metrics.bleu([reference], [reference]) == pytest.approx(100)
    # One of seven words wrong at the end: precisions 6/7, 5/6, 4/5, 3/4, no brevity penalty.
    expected = 100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
    assert metrics.bleu(["the cat sat on the mat yesterday"], [reference]) == pytest.approx(expected)


def test_bleu_over_characters_tells_dates_apart():
    assert metrics.bleu(["2024-03-05"], ["2024-03-06"], tokenize="char") == pytest.approx(
        100 * (9 / 10 * 8 / 9 * 7 / 8 * 6 / 7) ** 0.25
    )


def test_exact_match_counts_equal_pairs():
    assert metrics.exact_match(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == 0.75


@pytest.mark.parametrize("score", [metrics.bleu, metrics.exact_match])
@pytest.mark.parametrize(("hypotheses", "references"), [([], []), (["a"], ["a", "b"])])
def test_unpaired_or_no_sentences_are_refused(score, hypotheses, references):
    with pytest.raises(ValueError, match="references"):
        score(hypotheses, references)


TEXT = "".join(f"The {i * i % 97} houses of street {i} have {i * 7 % 13} doors.\n" for i in range(400))


def test_compressed_sizes_are_those_of_files_that_decompress():
    data = TEXT.encode()
    packed = gzip.compress(data, 9, mtime=0)
    assert gzip.decompress(packed) == data
    assert metrics.gzip_bits_per_byte(TEXT) == pytest.approx(8 * len(packed) / len(data))
    assert metrics.xz_bits_per_byte(data) == pytest.approx(
        8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    )
    assert 0 < metrics.zstd_bits_per_byte(TEXT) < 3


def test_random_bytes_do_not_compress():
    noise = np.random.default_rng(0).bytes(20_000)
    for compressor in (metrics.gzip_bits_per_byte, metrics.xz_bits_per_byte, metrics.zstd_bits_per_byte):
        assert 8 <= compressor(noise) < 8.05


def test_a_dictionary_of_the_same_kind_of_text_helps_zstd_and_noise_does_not():
    text = Path(argparse.__file__).read_bytes()  # 100 kB of real text that every Python has
    before, after = text[:80_000], text[80_000:]
    cold = metrics.zstd_bits_per_byte(after)
    primed = metrics.zstd_bits_per_byte(after, dictionary=before)
    noise = metrics.zstd_bits_per_byte(after, dictionary=np.random.default_rng(0).bytes(len(before)))
    assert primed < 0.95 * cold
    assert noise > 0.98 * cold


def test_the_whole_dictionary_is_within_reach():
    rng = np.random.default_rng(0)
    passage, filler = rng.bytes(2000), rng.bytes(3_000_000)
    assert metrics.zstd_bits_per_byte(passage, dictionary=passage + filler) < 0.2


def test_empty_text_is_refused():
    for compressor in (metrics.gzip_bits_per_byte, metrics.xz_bits_per_byte, metrics.zstd_bits_per_byte):
        with pytest.raises(ValueError, match="empty"):
            compressor("")
