import pytest
import torch

from shared.inference.kv_cache import KVCache
from shared.models.gpt import GPT, GPTConfig
from shared.runtime.errors import CourseError


def random(*shape):
    return torch.randn(shape)


def test_what_was_kept_comes_back_in_order_for_every_layer():
    cache = KVCache(num_layers=2, batch=3, num_kv_heads=4, max_length=10, head_dim=5)
    parts = [[(random(3, 4, T, 5), random(3, 4, T, 5)) for _ in range(2)] for T in (6, 1, 3)]
    for done, part in enumerate(parts):
        for layer in range(2):
            keys, values = cache.update(layer, *part[layer])
            torch.testing.assert_close(
                keys, torch.cat([p[layer][0] for p in parts[: done + 1]], 2), rtol=0, atol=0
            )
            torch.testing.assert_close(
                values, torch.cat([p[layer][1] for p in parts[: done + 1]], 2), rtol=0, atol=0
            )
        cache.advance(part[0][0].shape[2])
    assert cache.length == 10


def test_one_position_too_many_is_one_sentence_and_keeps_what_there_is():
    cache = KVCache(1, 1, 1, 4, 2)
    first = random(1, 1, 3, 2)
    cache.update(0, first, first)
    cache.advance(3)
    with pytest.raises(CourseError, match="room for 4 positions and 5 are needed"):
        cache.update(0, random(1, 1, 2, 2), random(1, 1, 2, 2))
    keys, _ = cache.update(0, random(1, 1, 1, 2), random(1, 1, 1, 2))
    torch.testing.assert_close(keys[:, :, :3], first, rtol=0, atol=0)


def test_rows_follow_their_parents_even_when_one_parent_has_several_children():
    cache = KVCache(2, 3, 1, 4, 2)
    stored = [random(3, 1, 2, 2) for _ in range(2)]
    for layer in range(2):
        cache.update(layer, stored[layer], -stored[layer])
    cache.advance(2)
    cache.last_token = torch.tensor([[7], [8], [9]])
    cache.reorder(torch.tensor([2, 0, 2]))
    new = random(3, 1, 1, 2)
    for layer in range(2):
        keys, values = cache.update(layer, new, new)
        torch.testing.assert_close(keys[:, :, :2], stored[layer][[2, 0, 2]], rtol=0, atol=0)
        torch.testing.assert_close(values[:, :, :2], -stored[layer][[2, 0, 2]], rtol=0, atol=0)
    assert cache.last_token.tolist() == [[9], [7], [9]]


@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_a_models_cache_has_its_shapes_dtype_and_predicted_size(num_kv_heads):
    config = GPTConfig(50, 16, num_layers=3, num_heads=4, d_model=32, num_kv_heads=num_kv_heads)
    model = GPT(config).bfloat16()
    cache = KVCache.for_model(model, batch=2, max_length=16)
    heads = num_kv_heads or 4
    keys, _ = cache.update(2, random(2, heads, 1, 8).bfloat16(), random(2, heads, 1, 8).bfloat16())
    assert keys.dtype == torch.bfloat16
    assert cache.num_bytes == 2 * 3 * 2 * heads * 8 * 16 * 2


def test_a_cleared_cache_starts_again():
    cache = KVCache(1, 1, 1, 4, 2)
    cache.update(0, random(1, 1, 4, 2), random(1, 1, 4, 2))
    cache.advance(4)
    cache.clear()
    new = random(1, 1, 1, 2)
    keys, _ = cache.update(0, new, new)
    torch.testing.assert_close(keys, new, rtol=0, atol=0)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "bias": False},
        {"position": "alibi", "window": 5},
        {"position": "sinusoidal", "attention": "plain"},
        {"position": "rope", "qk_norm": True, "bigram_embedding": True, "activation": "relu2"},
    ],
    ids=lambda choices: choices.get("position", "gpt2"),
)
@pytest.mark.parametrize("padded", [False, True])
def test_cached_logits_equal_those_of_a_whole_forward_pass(choices, padded):
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 24, num_layers=2, num_heads=4, d_model=32, init_std=0.3, **choices)).eval()
    if choices.get("bigram_embedding"):
        torch.nn.init.normal_(model.bigram_embedding.weight)
    ids = torch.randint(50, (3, 20))
    padding = torch.tensor([0, 3, 6]) if padded else None
    cache = KVCache.for_model(model, 3, 24)
    with torch.inference_mode():
        whole, _ = model(ids, left_padding=padding)
        pieces = [
            model(part, cache=cache, left_padding=padding)[0] for part in ids.split([9, 1, 1, 4, 1, 4], dim=1)
        ]
    real = torch.arange(20) >= (padding if padded else torch.zeros(3))[:, None]
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=1e-4, atol=1e-4)
    assert whole[real].std() > 0.5  # otherwise equal to within 1e-4 would say little
