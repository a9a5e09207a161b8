import itertools
import math

import pytest
import torch

from shared.inference import generation
from shared.inference.generation import (
    Sampling,
    beam_search,
    filter_logits,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    generate,
    greedy_decode,
    length_penalty,
    sample_logits,
    stream,
)
from shared.models.gpt import GPT, GPTConfig
from shared.models.transformer import Transformer, TransformerConfig
from shared.runtime.errors import CourseError

V = 40


@pytest.fixture(scope="module", params=["learned", "rope", "alibi"])
def model(request):
    torch.manual_seed(0)
    return GPT(GPTConfig(V, 32, num_layers=2, num_heads=4, d_model=32, position=request.param, init_std=0.3))


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]


def greedy_by_hand(model, prompt, n):
    ids = list(prompt)
    model.eval()
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_takes_the_most_probable_token_at_every_step(model):
    assert generate(model, [PROMPTS[2]], 12) == [greedy_by_hand(model, PROMPTS[2], 12)]


def test_every_row_of_a_batch_gets_what_it_would_get_alone(model):
    together = generate(model, PROMPTS, 20)
    assert together == [greedy_by_hand(model, prompt, 20) for prompt in PROMPTS]
    assert len(set(map(tuple, together))) == len(PROMPTS)


@pytest.mark.parametrize("new", [20, 90])  # within the context of 32, and far beyond it
def test_cached_decoding_gives_the_same_tokens(model, new):
    for settings in ({}, {"temperature": 1.0, "top_k": 10, "seed": 3}):
        assert generate(model, PROMPTS, new, **settings) == generate(
            model, PROMPTS, new, use_cache=False, **settings
        )


def test_a_full_context_forgets_its_earlier_half(model):
    prompt = list(range(30))
    ids = prompt + generate(model, [prompt], 5)[0]
    # 33 tokens do not fit: token 33 comes from the 16 before it.
    assert ids[33] == greedy_by_hand(model, ids[17:33], 1)[0]
    assert ids[34] == greedy_by_hand(model, ids[17:34], 1)[0]


def test_a_prompt_as_long_as_the_context_can_be_continued(model):
    prompt = [i % V for i in range(32)]
    assert generate(model, [prompt], 1)[0] == greedy_by_hand(model, prompt, 1)


def test_the_same_seed_gives_the_same_tokens_whatever_else_draws(model):
    first = generate(model, PROMPTS, 15, temperature=1.0, seed=7)
    torch.rand(100)
    assert generate(model, PROMPTS, 15, temperature=1.0, seed=7) == first
    assert generate(model, PROMPTS, 15, temperature=1.0, seed=8) != first
    state = torch.get_rng_state()
    generate(model, PROMPTS, 3, temperature=1.0, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_row_ends_before_its_own_stop_token(model):
    free = generate(model, PROMPTS, 20)
    stops = {free[0][4], free[2][9]}
    stopped = generate(model, PROMPTS, 20, stop_ids=sorted(stops))
    for row, cut in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(row) if token in stops]
        assert cut == (row[: ends[0]] if ends else row)
    assert len(stopped[0]) <= 4


def test_decoding_stops_when_every_row_has(model, monkeypatch):
    first = generate(model, [PROMPTS[0]], 1)[0][0]
    calls = []
    monkeypatch.setattr(generation, "sample_logits", lambda *a: calls.append(1) or sample_logits(*a))
    assert generate(model, [PROMPTS[0]] * 2, 20, stop_ids=[first]) == [[], []]
    assert len(calls) == 1


def test_streaming_hands_out_the_tokens_of_generate(model):
    for settings in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}):
        expected = generate(model, [PROMPTS[0]], 12, **settings)[0]
        assert list(stream(model, PROMPTS[0], 12, **settings)) == expected
    greedy = generate(model, [PROMPTS[0]], 12)[0]
    assert list(stream(model, PROMPTS[0], 12, stop_ids=[greedy[5]])) == greedy[: greedy.index(greedy[5])]


def test_the_models_mode_is_restored_even_when_a_stream_is_abandoned(model):
    for training in (True, False):
        model.train(training)
        tokens = stream(model, PROMPTS[0], 12)
        next(tokens)
        assert model.training is False
        tokens.close()
        assert model.training is training
        generate(model, PROMPTS, 2)
        assert model.training is training


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], list(range(33))], "prompt has 33 tokens and the model's context holds 32"),
        ([[1], []], "prompt is empty"),
        ([], "no prompt"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_one_sentence(model, prompts, message):
    with pytest.raises(CourseError, match=message):
        generate(model, prompts, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", 1e-30),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2),
    ],
)
def test_a_setting_out_of_range_is_named(model, name, value):
    with pytest.raises(CourseError, match=f"{name} is {value}"):
        generate(model, [[1]], 5, **{name: value})


def test_no_new_tokens_is_fine_and_fewer_is_not(model):
    assert generate(model, PROMPTS, 0) == [[], [], [], []]
    with pytest.raises(CourseError, match="max_new_tokens is -1"):
        generate(model, PROMPTS, -1)


def logits_with_ties():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(6, 50, generator=generator) * 3
    return [smooth, smooth.round(), (smooth / 4).round(), torch.zeros(2, 7)]


@pytest.mark.parametrize("logits", logits_with_ties(), ids=["smooth", "ties", "many ties", "all equal"])
class TestFiltersEqualTransformers:
    @pytest.mark.parametrize("k", [1, 2, 5, 49, 50, 500])
    def test_top_k(self, logits, k):
        from transformers import TopKLogitsWarper

        assert torch.equal(filter_top_k(logits, k), TopKLogitsWarper(k)(None, logits))

    @pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999])
    def test_top_p(self, logits, p):
        from transformers import TopPLogitsWarper

        assert torch.equal(filter_top_p(logits, p), TopPLogitsWarper(p)(None, logits))

    @pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
    def test_min_p(self, logits, p):
        from transformers import MinPLogitsWarper

        assert torch.equal(filter_min_p(logits, p), MinPLogitsWarper(p)(None, logits))

    def test_the_order_of_all_of_them(self, logits):
        from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

        settings = {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1}
        library = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8))
        processors = library._get_logits_processor(GenerationConfig(do_sample=True, **settings), device="cpu")
        assert len(processors) == 4
        assert torch.equal(filter_logits(logits, Sampling(**settings)), processors(None, logits))


def test_sampling_follows_the_filtered_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampling = Sampling(temperature=0.5, top_k=3)
    expected = filter_logits(logits, sampling).softmax(-1)[0]
    generator = torch.Generator().manual_seed(0)
    drawn = sample_logits(logits.expand(20_000, 4), sampling, generator)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 20_000, expected, rtol=0, atol=0.01)
    assert expected[3] == 0


def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    for t in (0.5, 1.0, 2.0):
        measured = filter_logits(logits, Sampling(temperature=t)).softmax(-1)[0, 0].item()
        assert measured == pytest.approx(math.exp(2 / t) / sum(math.exp(x / t) for x in (2, 1, 0)))


BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def translator():
    # A seed and scales for which lengths, beams and penalties make a difference: see the asserts below.
    torch.manual_seed(58)
    config = TransformerConfig(
        5, max_length=12, num_layers=2, num_heads=2, d_model=16, d_ff=32, dropout=0.1, pre_norm=True
    )
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 0.7 if "embedding" in name else 2.0
    return model


SRC = torch.tensor([[3, 4, 3, 4, 4], [4, 3, 0, 0, 0], [3, 3, 3, 4, 0], [4, 4, 4, 0, 0]])


def every_target(model, src, max_length, alpha):
    """Score all targets of at most `max_length` tokens by teacher forcing; return them, best first."""
    model.eval()
    scored = []
    for length in range(1, max_length + 1):
        last = [EOS] if length < max_length else range(5)
        bodies = itertools.product([0, 1, 3, 4], repeat=length - 1)
        targets = torch.tensor([[*body, end] for body in bodies for end in last])  # (N, length)
        inputs = torch.cat((torch.full((len(targets), 1), BOS), targets[:, :-1]), dim=1)
        with torch.no_grad():
            log_p = model(src.expand(len(targets), -1), inputs).log_softmax(-1)
        score = log_p.gather(2, targets[:, :, None]).sum((1, 2)) / length_penalty(length, alpha)
        scored += zip(score.tolist(), targets.tolist(), strict=True)
    return [(score, [t for t in target if t != EOS]) for score, target in sorted(scored, reverse=True)]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
def test_a_beam_that_holds_everything_finds_what_exhaustive_search_finds(translator, alpha):
    found = beam_search(translator, SRC, beam_size=5**3, alpha=alpha, bos_id=BOS, eos_id=EOS, max_length=4)
    for src, target in zip(SRC, found, strict=True):
        ranked = every_target(translator, src, 4, alpha)
        assert ranked[0][0] - ranked[1][0] > 1e-4  # a tie would let either answer pass
        assert target == ranked[0][1]


def test_the_length_penalty_changes_the_winner(translator):
    winners = [
        beam_search(translator, SRC, beam_size=125, alpha=alpha, bos_id=BOS, eos_id=EOS, max_length=4)
        for alpha in (0.0, 1.5)
    ]
    assert sum(map(len, winners[0])) < sum(map(len, winners[1]))


def test_the_length_penalty_is_the_published_one():
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 0.6) == pytest.approx(2**0.6)
    assert length_penalty(7, 0.0) == 1


def test_a_beam_of_one_is_greedy_decoding(translator):
    for alpha in (0.0, 0.6):
        assert beam_search(
            translator, SRC, beam_size=1, alpha=alpha, bos_id=BOS, eos_id=EOS, max_length=10
        ) == greedy_decode(translator, SRC, bos_id=BOS, eos_id=EOS, max_length=10)


def test_greedy_translation_equals_teacher_forced_argmax_sentence_by_sentence(translator):
    together = greedy_decode(translator, SRC, bos_id=BOS, eos_id=EOS, max_length=10)
    translator.eval()
    for src, target in zip(SRC, together, strict=True):
        src, ids = src[src != 0][None], [BOS]
        while len(ids) <= 10:
            with torch.no_grad():
                ids.append(int(translator(src, torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        assert target == [token for token in ids[1:] if token != EOS]


def test_a_sentence_gets_the_same_beam_alone_and_in_a_batch(translator):
    together = beam_search(translator, SRC, beam_size=3, bos_id=BOS, eos_id=EOS, max_length=10)
    for src, target in zip(SRC, together, strict=True):
        alone = beam_search(
            translator, src[src != 0][None], beam_size=3, bos_id=BOS, eos_id=EOS, max_length=10
        )
        assert alone == [target]
    assert together != greedy_decode(translator, SRC, bos_id=BOS, eos_id=EOS, max_length=10)
    assert len(set(map(len, together))) > 1


def test_search_ignores_dropout_and_restores_training_mode(translator):
    translator.train()
    first = beam_search(translator, SRC, beam_size=2, bos_id=BOS, eos_id=EOS, max_length=8)
    assert translator.training
    assert first == beam_search(translator, SRC, beam_size=2, bos_id=BOS, eos_id=EOS, max_length=8)


def test_a_target_longer_than_the_model_allows_is_one_sentence(translator):
    with pytest.raises(CourseError, match="13 target tokens"):
        greedy_decode(translator, SRC, bos_id=BOS, eos_id=EOS, max_length=13)
    with pytest.raises(CourseError, match="13 target tokens"):
        beam_search(translator, SRC, beam_size=2, bos_id=BOS, eos_id=EOS, max_length=13)


def test_a_beam_of_none_is_refused(translator):
    with pytest.raises(ValueError, match="beam_size is 0"):
        beam_search(translator, SRC, beam_size=0, bos_id=BOS, eos_id=EOS, max_length=3)
