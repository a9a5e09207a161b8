"""The classic mistakes of week 2: each is a line that someone has typed, and each turns a named check red."""

from contextlib import AbstractContextManager

import torch

from shared.curriculum.faults import Curve, Fault, edited, replaced
from shared.data import corpora, datasets, tokenizers
from shared.evaluation import metrics
from shared.evaluation.ngram import KneserNey
from shared.inference import generation
from shared.inference.kv_cache import KVCache
from shared.models.gpt import GPT, GPTConfig
from shared.training import distributed_utils, trainer

TINY = {"context_length": 32, "num_layers": 2, "num_heads": 2, "d_model": 64, "position": "rope"}


def _stories() -> tuple[torch.Tensor, int]:
    """The course's stories as characters: (N,) ids and how many different ones there are."""
    text = corpora.load("stories").text()
    tokenizer = tokenizers.CharTokenizer.from_text(text)
    return torch.tensor(tokenizer.encode(text)), tokenizer.vocab_size


def _short_training(
    key: str = "loss", label: str = "loss (nats per character)", accumulation: int = 1
) -> Curve:
    """160 updates of a tiny GPT on the stories; `key` of the trainer's history against the step."""
    tokens, vocab = _stories()
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab, **TINY))
    config = trainer.TrainConfig(
        steps=160,
        batch_size=8,
        context_length=32,
        accumulation=accumulation,
        learning_rate=3e-3,
        clip=0.0,
        log_interval=4,
    )
    history = trainer.Trainer(model, config, trainer.token_batches(tokens, config), progress=False).fit()
    return Curve([entry["step"] for entry in history], [entry[key] for entry in history], y_label=label)


def _gradient_norms() -> Curve:
    return _short_training("grad_norm", "gradient norm, 4 micro-batches an update", accumulation=4)


def _bits_per_byte_as_read_by_others() -> Curve:
    """n-gram models that learnt the stories from the library's ids read their end cut by our own encoder."""
    text = corpora.load("stories").text()
    cut = len(text) * 9 // 10
    theirs = tokenizers.LibraryTokenizer.train([text[:cut]], 600)
    ours = tokenizers.BPETokenizer(theirs.vocab, theirs.merges, theirs.special_tokens)
    seen, ids = theirs.encode(text[:cut]), ours.encode(text[cut:])
    orders, num_bytes = range(1, 5), len(text[cut:].encode())
    nats = [-KneserNey(n, ours.vocab_size).fit(seen).log_probabilities(ids).sum() for n in orders]
    bits = [metrics.nats_to_bits_per_byte(float(total), num_bytes) for total in nats]
    return Curve(list(orders), bits, "order of the n-gram model", "bits per byte")


def _cached_difference() -> Curve:
    """How far logits with a cache are from logits without, position by position."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, init_std=0.2, **TINY)).eval()
    ids = torch.randint(50, (1, 32))
    with torch.no_grad():
        whole = model(ids)[0][0]  # (T, V)
        cache = KVCache.for_model(model, 1, 32)
        steps = torch.cat([model(ids[:, t : t + 1], cache=cache)[0][0] for t in range(32)])
    gaps = (whole - steps).abs().amax(dim=-1).tolist()
    return Curve(list(range(32)), gaps, "position", "largest difference from the logits without a cache")


def _kept_mass() -> Curve:
    """The probability that top-p sampling keeps, against the p that was asked for."""
    torch.manual_seed(0)
    logits = torch.randn(64, 100) * 2
    asked = [p / 10 for p in range(1, 10)]
    kept = [(logits.softmax(-1) * generation.filter_top_p(logits, p).isfinite()).sum(-1) for p in asked]
    return Curve(asked, [mass.mean().item() for mass in kept], "p asked for", "probability kept (mean)")


def _longest_token_first() -> AbstractContextManager:
    tables = {}  # of each tokenizer: what is a token, in ids of bytes, and the longest of them

    def longest(ids, ranks):
        if id(ranks) not in tables:
            spelling = {}
            for (left, right), (_, new) in ranks.items():  # in order of learning: the parts are there already
                spelling[new] = spelling.get(left, (left,)) + spelling.get(right, (right,))
            tables[id(ranks)] = (
                {parts: new for new, parts in spelling.items()},
                max(map(len, spelling.values()), default=1),
            )
        known, limit = tables[id(ranks)]
        out, i = [], 0
        while i < len(ids):
            n = next((n for n in range(min(limit, len(ids) - i), 1, -1) if tuple(ids[i : i + n]) in known), 1)
            out.append(known[tuple(ids[i : i + n])] if n > 1 else ids[i])
            i += n
        return out

    return replaced(tokenizers, "merge_ids", longest)


def _labels_not_shifted() -> AbstractContextManager:
    return edited(
        datasets.TokenLoader, "batch", "windows[:, 1:].contiguous()", "windows[:, :-1].contiguous()"
    )


def _sees_the_future() -> AbstractContextManager:
    return edited(GPT, "_attend", '"causal": True', '"causal": False')


def _loss_not_divided() -> AbstractContextManager:
    return edited(trainer, "divide_gradients", "1.0 / total", "torch.ones(())")


def _gradients_summed() -> AbstractContextManager:
    old = "flat /= dist.get_world_size()"
    return edited(distributed_utils.GradientAverager, "finish", old, "pass")


def _positions_restart() -> AbstractContextManager:
    return edited(GPT, "_trunk", "positions = slice(start, start + T)", "positions = slice(0, T)")


def _nucleus_too_small() -> AbstractContextManager:
    old = "outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p"
    new = "outside = ascending.softmax(dim=-1).cumsum(dim=-1) - ascending.softmax(dim=-1) <= 1 - p"
    return edited(generation, "filter_top_p", old, new)


FAULTS = [
    Fault(
        name="longest_token_first",
        symptom="Every text comes back, no longer than before, but a model from elsewhere reads it worse.",
        hint="In which order did training learn the merges, and in which does encoding apply them?",
        caught_by="tests/unit/test_tokenizers.py::"
        "test_the_merge_heap_applies_merges_in_the_order_in_which_they_were_learnt",
        plant=_longest_token_first,
        experiment=_bits_per_byte_as_read_by_others,
    ),
    Fault(
        name="labels_not_shifted",
        symptom="The loss falls to nearly nothing within a hundred updates, and samples repeat one letter.",
        hint="What is the model asked to predict at position t, and has it already read it there?",
        caught_by="tests/unit/test_datasets.py::test_targets_are_the_inputs_shifted_by_one",
        plant=_labels_not_shifted,
        experiment=_short_training,
    ),
    Fault(
        name="sees_the_future",
        symptom="The training loss is better than any language model's; what it writes is gibberish.",
        hint="Which positions may position t look at?",
        caught_by="tests/unit/test_gpt.py::test_a_later_token_does_not_change_earlier_logits",
        plant=_sees_the_future,
        experiment=_short_training,
    ),
    Fault(
        name="loss_not_divided",
        symptom="With four micro-batches an update the gradient is four times as long; without clipping, so "
        "is SGD's step.",
        hint="Is the gradient of a sum the gradient of a mean?",
        caught_by="tests/unit/test_trainer.py::"
        "test_accumulated_micro_batches_give_the_gradient_of_the_big_batch",
        plant=_loss_not_divided,
        experiment=_gradient_norms,
    ),
    Fault(
        name="gradients_summed",
        symptom="Two processes act as if the learning rate were doubled; Adam hides it, SGD does not.",
        hint="After all ranks' gradients have been added up, what is missing?",
        caught_by="tests/integration/test_multi_gpu_experiments.py::"
        "test_two_processes_have_the_gradient_of_one",
        plant=_gradients_summed,
    ),
    Fault(
        name="positions_restart",
        symptom="Generation with a cache starts well and falls apart after the first new token.",
        hint="With a cache the model gets one token at a time. Which position does it think that one has?",
        caught_by="tests/unit/test_gpt.py::test_logits_with_a_cache_equal_logits_without",
        plant=_positions_restart,
        experiment=_cached_difference,
    ),
    Fault(
        name="nucleus_too_small",
        symptom="Samples at top-p 0.9 are duller than they should be; at small p they are greedy.",
        hint="The nucleus has probability p or more. Is the token that crosses p in it?",
        caught_by="tests/unit/test_generation.py::TestFiltersEqualTransformers::test_top_p",
        plant=_nucleus_too_small,
        experiment=_kept_mass,
    ),
]
