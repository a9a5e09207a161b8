"""The classic mistakes of week 4: each is a line that someone has typed, and each turns a named check red."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shared.curriculum.faults import Curve, Fault, edited
from shared.data import corpora, datasets, tokenizers
from shared.models.attention import MultiHeadAttention
from shared.models.gpt import GPT, GPTConfig
from shared.models.normalization import LayerNorm
from shared.training import checkpointing, guards, optimization, trainer
from shared.training.trainer import TrainConfig, Trainer

TINY = GPTConfig(vocab_size=1, context_length=32, num_layers=2, num_heads=2, d_model=64, position="rope")
SETTINGS = {
    "batch_size": 8,
    "context_length": 32,
    "learning_rate": 3e-3,
    "tracker": "none",
    "log_interval": 4,
}


# Experiments: each takes seconds and returns the curve that `course debug` shows healthy and sick.


def _stories() -> tuple[Tensor, int]:
    """The course's stories as characters: (N,) ids and how many different ones there are."""
    text = corpora.load("stories").text()
    tokenizer = tokenizers.CharTokenizer.from_text(text)
    return torch.tensor(tokenizer.encode(text)), tokenizer.vocab_size


def _tiny(seed: int = 0, **changes) -> tuple[Tensor, GPT]:
    """The stories, and a small GPT for their characters."""
    tokens, vocab_size = _stories()
    torch.manual_seed(seed)
    return tokens, GPT(dataclasses.replace(TINY, vocab_size=vocab_size, **changes))


def _curve(history: Sequence[dict], key: str, label: str) -> Curve:
    entries = [entry for entry in history if key in entry]
    return Curve([entry["step"] for entry in entries], [entry[key] for entry in entries], y_label=label)


class _KilledError(Exception):
    """Stands for a kill -9."""


def _loss_across_a_stop() -> Curve:
    """The loss of a run that is killed after update 40 and resumed, minus that of one that is not."""
    config = TrainConfig(steps=80, schedule="constant", checkpoint_interval=40, **SETTINGS)
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, name, last in ((0, "straight", 80), (0, "stopped", 40), (1, "stopped", 80)):
            tokens, model = _tiny(seed)
            batches = _killed_after(last, trainer.token_batches(tokens, config))
            run = Trainer(model, config, batches, directory=f"{folder}/{name}", progress=False)
            with suppress(_KilledError):
                run.fit(resume=seed == 1)
            losses.append([entry["loss"] for entry in run.history])
            steps = [entry["step"] for entry in run.history]
    straight, _, resumed = losses
    gaps = [abs(a - b) for a, b in zip(straight, resumed, strict=True)]
    return Curve(steps, gaps, y_label="distance from the loss of the run that was not stopped (nats)")


def _killed_after(count: int, batches: Callable[[int], trainer.Batch]) -> Callable[[int], trainer.Batch]:
    left = iter(range(count))

    def until_then(micro_step: int) -> trainer.Batch:
        if next(left, None) is None:
            raise _KilledError
        return batches(micro_step)

    return until_then


def _gap_of_a_run_with_stops() -> Curve:
    """Held-out loss minus training loss of a run that is killed and resumed every ten updates."""
    settings = SETTINGS | {"log_interval": 1, "learning_rate": 1e-2, "batch_size": 2}
    config = TrainConfig(steps=120, schedule="constant", checkpoint_interval=10, eval_interval=20, **settings)
    with tempfile.TemporaryDirectory() as folder:
        for stop in range(0, config.steps, 10):
            tokens, model = _tiny()
            run = Trainer(
                model,
                config,
                _killed_after(10, trainer.token_batches(tokens[:-4096], config)),
                evaluate=trainer.lm_evaluator(tokens[-4096:].numpy(), 32),
                directory=folder,
                progress=False,
            )
            with suppress(_KilledError):
                run.fit(resume=stop > 0)
    scored = [entry["step"] for entry in run.history if "val_loss" in entry]
    losses = [entry["loss"] for entry in run.history]
    gaps = [run.history[n - 1]["val_loss"] - sum(losses[n - 10 : n]) / 10 for n in scored]
    return Curve(scored, gaps, y_label="loss on held-out text minus training loss (nats)")


def _rate() -> Curve:
    """The multiplier of the learning rate over a run of 100 updates with 30 of warm-up."""
    config = TrainConfig(steps=100, schedule="cosine", warmup_steps=30, min_lr_ratio=0.1)
    multiplier = optimization.build_schedule(config)
    return Curve(list(range(101)), [multiplier(step) for step in range(101)], y_label="rate over its peak")


def _kept_direction() -> Curve:
    """The cosine between a gradient before and after clipping, against how strongly it is clipped."""
    tokens, model = _tiny()
    config = TrainConfig(steps=1, **SETTINGS)
    trainer.lm_loss(model, trainer.token_batches(tokens, config)(0)).backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    before = [parameter.grad.clone() for parameter in parameters]
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in before))
    shares, cosines = [2.0, 1.0, 0.5, 0.25, 0.1, 0.05, 0.02], []
    for share in shares:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient.clone()
        optimization.clip_gradients(parameters, share * norm)
        after = [parameter.grad for parameter in parameters]
        inner = sum((a * b).sum().item() for a, b in zip(before, after, strict=True))
        cosines.append(inner / norm / math.sqrt(sum(a.square().sum().item() for a in after)))
    return Curve(
        shares, cosines, "limit over the gradient's norm", "cosine of the gradients before and after"
    )


def _gradient_by_accumulation() -> Curve:
    """The norm of the gradient of a trained model, against the micro-batches it is taken from."""
    tokens, model = _tiny()
    config = TrainConfig(steps=120, schedule="constant", **SETTINGS)
    Trainer(model, config, trainer.token_batches(tokens, config), progress=False).fit()
    counts, norms = [1, 2, 4, 8, 16, 32], []
    for count in counts:
        settings = TrainConfig(steps=1, accumulation=count, seed=1, **SETTINGS | {"batch_size": 1})
        run = Trainer(model, settings, trainer.token_batches(tokens, settings), progress=False)
        run._backward()
        norms.append(optimization.clip_gradients(run.parameters, 0.0).item())
        run.optimizer.zero_grad()
    return Curve(counts, norms, "micro-batches of one sequence", "norm of their gradient")


def _weighting_error() -> Curve:
    """How far the gradient of two micro-batches is from that of both in one, the second being shorter."""
    tokens, model = _tiny()
    shares, errors = [1, 2, 4, 8, 16, 32], []

    def loss_fn(model: GPT, batch: trainer.Batch) -> tuple[Tensor, float]:
        return trainer.lm_loss(model, batch), batch[1].numel()

    for share in shares:
        config = TrainConfig(steps=1, accumulation=2, **SETTINGS)
        inputs, targets = datasets.TokenLoader(tokens, 32, 32, seed=0).batch(0)
        parts = [(inputs, targets), (inputs[: 32 // share], targets[: 32 // share].flip(0))]
        model.zero_grad()
        total = sum(batch[1].numel() for batch in parts)
        sum(loss_fn(model, batch)[0] * (batch[1].numel() / total) for batch in parts).backward()
        right = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        Trainer(model, config, parts.__getitem__, loss_fn, progress=False)._backward()
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        errors.append(((found - right).norm() / right.norm()).item())
    return Curve(shares, errors, "tokens of the first over the second", "relative error of the gradient")


def _recomputed_gradients() -> Curve:
    """How far gradients with activation checkpointing are from those without, against dropout."""
    rates, errors = [0.0, 0.05, 0.1, 0.2, 0.4], []
    for rate in rates:
        gradients = []
        for again in (False, True):
            tokens, model = _tiny(dropout=rate)
            model.checkpointing = again
            batch = datasets.TokenLoader(tokens, 8, 32, seed=0).batch(0)
            torch.manual_seed(1)
            trainer.lm_loss(model, batch).backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        without, found = gradients
        errors.append(((found - without).norm() / without.norm()).item())
    return Curve(rates, errors, "dropout", "relative difference of the gradients")


def _loss_with_evaluations() -> Curve:
    """The training loss with dropout and an evaluation every 60 updates."""
    tokens, model = _tiny(dropout=0.5)
    config = TrainConfig(steps=160, schedule="constant", eval_interval=60, **SETTINGS)
    run = Trainer(
        model,
        config,
        trainer.token_batches(tokens, config),
        evaluate=lambda model: {"loss": 0.0},
        progress=False,
    )
    return _curve(run.fit(), "loss", "loss (nats per character)")


def _overflow_norms() -> Curve:
    """The gradient norm that a run in float16 reports."""
    tokens, model = _tiny(num_layers=1, d_model=16)
    config = TrainConfig(steps=12, dtype="float16", **SETTINGS | {"batch_size": 2, "log_interval": 1})
    run = Trainer(model, config, trainer.token_batches(tokens, config), progress=False)
    return _curve(run.fit(), "grad_norm", "gradient norm")


def _gains() -> Curve:
    """The mean gain of the norms as training goes, with a strong weight decay."""
    tokens, model = _tiny()
    config = TrainConfig(steps=120, schedule="constant", weight_decay=1.0, eval_interval=10, **SETTINGS)

    def mean_gain(model: GPT) -> dict[str, float]:
        gains = [module.weight for module in model.modules() if isinstance(module, LayerNorm)]
        return {"gain": torch.cat(gains).mean().item()}

    batches = trainer.token_batches(tokens, config)
    history = Trainer(model, config, batches, evaluate=mean_gain, progress=False).fit()
    return _curve(history, "val_gain", "mean gain of the norms")


def _skips() -> Curve:
    """How many updates a guard skips, of a run with a bad batch at every third update from the 60th on."""
    tokens, model = _tiny()
    config = TrainConfig(steps=120, guard=6.0, guard_window=32, **SETTINGS)
    good = trainer.token_batches(tokens, config)

    def batches(micro_step: int) -> trainer.Batch:
        inputs, targets = good(micro_step)
        if micro_step < 60 or micro_step % 3:
            return inputs, targets
        return inputs, targets.flip(0, 1)  # what follows has nothing to do with what is read

    history = Trainer(model, config, batches, progress=False).fit()
    regular = [entry for entry in history if entry["step"] % config.log_interval == 0]
    return _curve(regular, "skipped", "updates skipped so far")


def _windows_seen() -> Curve:
    """The share of an epoch that four processes have read, against the steps of each."""
    loaders = [datasets.TokenLoader(range(1033), 4, 8, seed=0, rank=rank, world_size=4) for rank in range(4)]
    seen: set[int] = set()
    shares = []
    for step in range(8):
        for loader in loaders:
            seen.update(loader.batch(step)[0][:, 0].tolist())
        shares.append(len(seen) / loaders[0].windows_per_epoch)
    return Curve(list(range(1, 9)), shares, y_label="share of the epoch's windows that were read")


def _counted_flops() -> Curve:
    """FLOPs a token by the formula over those that PyTorch counts, against the vocabulary."""
    sizes, ratios = [64, 256, 1024, 4096, 16384], []
    for size in sizes:
        with torch.device("meta"):
            model = GPT(dataclasses.replace(TINY, vocab_size=size, attention="plain"))
            ids = torch.zeros(1, 32, dtype=torch.int64)
            counter = FlopCounterMode(display=False)
            with counter:
                model(ids, ids)[1].backward()
        ratios.append(32 * model.flops_per_token(32) / counter.get_total_flops())
    return Curve(sizes, ratios, "vocabulary (tokens)", "FLOPs of a token, planned over counted")


def _distance_by_key_heads() -> Curve:
    """How far grouped-query attention is from PyTorch's, against the key heads that eight queries share."""
    counts, gaps = [1, 2, 4, 8], []
    for count in counts:
        torch.manual_seed(0)
        layer = MultiHeadAttention(64, 8, count, bias=False, qk_norm=True, qk_norm_affine=False)
        x = torch.randn(2, 16, 64)
        heads = layer.qkv(x).unflatten(-1, (8 + 2 * count, 8)).transpose(1, 2)  # (B, H + 2·Hkv, T, D)
        q, k, v = heads.split((8, count, count), dim=1)
        q, k = (F.rms_norm(part, (8,), eps=layer.norm_eps) for part in (q, k))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        expected = layer.out(expected.transpose(1, 2).flatten(2))
        gaps.append((layer(x, causal=True) - expected).abs().max().item())
    return Curve(counts, gaps, "key heads for eight query heads", "largest difference from PyTorch's")


def _singular_values() -> Curve:
    """The mean singular value of Muon's update, against the size of the gradient."""
    torch.manual_seed(0)
    matrix = torch.randn(16, 48)
    matrix /= matrix.norm()
    powers = [-5, -4, -3, -2, -1, 0]
    means = [torch.linalg.svdvals(optimization.orthogonalize(matrix * 10.0**n)).mean().item() for n in powers]
    return Curve(powers, means, "gradient norm (power of ten)", "mean singular value of the update")


# Faults.


def _moments_forgotten() -> AbstractContextManager:
    return edited(checkpointing, "restore", "optimizer.load_state_dict(moments)", "pass")


def _loader_starts_over() -> AbstractContextManager:
    old = "(self.step + self.passed_over) *"
    new = "(self.step + self.passed_over - self.__dict__.setdefault('began', self.step)) *"
    return edited(Trainer, "_backward", old, new)


def _decay_from_the_start() -> AbstractContextManager:
    old = "(step - warmup_steps) / max(1, steps - warmup_steps)"
    return edited(optimization, "cosine", old, "step / max(1, steps)")


def _clipped_one_by_one() -> AbstractContextManager:
    old = "torch.clamp(limit / (norm + 1e-6), max=1.0)"
    new = "[torch.clamp(limit / (one + 1e-6), max=1.0) for one in torch._foreach_norm(gradients)]"
    return edited(optimization, "clip_gradients", old, new)


def _same_micro_batch() -> AbstractContextManager:
    old = "range(first, first + self.config.accumulation)"
    return edited(Trainer, "_backward", old, "[first] * self.config.accumulation")


def _short_ones_count_as_much() -> AbstractContextManager:
    old = "loss, count = self._micro_loss(micro_step)"
    return edited(Trainer, "_backward", old, "loss, count = self._micro_loss(micro_step)[0], 1.0")


def _other_masks() -> AbstractContextManager:
    old = "use_reentrant=False"
    return edited(GPT, "_trunk", old, "use_reentrant=False, preserve_rng_state=False")


def _stays_in_evaluation() -> AbstractContextManager:
    return edited(Trainer, "_validate", "self.model.train()", "pass")


def _clipped_while_scaled() -> AbstractContextManager:
    old = """        if self.scaler:
            self._unscale()
        norm = clip_gradients(self.parameters, self.config.clip)
"""
    new = """        norm = clip_gradients(self.parameters, self.config.clip)
        if self.scaler:
            self._unscale()
"""
    return edited(Trainer, "train_step", *(part.replace("\n    ", "\n")[4:] for part in (old, new)))


def _everything_decays() -> AbstractContextManager:
    return edited(optimization, "parameter_groups", '"weight_decay": 0.0', '"weight_decay": weight_decay')


def _guard_learns_from_spikes() -> AbstractContextManager:
    old = "self.skipped += 1"
    new = "self.skipped += 1; self.recent.append((loss, grad_norm))"
    return edited(guards.SpikeGuard, "objection", old, new)


def _rank_not_used() -> AbstractContextManager:
    old = "(step * self.world_size + self.rank) * self.batch_size"
    return edited(datasets.TokenLoader, "_starts", old, "step * self.world_size * self.batch_size")


def _lookups_counted() -> AbstractContextManager:
    return edited(
        GPT, "flops_per_token", "isinstance(m, nn.Linear)", "isinstance(m, nn.Linear | nn.Embedding)"
    )


def _neighbours_share_no_key() -> AbstractContextManager:
    old = "return q, k, v.transpose(1, 2)"
    new = "return q, *(part.repeat(1, H // Hkv, 1, 1) for part in (k, v.transpose(1, 2)))"
    return edited(MultiHeadAttention, "_project", old, new)


def _not_normalised() -> AbstractContextManager:
    return edited(optimization, "orthogonalize", "(x / norm.clamp_min(1e-7)).to(dtype)", "x.to(dtype)")


def _checksum_not_compared() -> AbstractContextManager:
    old = 'files.sha256_file(path / name) != listing[name]["sha256"]'
    return edited(checkpointing, "verify", old, 'len(listing[name]["sha256"]) != 64')


FAULTS = [
    Fault(
        name="moments_forgotten",
        symptom="A resumed run goes on, with a small bump at the place, and never meets the run that was not "
        "stopped.",
        hint="What, beside the weights, has the optimiser gathered over thousands of updates?",
        caught_by="tests/unit/test_trainer.py::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit",
        plant=_moments_forgotten,
        experiment=_loss_across_a_stop,
    ),
    Fault(
        name="loader_starts_over",
        symptom="A run that is stopped often has the best training loss of all, and a held-out loss that "
        "stands still.",
        hint="A resumed process asks for its next batch. Which one is it given?",
        caught_by="tests/unit/test_trainer.py::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit",
        plant=_loader_starts_over,
        experiment=_gap_of_a_run_with_stops,
    ),
    Fault(
        name="decay_from_the_start",
        symptom="The rate climbs, and falls by a jump at the end of the warm-up; the peak is never reached.",
        hint="How much of the cosine is over when the warm-up ends?",
        caught_by="tests/unit/test_optimization.py::test_cosine_passes_through_its_landmarks",
        plant=_decay_from_the_start,
        experiment=_rate,
    ),
    Fault(
        name="clipped_one_by_one",
        symptom="Training is a little slower wherever clipping is at work; norms in the log look right.",
        hint="Clipping shortens a vector. Which numbers are its entries?",
        caught_by="tests/unit/test_optimization.py::test_clipping_equals_pytorchs",
        plant=_clipped_one_by_one,
        experiment=_kept_direction,
    ),
    Fault(
        name="same_micro_batch",
        symptom="Accumulating more micro-batches costs time and makes the gradient no less noisy.",
        hint="Which data does the third micro-batch of an update hold?",
        caught_by="tests/unit/test_trainer.py::"
        "test_accumulated_micro_batches_give_the_gradient_of_the_big_batch",
        plant=_same_micro_batch,
        experiment=_gradient_by_accumulation,
    ),
    Fault(
        name="short_ones_count_as_much",
        symptom="All is well with packed sequences; with batches padded to different lengths the loss of the "
        "same data changes with how it is cut up.",
        hint="A mean of means: when is it the mean?",
        caught_by="tests/unit/test_trainer.py::test_micro_batches_of_different_lengths_are_weighted_by_their_tokens",
        plant=_short_ones_count_as_much,
        experiment=_weighting_error,
    ),
    Fault(
        name="other_masks",
        symptom="With activation checkpointing a model with dropout learns worse; without dropout nothing is "
        "wrong.",
        hint="The forward runs twice. Does it draw the same random numbers?",
        caught_by="tests/unit/test_trainer.py::"
        "test_activations_computed_again_give_the_same_losses_and_gradients_to_the_bit",
        plant=_other_masks,
        experiment=_recomputed_gradients,
    ),
    Fault(
        name="stays_in_evaluation",
        symptom="The training loss falls by a step at the first evaluation, of which nobody complains; the "
        "validation loss ends higher.",
        hint="In which mode does the model come back from being judged?",
        caught_by="tests/unit/test_trainer.py::"
        "test_history_holds_the_evaluations_and_the_model_trains_on_in_training_mode",
        plant=_stays_in_evaluation,
        experiment=_loss_with_evaluations,
    ),
    Fault(
        name="clipped_while_scaled",
        symptom="In float16, and only there, the log shows gradient norms of tens of thousands, and every "
        "update is clipped to next to nothing.",
        hint="The loss was multiplied by 65,536. Where is that taken back?",
        caught_by="tests/unit/test_trainer.py::test_float16_scales_the_loss_and_trains_like_float32",
        plant=_clipped_while_scaled,
        experiment=_overflow_norms,
    ),
    Fault(
        name="everything_decays",
        symptom="The gains of the norms, which start at one, shrink from update to update whatever the data.",
        hint="Weight decay pulls towards zero. For which parameters is zero a good default?",
        caught_by="tests/unit/test_optimization.py::test_only_matrices_decay_and_tied_weights_are_listed_once",
        plant=_everything_decays,
        experiment=_gains,
    ),
    Fault(
        name="guard_learns_from_spikes",
        symptom="The first bad batch is skipped, the ones after it are not.",
        hint="What is usual after a loss of a hundred has been seen, and should it have been?",
        caught_by="tests/unit/test_guards.py::"
        "test_a_spike_does_not_raise_the_bar_for_the_next_and_ends_a_streak",
        plant=_guard_learns_from_spikes,
        experiment=_skips,
    ),
    Fault(
        name="rank_not_used",
        symptom="Four processes cost four times as much as one and learn hardly faster; an epoch takes four "
        "times as long as it should.",
        hint="Which windows does each process read at one step?",
        caught_by="tests/unit/test_datasets.py::test_processes_read_different_windows",
        plant=_rank_not_used,
        experiment=_windows_seen,
    ),
    Fault(
        name="lookups_counted",
        symptom="The MFU in the log is too good, and the better the larger the vocabulary.",
        hint="Which parameters are multiplied with anything?",
        caught_by="tests/unit/test_gpt.py::test_flops_are_six_a_weight_and_twelve_a_score",
        plant=_lookups_counted,
        experiment=_counted_flops,
    ),
    Fault(
        name="neighbours_share_no_key",
        symptom="A model trained from the start learns as well as ever; weights that come from elsewhere, or "
        "go there, give nonsense. With one key head, or as many as queries, nothing is wrong.",
        hint="Six queries, two keys: which key does the second query meet?",
        caught_by="tests/unit/test_qwen3.py::test_logits_loss_and_every_gradient_equal_those_of_transformers",
        plant=_neighbours_share_no_key,
        experiment=_distance_by_key_heads,
    ),
    Fault(
        name="not_normalised",
        symptom="Muon learns at first and stands still later, when gradients have become small; with large "
        "ones the loss is nan at once.",
        hint="For which singular values does the polynomial lead to one?",
        caught_by="tests/unit/test_optimization.py::"
        "test_muons_update_is_the_svds_up_to_the_spread_of_the_singular_values",
        plant=_not_normalised,
        experiment=_singular_values,
    ),
    Fault(
        name="checksum_not_compared",
        symptom="A run resumed after a disk error goes on, and its loss is that of a beginner, or nan.",
        hint="A file can have its right length and a wrong byte.",
        caught_by="tests/unit/test_checkpointing.py::test_verify_reads_every_byte",
        plant=_checksum_not_compared,
    ),
]
