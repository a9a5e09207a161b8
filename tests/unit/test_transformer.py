"""The encoder–decoder: parity with nn.Transformer, masks, incremental decoding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.inference.kv_cache import KVCache
from shared.models.attention import record_attention
from shared.models.transformer import Transformer, TransformerConfig
from shared.runtime.errors import CourseError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SMALL = {
    "vocab_size": 30,
    "max_length": 20,
    "num_layers": 2,
    "num_heads": 4,
    "d_model": 16,
    "d_ff": 24,
    "dropout": 0.0,
}


def model_and_batch(**options):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL | options))
    src, tgt = torch.randint(1, 30, (3, 9)), torch.randint(1, 30, (3, 7))
    src[1, 5:] = 0
    src[2, 8:] = 0
    return model, src, tgt


def pytorchs(model: Transformer) -> nn.Transformer:
    """nn.Transformer with the same weights, and in post-norm without the closing norms that it adds."""
    c = model.config
    theirs = nn.Transformer(
        c.d_model,
        c.num_heads,
        c.num_layers,
        c.num_layers,
        c.d_ff,
        c.dropout,
        batch_first=True,
        norm_first=c.pre_norm,
    )
    for ours, stack, closing in (
        (model.encoder, theirs.encoder, model.encoder_norm),
        (model.decoder, theirs.decoder, model.decoder_norm),
    ):
        if c.pre_norm:
            stack.norm.load_state_dict(closing.state_dict())
        else:
            stack.norm = None
        for block, layer in zip(ours, stack.layers, strict=True):
            pairs = [(block.attention, layer.self_attn)]
            pairs += [(block.cross_attention, layer.multihead_attn)] if block.cross_attention else []
            for mine, his in pairs:
                his.in_proj_weight.data.copy_(mine.qkv.weight)
                his.in_proj_bias.data.copy_(mine.qkv.bias)
                his.out_proj.load_state_dict(mine.out.state_dict())
            layer.linear1.load_state_dict(block.mlp.up.state_dict())
            layer.linear2.load_state_dict(block.mlp.down.state_dict())
            for index, norm in enumerate(block.norms, start=1):
                getattr(layer, f"norm{index}").load_state_dict(norm.state_dict())
    return theirs


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("pre_norm", [False, True])
def test_it_equals_pytorchs_transformer_outputs_and_gradients(pre_norm):
    model, src, tgt = model_and_batch(pre_norm=pre_norm)
    with torch.no_grad():  # biases and norms start at 0 and 1, where a swap would not be seen
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs = pytorchs(model)
    table = model.embedding.weight.detach().clone().requires_grad_()
    padding = src == 0

    def embed(ids):
        return F.embedding(ids, table) * 4.0 + model.position_table[: ids.shape[1]]

    hidden = theirs(
        embed(src),
        embed(tgt),
        tgt_mask=torch.ones(7, 7, dtype=torch.bool).triu(1),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    expected, logits = hidden @ table.T, model(src, tgt)
    torch.testing.assert_close(logits, expected, **CLOSE)
    upstream = torch.randn_like(logits) / logits.numel()
    logits.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(model.embedding.weight.grad, table.grad, **CLOSE)
    first, last = theirs.encoder.layers[0], theirs.decoder.layers[-1]
    for ours, wanted in (
        (model.encoder[0].attention.qkv.weight, first.self_attn.in_proj_weight),
        (model.encoder[0].mlp.up.weight, first.linear1.weight),
        (model.decoder[-1].cross_attention.qkv.weight, last.multihead_attn.in_proj_weight),
        (model.decoder[-1].norms[2].weight, last.norm3.weight),
    ):
        assert wanted.grad.abs().max() > 1e-6
        torch.testing.assert_close(ours.grad, wanted.grad, **CLOSE)


@pytest.mark.parametrize("implementation", ["plain", "sdpa", "tiled", "auto"])
def test_source_padding_changes_nothing(implementation):
    model, src, tgt = model_and_batch(attention=implementation)
    torch.testing.assert_close(model(src, tgt)[1], model(src[1:2, :5], tgt[1:2])[0], **CLOSE)
    longer = F.pad(src, (0, 4))
    torch.testing.assert_close(model(longer, tgt), model(src, tgt), **CLOSE)


def test_a_later_target_token_does_not_change_earlier_logits():
    model, src, tgt = model_and_batch()
    changed = tgt.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 30
    before, after = model(src, tgt), model(src, changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], **CLOSE)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-2)


def test_target_tokens_see_every_source_token():
    model, src, tgt = model_and_batch()
    changed = src.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 29 + 1
    assert not torch.allclose(model(src, tgt), model(changed, tgt), atol=1e-2)


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "none"])
def test_decoding_step_by_step_equals_decoding_at_once(position):
    model, src, tgt = model_and_batch(position=position)
    padding = src == 0
    whole = model(src, tgt)
    with torch.no_grad():
        memory = model.keys_values(model.encode(src, padding))
        cache = KVCache.for_model(model, batch=3, max_length=7)
        steps = [model.decode(tgt[:, :3], memory, padding, cache)]
        steps += [model.decode(tgt[:, t : t + 1], memory, padding, cache) for t in range(3, 7)]
    assert cache.length == 7
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **CLOSE)


def test_without_positions_the_encoder_cannot_tell_orders_apart():
    for position, blind in (("none", True), ("sinusoidal", False)):
        model, src, _ = model_and_batch(position=position)
        src = src[:1]
        same = torch.allclose(model.encode(src).sum(1), model.encode(src.flip(1)).sum(1), atol=1e-4)
        assert same is blind


def test_one_matrix_embeds_and_predicts():
    model, src, tgt = model_and_batch()
    names = [name for name, _ in model.named_parameters() if "embedding" in name or "head" in name]
    assert names == ["embedding.weight"]
    assert model(src, tgt).shape == (3, 7, 30)


def test_attention_maps_of_encoder_decoder_and_between_can_be_recorded():
    model, src, tgt = model_and_batch()
    with record_attention(model.eval()) as weights, torch.no_grad():
        model(src, tgt)
    shapes = {name: tuple(w.shape[2:]) for name, w in weights.items()}
    assert shapes["encoder.0.attention"] == (9, 9)
    assert shapes["decoder.1.attention"] == (7, 7)
    assert shapes["decoder.1.cross_attention"] == (7, 9)
    assert (weights["decoder.0.cross_attention"][1, :, :, 5:] == 0).all()  # padding


def test_the_base_model_has_the_papers_size():
    with torch.device("meta"):
        model = Transformer(TransformerConfig(vocab_size=37_000))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(65e6, rel=0.04)  # table 3, "65 × 10⁶"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15}, "d_model 15 must be even and a multiple of num_heads 4"),
        ({"num_layers": 0}, "num_layers is 0; it must be a whole number"),
        ({"position": "rope"}, "position is 'rope'; choose one of sinusoidal"),
        ({"attention": "flash"}, "attention is 'flash'; choose one of"),
        ({"pad_id": 30}, "pad_id is 30"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(options, message):
    with pytest.raises(CourseError, match=message):
        TransformerConfig(**SMALL | options)


def test_a_text_longer_than_the_model_is_refused():
    model, src, _ = model_and_batch()
    with pytest.raises(CourseError, match="21 tokens are more than the model's 20"):
        model(src, torch.ones(3, 21, dtype=torch.long))
