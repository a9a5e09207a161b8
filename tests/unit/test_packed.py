import pytest
import torch
from torch import nn

from shared.inference import packed
from shared.inference.generation import generate
from shared.models.gpt import GPT, GPTConfig

needs_onednn = pytest.mark.skipif(not packed.can_pack(nn.Linear(1, 1)), reason="no oneDNN on this CPU")


def wide_model(**choices):
    torch.manual_seed(0)
    return GPT(GPTConfig(700, 64, num_layers=2, num_heads=4, d_model=256, init_std=0.1, **choices))


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_packed_layer_computes_what_the_layer_does_for_any_number_of_rows(bias, rows):
    torch.manual_seed(0)
    layer = nn.Linear(300, 500, bias=bias)
    fast = packed.PackedLinear(layer, rows)
    with torch.inference_mode():
        for shape in [(1, 300), (8, 1, 300), (3, 17, 300)]:
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {
            "position": "rope",
            "norm": "rmsnorm",
            "activation": "swiglu",
            "num_kv_heads": 2,
            "tie_embeddings": False,
        },
    ],
    ids=["gpt2", "modern"],
)
def test_a_packed_model_gives_the_same_logits_and_greedy_tokens(choices, monkeypatch):
    model = wide_model(**choices)
    fast = packed.pack(model, rows=3)
    assert any(isinstance(module, packed.PackedLinear) for module in fast.modules())
    ids = torch.randint(700, (3, 20))
    with torch.inference_mode():
        expected = model.eval()(ids)[0]
        torch.testing.assert_close(fast(ids)[0], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5
    prompts = [*ids.tolist(), [5]]
    calls, original = [], packed.pack
    monkeypatch.setattr(packed, "pack", lambda *a, **k: calls.append(1) or original(*a, **k))
    fast_tokens = generate(model, prompts, 30)
    assert calls == [1]
    monkeypatch.setattr(packed, "can_pack", lambda model: False)
    assert fast_tokens == generate(model, prompts, 30)


@needs_onednn
def test_the_original_is_left_as_it_was_and_shares_what_is_not_packed():
    model = wide_model().train()
    names = {name: id(module) for name, module in model.named_modules()}
    fast = packed.pack(model, rows=8)
    assert any(isinstance(module, packed.PackedLinear) for module in fast.modules())
    assert model.training
    assert not fast.training
    assert {name: id(module) for name, module in model.named_modules()} == names
    assert fast.token_embedding.weight is model.token_embedding.weight
    assert isinstance(model.head, nn.Linear)


@needs_onednn
def test_matrices_too_small_to_profit_stay_as_they_are():
    fast = packed.pack(wide_model(), rows=1)  # 700×256 and up to 1024×256 weights
    assert not any(isinstance(module, packed.PackedLinear) for module in fast.modules())


def test_generation_after_a_training_step_uses_the_new_weights():
    model, prompts = wide_model(), [[i, 2 * i, 3] for i in range(8)]
    before = generate(model, prompts, 30)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    after = generate(model, prompts, 30)
    assert after != before
    assert after == generate(model, prompts, 30, use_cache=False)


def test_other_dtypes_and_autocast_are_left_alone():
    assert not packed.can_pack(wide_model().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not packed.can_pack(wide_model())
        assert len(generate(wide_model(), [[1, 2, 3]], 30)[0]) == 30
