"""GPT: parity with transformers' GPT-2, and what every choice of architecture must keep."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data import corpora
from shared.data.datasets import TokenLoader
from shared.data.tokenizers import CharTokenizer
from shared.inference.kv_cache import KVCache
from shared.models.gpt import GPT, PRESETS, GPTConfig
from shared.models.model_utils import gpt_to_hf
from shared.runtime.errors import CourseError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CHOICES = {
    "gpt2": {},
    "plain attention": {"attention": "plain"},
    "sdpa": {"attention": "sdpa"},
    "tiled attention": {"attention": "tiled"},
    "sinusoidal": {"position": "sinusoidal"},
    "no positions": {"position": "none"},
    "alibi": {"position": "alibi"},
    "alibi, window, tiled": {"position": "alibi", "window": 4, "attention": "tiled"},
    "rope, grouped": {"position": "rope", "num_kv_heads": 2},
    "rope, multi-query, sdpa": {"position": "rope", "num_kv_heads": 1, "attention": "sdpa"},
    "window": {"window": 4},
    "bigrams": {"bigram_embedding": True},
    "llama": {
        "norm": "rmsnorm", "position": "rope", "activation": "swiglu", "d_ff": 20, "bias": False,
        "tie_embeddings": False,
    },
    "course": {
        "norm": "rmsnorm", "norm_affine": False, "position": "rope", "activation": "relu2", "qk_norm": True,
        "bias": False, "tie_embeddings": False, "bigram_embedding": True, "window": 6,
    },
}  # fmt: skip
every_choice = pytest.mark.parametrize("choice", CHOICES)


def tiny(choice="gpt2", **more) -> GPT:
    """A GPT whose every weight is far from its start, so that nothing is hidden behind a zero or a one."""
    torch.manual_seed(0)
    options = {"vocab_size": 23, "context_length": 16, "num_layers": 2, "num_heads": 4, "d_model": 16}
    model = GPT(GPTConfig(**options | CHOICES[choice] | more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(B=3, T=12, V=23):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def test_logits_loss_and_gradients_equal_transformers_gpt2():
    model = tiny()
    theirs, ids = gpt_to_hf(model), tokens()
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    expected = theirs(ids, labels=ids)
    torch.testing.assert_close(logits, expected.logits[:, :-1], **CLOSE)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    loss.backward()
    expected.loss.backward()
    outside, layer = theirs.transformer, theirs.transformer.h[1]
    for ours, wanted in (
        (model.token_embedding.weight, outside.wte.weight.grad),
        (model.position_embedding.weight, outside.wpe.weight.grad),
        (model.blocks[1].attention.qkv.weight, layer.attn.c_attn.weight.grad.T),
        (model.blocks[1].attention.out.bias, layer.attn.c_proj.bias.grad),
        (model.blocks[1].mlp.up.weight, layer.mlp.c_fc.weight.grad.T),
        (model.blocks[1].norms[0].weight, layer.ln_1.weight.grad),
        (model.norm.bias, outside.ln_f.bias.grad),
    ):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(ours.grad, wanted, **CLOSE)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_published_sizes_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert GPT(PRESETS[name]).num_parameters() == count


@every_choice
@given(position=st.integers(0, 10), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_a_later_token_does_not_change_earlier_logits(choice, position, seed):
    model, ids = tiny(choice), tokens()
    changed = ids.clone()
    changed[:, position + 1 :] = torch.randint(
        23, (3, 11 - position), generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        before, after = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(before[:, : position + 1], after[:, : position + 1], rtol=0, atol=1e-5)


@every_choice
def test_an_earlier_token_changes_later_logits(choice):
    model, ids = tiny(choice), tokens()
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 23
    with torch.no_grad():
        difference = (model(ids)[0] - model(changed)[0]).abs().amax(-1)
    assert (difference[:, 5:8] > 1e-3).all()


@every_choice
def test_logits_with_a_cache_equal_logits_without(choice):
    model, ids = tiny(choice).eval(), tokens()
    with torch.no_grad():
        whole = model(ids)[0]
        cache = KVCache.for_model(model, batch=3, max_length=12)
        pieces = [model(part, cache=cache)[0] for part in ids.split((5, 1, 3, 1, 1, 1), dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)


@every_choice
def test_a_padded_row_gives_what_it_gives_alone(choice):
    model, ids = tiny(choice).eval(), tokens()
    padding = torch.tensor([0, 4, 7])
    batch = ids.masked_fill(torch.arange(12) < padding[:, None], 9)
    with torch.no_grad():
        together = model(batch, left_padding=padding)[0]
        cache = KVCache.for_model(model, batch=3, max_length=12)
        parts = [
            model(part, cache=cache, left_padding=padding)[0] for part in batch.split((9, 1, 1, 1), dim=1)
        ]
        for row, pad in enumerate(padding.tolist()):
            alone = model(ids[row : row + 1, pad:])[0][0]
            torch.testing.assert_close(together[row, pad:], alone, **CLOSE)
            torch.testing.assert_close(torch.cat(parts, dim=1)[row, pad:], alone, **CLOSE)
    assert together.isfinite().all()


@every_choice
def test_the_loss_alone_equals_the_loss_beside_the_logits(choice):
    model, ids = tiny(choice), tokens()
    targets = tokens().roll(-1, 1)
    targets[0, :5] = -100
    logits, loss = model(ids, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    nothing, alone = model(ids, targets, loss_only=True)
    assert nothing is None
    torch.testing.assert_close(alone, loss)
    alone.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_last_only_gives_the_last_logits():
    model, ids = tiny(), tokens()
    torch.testing.assert_close(model(ids, last_only=True)[0], model(ids)[0][:, -1:])


@pytest.mark.parametrize("choice", ["gpt2", "course", "llama"])
def test_implementations_of_attention_give_the_same_model(choice):
    ids = tokens()
    with torch.no_grad():
        outputs = [tiny(choice, attention=name)(ids)[0] for name in ("plain", "sdpa", "tiled", "auto")]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], **CLOSE)


def test_a_window_hides_what_lies_further_back():
    model, ids = tiny(num_layers=1, window=4, position="none"), tokens()
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 23
    with torch.no_grad():
        moved = (model(ids)[0] - model(changed)[0]).abs().amax((0, 2)) > 1e-4
    assert moved.tolist() == [False, False, True, True, True, True] + [False] * 6


def test_initial_weights_have_gpt2s_spread():
    torch.manual_seed(0)
    model = GPT(GPTConfig(500, 64, 8, 4, 64))
    block = model.blocks[3]
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (block.attention.out, block.mlp.down):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        assert (projection.bias == 0).all()


def test_sinusoidal_positions_start_as_large_as_learned_ones_and_leave_the_tokens_audible():
    text = corpora.load("stories").text()
    tokenizer = CharTokenizer.from_text(text)
    loader = TokenLoader(tokenizer.encode(text), 16, 32, seed=0)

    def trained(scale: float) -> float:
        torch.manual_seed(0)
        model = GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 96, position="sinusoidal"))
        assert model.position_table.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-3)
        model.position_table.mul_(scale)
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        for step in range(100):
            loss = model(*loader.batch(step))[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert trained(1.0) < 2.75  # learned positions: 2.52
    assert trained(1 / (0.02 * math.sqrt(2))) > 2.9  # the paper's table as it is


def test_with_zero_initialisation_a_new_model_knows_nothing_and_still_learns():
    torch.manual_seed(0)
    model = GPT(GPTConfig(23, 16, 2, 4, 16, zero_init=True, tie_embeddings=False, bigram_embedding=True))
    _, loss = model(tokens(), tokens().roll(-1, 1))
    assert loss.item() == pytest.approx(math.log(23), abs=1e-6)
    loss.backward()
    assert model.head.weight.grad.abs().max() > 0
    tied = GPT(GPTConfig(23, 16, 2, 4, 16, zero_init=True))
    assert tied.token_embedding.weight.std() > 0.01


def test_pairs_of_tokens_have_rows_of_their_own():
    model = tiny("bigrams")
    ids = torch.tensor([[3, 4, 3, 4, 5]])
    rows = model._pairs(ids, slice(0, 5), None)
    assert rows.tolist() == [[23 * 23, 3 * 23 + 4, 4 * 23 + 3, 3 * 23 + 4, 4 * 23 + 5]]


def test_pairs_of_a_large_vocabulary_are_hashed_evenly():
    with torch.device("meta"):
        model = GPT(GPTConfig(8192, 2000, 1, 1, 8, bigram_embedding=True))
    ids = torch.randint(8192, (50, 2000), generator=torch.Generator().manual_seed(0))
    rows = model._pairs(ids, slice(0, 2000), None)[:, 1:]
    assert model.bigram_embedding.num_embeddings == 65_537
    assert rows.min() >= 0
    assert rows.max() < 65_536
    # 99,950 balls into 65,536 urns leave e^(−1.525) = 21.8 % of them empty
    assert 1 - rows.unique().numel() / 65_536 == pytest.approx(0.218, abs=0.01)


def test_counting_without_embeddings_leaves_the_matmuls_and_norms():
    model = tiny()
    outside = 23 * 16 + 16 * 16
    assert model.num_parameters() - model.num_parameters(embeddings=False) == outside


def test_flops_are_six_a_weight_and_twelve_a_score():
    model = GPT(GPTConfig(23, 16, 2, 4, 16, window=8))
    weights = 2 * (4 * 16 * 16 + 8 * 16 * 16) + 23 * 16
    assert model.flops_per_token(5) == 6 * weights + 12 * 2 * 16 * 5
    assert model.flops_per_token(16) == 6 * weights + 12 * 2 * 16 * 8


def test_dropout_acts_in_training_only():
    model, ids = tiny(dropout=0.3), tokens()
    assert not torch.equal(model(ids)[0], model(ids)[0])
    assert torch.equal(model.eval()(ids)[0], model(ids)[0])


def test_gradients_flow_in_bfloat16_autocast():
    model, ids = tiny("course"), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(ids, ids.roll(-1, 1))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    _, exact = model(ids, ids.roll(-1, 1))
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_text_longer_than_the_context_is_refused_with_and_without_a_cache():
    model = tiny()
    with pytest.raises(CourseError, match="17 tokens do not fit in the model's context of 16"):
        model(tokens(T=17))
    cache = KVCache.for_model(model, batch=3, max_length=20)
    with torch.no_grad():
        model(tokens(T=12), cache=cache)
    with pytest.raises(CourseError, match="17 tokens do not fit"):
        model(tokens(T=5), cache=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batchnorm"}, "norm is 'batchnorm'; choose one of layernorm, rmsnorm"),
        ({"position": "rotary"}, "position is 'rotary'; choose one of learned"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose one of gelu_tanh"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"num_heads": 3}, "d_model 16 must be a multiple of num_heads 3"),
        ({"num_kv_heads": 3}, "and that of num_kv_heads 3"),
        ({"d_model": 12, "position": "rope"}, "position 'rope' needs an even width"),
        ({"num_layers": 0}, "num_layers is 0; it must be a whole number of at least 1"),
        ({"num_layers": 2.0}, "num_layers is 2.0; it must be a whole number"),
        ({"window": 0}, "window is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be a number above 0"),
        ({"init_std": -0.02}, "init_std is -0.02"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"attention": "tiled", "dropout": 0.1}, "attention 'tiled' has no dropout"),
        ({"width": 3}, "Unknown model setting 'width'; choose from vocab_size"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(options, message):
    settings_ = {"vocab_size": 23, "context_length": 16, "num_layers": 2, "num_heads": 4, "d_model": 16}
    with pytest.raises(CourseError, match=message):
        GPTConfig.from_dict(settings_ | options)


def test_missing_settings_are_named():
    with pytest.raises(CourseError, match="lack num_layers, d_model"):
        GPTConfig.from_dict({"vocab_size": 23, "context_length": 16, "num_heads": 4})


def test_importing_gpt_needs_torch_alone():
    code = "import sys, shared.models.gpt; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"transformers", "safetensors", "pandas", "matplotlib", "psutil"} & set(loaded.split())
