"""The classic mistakes of week 1: each is a line that someone has typed, and each turns a named check red."""

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from shared.curriculum.faults import Curve, Fault, edited, replaced
from shared.data import corpora, datasets, tokenizers
from shared.data.sources import dates
from shared.models import attention, losses, positions, transformer, transformer_blocks
from shared.models.gpt import GPT, GPTConfig
from shared.training import optimization

TINY = {"context_length": 32, "num_layers": 2, "num_heads": 4, "d_model": 64, "position": "rope"}


# Experiments: each takes seconds and returns the curve that `course debug` shows healthy and sick.


def _language_model_loss() -> Curve:
    """120 updates of a tiny GPT on the characters of the course's stories."""
    text = corpora.load("stories").text()
    tokenizer = tokenizers.CharTokenizer.from_text(text)
    ids = torch.tensor(tokenizer.encode(text))
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, attention="plain", **TINY))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    seen = []
    for _ in range(120):
        starts = torch.randint(len(ids) - 33, (16, 1))
        window = ids[starts + torch.arange(33)]
        _, loss = model(window[:, :-1], window[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return Curve(*_smooth(seen), y_label="loss (nats per character)")


def _smooth(values: list[float], width: int = 8) -> tuple[list[int], list[float]]:
    ends = range(width, len(values) + 1, width)
    return list(ends), [sum(values[end - width : end]) / width for end in ends]


def _date_curve(measure: str) -> Curve:
    """140 updates of a small encoder–decoder that reads dates; the paper's schedule, 60 steps of warm-up.

    `measure` is "loss", as the trainer sees it, or "right", the share of right target tokens.
    """
    tokenizer = dates.date_tokenizer()
    pairs = dates.encode_dates(dates.date_pairs("train", 2000), tokenizer)
    loader = datasets.PairLoader(pairs, 32, seed=0)
    torch.manual_seed(0)
    config = transformer.TransformerConfig(
        tokenizer.vocab_size, max_length=96, num_layers=2, num_heads=4, d_model=64, d_ff=128, dropout=0.0
    )
    model = transformer.Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    seen = []
    for step in range(140):
        optimizer.param_groups[0]["lr"] = optimization.noam(step, config.d_model, 60) / 4
        source, target = loader.batch(step)
        logits, wanted = model(source, target[:, :-1]), target[:, 1:]
        loss = losses.cross_entropy(logits, wanted, label_smoothing=0.1, ignore_index=config.pad_id)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = (logits.argmax(-1) == wanted)[wanted != config.pad_id].float().mean()
        seen.append({"loss": loss, "right": right}[measure].item())
    label = {"loss": "loss (nats per token)", "right": "share of target tokens that are right"}[measure]
    return Curve(*_smooth(seen, 5), y_label=label)


def _date_loss() -> Curve:
    return _date_curve("loss")


def _date_accuracy() -> Curve:
    return _date_curve("right")


def _padding_influence() -> Curve:
    """How far the logits of one sentence move when its source is filled up with padding."""
    torch.manual_seed(0)
    model = transformer.Transformer(
        transformer.TransformerConfig(30, num_layers=2, num_heads=4, d_model=32, d_ff=64, dropout=0.0)
    )
    source, target = torch.randint(1, 30, (1, 8)), torch.randint(1, 30, (1, 6))
    amounts = [0, 1, 2, 4, 8, 16, 32]
    with torch.no_grad():
        logits = [model(F.pad(source, (0, amount)), target) for amount in amounts]
    moved = [(out - logits[0]).abs().max().item() for out in logits]
    return Curve(amounts, moved, "padding (tokens)", "largest change of a logit")


def _loss_by_padding() -> Curve:
    """The loss of the same sentences in batches with more and more padding."""
    generator = torch.Generator().manual_seed(0)
    logits, targets = (
        torch.randn(4, 8, 50, generator=generator),
        torch.randint(1, 50, (4, 8), generator=generator),
    )
    logits += 5.0 * F.one_hot(targets, 50)  # the model knows these sentences well
    amounts = [0, 2, 4, 8, 16, 32]
    seen = []
    for amount in amounts:
        wider = F.pad(logits, (0, 0, 0, amount))
        loss = losses.cross_entropy(wider, F.pad(targets, (0, amount)), label_smoothing=0.1, ignore_index=0)
        seen.append(loss.item())
    return Curve(amounts, seen, "padding (tokens)", "loss (nats per token)")


def _sharpness() -> Curve:
    """The largest of 64 weights, on average over random queries and keys, against the width of a head."""
    generator = torch.Generator().manual_seed(0)
    widths = [4, 8, 16, 32, 64, 128, 256, 512]
    largest = []
    for width in widths:
        q, k = torch.randn(2, 1, 1, 64, width, generator=generator)
        _, weights = attention.attention(q, k, k, implementation="plain", return_weights=True)
        largest.append(weights.amax(-1).mean().item())
    return Curve(widths, largest, "width of a head", "largest weight of a query, 64 keys")


def _tiled_error() -> Curve:
    """Tiled attention against the formula, by the number of keys."""
    generator = torch.Generator().manual_seed(0)
    lengths = list(range(32, 545, 32))
    errors = []
    for T in lengths:
        q, k, v = torch.randn(3, 1, 2, T, 32, generator=generator)
        exact = (q @ k.transpose(-2, -1) / math.sqrt(32)).softmax(-1) @ v
        errors.append((attention.attention(q, k, v, implementation="tiled") - exact).abs().max().item())
    return Curve(lengths, errors, "keys", "largest error of the output")


def _logit_by_distance() -> Curve:
    """The logit of one query and one key, with RoPE, against how far the key stands behind the query."""
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 16, generator=generator)
    cos, sin = positions.RotaryEmbedding(16, 64)(slice(64))
    turned = [positions.apply_rotary(x.expand(64, 16), cos, sin) for x in (query, key)]
    logits = turned[0][32] @ turned[1].T  # the query at 32, the key at 0 … 63
    distances = list(range(-24, 25))
    return Curve(distances, [logits[32 - d].item() for d in distances], "distance (tokens)", "logit")


# Plants: what was typed.


def _mask_off_by_one() -> AbstractContextManager:
    return edited(attention, "_visible", "upper = 0 if causal", "upper = 1 if causal")


def _unscaled() -> AbstractContextManager:
    return edited(attention, "attention", "scale = 1.0 / math.sqrt(q.shape[3])", "scale = 1.0")


def _not_rescaled() -> AbstractContextManager:
    return edited(
        attention, "_tiled_forward", "rescale = (top - shift).exp_()", "rescale = torch.ones_like(top)"
    )


def _heads_not_transposed() -> AbstractContextManager:
    merge = "out.transpose(1, 2).reshape(B, T, C)"
    return edited(attention.MultiHeadAttention, "forward", merge, "out.reshape(B, T, C)")


def _halves_swapped() -> AbstractContextManager:
    """The minus of the rotation in front of the wrong half: the same as turning by −angle."""
    rotate = positions._rotate
    return replaced(positions, "_rotate", lambda x, cos, sin, direction: rotate(x, cos, -sin, direction))


def _padding_seen() -> AbstractContextManager:
    return replaced(transformer, "_mask", lambda padding: None)


def _memory_not_read() -> AbstractContextManager:
    read = "keys_values=memory, mask=memory_mask"
    return edited(transformer_blocks.Block, "forward", read, "causal=True")


def _no_warm_up() -> AbstractContextManager:
    return edited(optimization, "noam", "min(s**-0.5, s * max(1, warmup_steps) ** -1.5)", "s**-0.5")


def _padding_counted() -> AbstractContextManager:
    """Every target that is a token id counts, the padding's too."""
    return edited(losses._CrossEntropy, "forward", "targets != ignore", "targets >= 0")


FAULTS = [
    Fault(
        name="causal_mask_off_by_one",
        symptom="The loss falls far below what anyone reaches on this text; what is generated is nonsense.",
        hint="Is the model predicting, or copying? What does position i see of position i + 1?",
        caught_by="tests/unit/test_attention.py::test_the_future_does_not_change_the_past",
        plant=_mask_off_by_one,
        experiment=_language_model_loss,
    ),
    Fault(
        name="no_scale",
        symptom="Wide heads put all weight on one key from the first step on, and hardly learn.",
        hint="How large is the dot product of two random vectors of length d?",
        caught_by="tests/unit/test_attention.py::"
        "test_attention_equals_pytorchs_for_every_mask_and_number_of_key_heads",
        plant=_unscaled,
        experiment=_sharpness,
    ),
    Fault(
        name="tiles_not_rescaled",
        symptom="Short sequences are right to the last digit; beyond one tile the output is wrong.",
        hint="What was the maximum when the first tile was summed up, and what is it now?",
        caught_by="tests/unit/test_attention.py::test_all_implementations_agree_with_the_formula_written_out",
        plant=_not_rescaled,
        experiment=_tiled_error,
    ),
    Fault(
        name="heads_merged_without_transpose",
        symptom="All shapes are right, and yet the loss is not what this model should reach.",
        hint="A (B, H, T, D) tensor read row by row: which position do the first C numbers belong to?",
        caught_by="tests/unit/test_attention.py::TestMultiHeadAttention::test_it_equals_pytorchs_multihead_attention_outputs_weights_and_gradients",
        plant=_heads_not_transposed,
        experiment=_language_model_loss,
    ),
    Fault(
        name="rope_halves_swapped",
        symptom="Training from scratch goes well; a checkpoint from elsewhere speaks nonsense.",
        hint="Logits still depend on the distance alone. On its size only, or on its sign too?",
        caught_by="tests/unit/test_positions.py::test_rotary_equals_transformers",
        plant=_halves_swapped,
        experiment=_logit_by_distance,
    ),
    Fault(
        name="padding_ignored",
        symptom="The translation of a sentence changes with the company it has in its batch.",
        hint="Who may look at the tokens that only fill a row up?",
        caught_by="tests/unit/test_transformer.py::test_source_padding_changes_nothing",
        plant=_padding_seen,
        experiment=_padding_influence,
    ),
    Fault(
        name="cross_attention_reads_target",
        symptom="The model writes perfectly formed dates that have nothing to do with the question.",
        hint="Which digits can be guessed without having read the source?",
        caught_by="tests/unit/test_transformer.py::test_target_tokens_see_every_source_token",
        plant=_memory_not_read,
        experiment=_date_accuracy,
    ),
    Fault(
        name="noam_without_warm_up",
        symptom="The loss falls at first, then sits on a plateau that warm-up would have avoided.",
        hint="When is the learning rate highest, and what does Adam know by then?",
        caught_by="tests/unit/test_optimization.py::test_noam_is_the_papers_formula",
        plant=_no_warm_up,
        experiment=_date_loss,
    ),
    Fault(
        name="loss_counts_padding",
        symptom="The loss of the same sentences depends on how much padding stands beside them.",
        hint="Over how many tokens is the loss an average, and how many of them did somebody write?",
        caught_by="tests/unit/test_transformer_blocks.py::"
        "test_cross_entropy_equals_pytorchs_with_and_without_label_smoothing",
        plant=_padding_counted,
        experiment=_loss_by_padding,
    ),
]
