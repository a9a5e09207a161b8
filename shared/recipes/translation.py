"""From a configuration file to a trained translator: joint vocabulary, Transformer, loss, decoding, BLEU.

The recipe of *Attention Is All You Need* (Vaswani et al. 2017, §5): one byte-pair vocabulary for both
languages, pairs of similar length together, label smoothing, Noam's schedule, beam search with a length
penalty.
Departures: batches hold a fixed number of pairs, where the paper counts tokens; the last weights are used,
where the paper averages the last checkpoints.

Legend: B pairs, S source length, U target length, both with their special tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.data import tokenizers
from shared.data.datasets import PairLoader, pad
from shared.data.sources import translation as corpora
from shared.evaluation.metrics import bleu
from shared.inference.generation import beam_search, greedy_decode
from shared.models import model_utils
from shared.models.losses import cross_entropy
from shared.models.transformer import Transformer, TransformerConfig
from shared.recipes import runs
from shared.runtime import artifacts
from shared.runtime.errors import CourseError
from shared.training.config import TrainConfig, from_mapping, read_sections
from shared.training.trainer import Trainer

PAD, BEGIN, END = "<pad>", "<bos>", "<eos>"
TOKENIZER = "tokenizer.json"
CHUNK = 50_000  # sentences encoded at a time
EncodedPair = tuple[Sequence[int], Sequence[int]]


# ------------------------------------------------------------------- any sequence to any sequence


def sequence_loss(
    pad_id: int, label_smoothing: float = 0.0
) -> Callable[[nn.Module, Sequence[Tensor]], tuple[Tensor, Tensor]]:
    """The trainer's `loss_fn` for (sources (B, S), targets (B, U)): predict each target token but padding.

    Args:
        pad_id: what does not count.
        label_smoothing: ε of §5.4.

    Returns:
        A function that gives the mean in nats per token and the number of tokens it is the mean of.
    """

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        sources, targets = batch
        expected = targets[:, 1:]
        logits = model(sources, targets[:, :-1])  # (B, U − 1, V)
        mean = cross_entropy(logits, expected, label_smoothing=label_smoothing, ignore_index=pad_id)
        return mean, (expected != pad_id).sum()

    return loss


def nats_per_token(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    batch_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Mean −log p of the right next token over all targets (end token included), never smoothed.

    Args:
        model: a `Transformer`; put in evaluation mode and back.
        pairs: (source ids, target ids).
        batch_size: pairs at a time, sorted by length; changes the speed only.
        dtype: run under autocast in it where it is not float32.
    """
    device, pad_id = next(model.parameters()).device, model.config.pad_id
    loss, total, count = sequence_loss(pad_id), 0.0, 0
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast:
        for rows in _by_length([source for source, _ in pairs], batch_size):
            batch = [pad([pairs[i][side] for i in rows], pad_id).to(device) for side in (0, 1)]
            mean, tokens = loss(model, batch)
            total, count = total + float(mean) * int(tokens), count + int(tokens)
    model.train(was_training)
    return total / count


def translate(
    model: nn.Module,
    sources: Sequence[Sequence[int]],
    *,
    bos_id: int,
    eos_id: int,
    max_length: int,
    beam_size: int = 1,
    alpha: float = 0.6,
    batch_size: int = 256,
) -> list[list[int]]:
    """The target tokens of each source, in the order of `sources`.

    Args:
        model: a `Transformer`.
        sources: token ids.
        bos_id, eos_id: begin and end of a target; not returned.
        max_length: target tokens at most, the end token included.
        beam_size: 1 is greedy decoding.
        alpha: of the beam's length penalty.
        batch_size: sources at a time, sorted by length; changes the speed only.
    """
    device, pad_id = next(model.parameters()).device, model.config.pad_id
    targets: list[list[int]] = [[] for _ in sources]
    ends = {"bos_id": bos_id, "eos_id": eos_id, "max_length": max_length}
    for rows in _by_length(sources, batch_size):
        batch = pad([sources[i] for i in rows], pad_id).to(device)
        if beam_size == 1:
            found = greedy_decode(model, batch, **ends)
        else:
            found = beam_search(model, batch, beam_size=beam_size, alpha=alpha, **ends)
        for i, target in zip(rows, found, strict=True):
            targets[i] = target
    return targets


def _by_length(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# ------------------------------------------------------------------- one language to another


def _setting(default: Any, least: float | None = None, most: float | None = None, choices=()) -> Any:
    return field(default=default, metadata={"least": least, "most": most, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """What is translated and how: the sections `data` and `translation` of a configuration.

    Attributes:
        corpus: "multi30k" or "wmt14".
        source, target: languages.
        vocab_size: of the joint byte-level BPE, trained on both sides of the training part.
        longest: tokens; training pairs with a longer side are left out.
        limit: training pairs at most; None for all.
        label_smoothing: ε (§5.4).
        beam_size: hypotheses a sentence (§6.1).
        length_penalty: α (§6.1).
        extra_length: a translation has at most this many tokens more than the longest source of the test
            (§6.1; the paper says: than its own source).
    """

    corpus: str = _setting("multi30k", choices=corpora.NAMES)
    source: str = _setting("en", choices=("en", "de"))
    target: str = _setting("de", choices=("en", "de"))
    vocab_size: int = _setting(8192, least=259, most=2**20)
    longest: int = _setting(128, least=4)
    limit: int | None = _setting(None, least=1)
    label_smoothing: float = _setting(0.1, least=0.0, most=0.99)
    beam_size: int = _setting(4, least=1)
    length_penalty: float = _setting(0.6, least=0.0)
    extra_length: int = _setting(50, least=1)


@dataclass(frozen=True)
class TranslationRun:
    """A checked configuration file; `model` holds TransformerConfig's fields but vocabulary, padding."""

    task: TranslationConfig
    model: dict[str, Any]
    training: TrainConfig
    path: Path

    def data(self) -> dict[str, Any]:
        """What decides the batches and the loss: the task without its decoding."""
        decoding = ("beam_size", "length_penalty", "extra_length")
        return {name: value for name, value in asdict(self.task).items() if name not in decoding}

    def model_config(self, tokenizer: tokenizers.Tokenizer) -> TransformerConfig:
        """The architecture for this vocabulary.

        Raises:
            CourseError: the model's choices do not fit together, or it has too few positions.
        """
        known = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.special_tokens[PAD]}
        config = from_mapping(TransformerConfig, {**self.model, **known}, str(self.path), "model.")
        if config.max_length < self.task.longest + self.task.extra_length:
            raise CourseError(
                f"{self.path}: model.max_length is {config.max_length}; it must be at least data.longest + "
                f"translation.extra_length, {self.task.longest + self.task.extra_length}."
            )
        return config


@dataclass(frozen=True)
class TranslationData:
    """A corpus as token ids: pairs for training and validation, sentences for the test.

    Attributes:
        tokenizer: the joint vocabulary, with "<pad>", "<bos>" and "<eos>".
        training, validation: (source ids, target ids), each side int32.
        test: source ids.
        references: the test's translations, as text.
    """

    tokenizer: tokenizers.Tokenizer
    training: list[EncodedPair]
    validation: list[EncodedPair]
    test: list[np.ndarray]
    references: list[str]


def load_translation_run(
    path: Path | str, overrides: Sequence[str] = (), *, dtype: str = "float32"
) -> TranslationRun:
    """Read a configuration file with the sections data, model, training and translation.

    Args:
        path: a file such as configs/training/translation-multi30k.yaml.
        overrides: "training.steps=100" and the like.
        dtype: for `training.dtype` where the file does not say.

    Raises:
        CourseError: the file cannot be read, or a key or value is not allowed.
    """
    sections = read_sections(path, overrides, ("data", "model", "training", "translation"))
    where, data, decoding = str(path), sections.get("data", {}), sections.get("translation", {})
    if twice := sorted(data.keys() & decoding.keys()):
        raise CourseError(f"{where}: {twice[0]} stands in data and in translation; keep one of them.")
    for name in ("vocab_size", "pad_id"):
        if name in sections.get("model", {}):
            raise CourseError(f"{where}: model.{name} is decided by the vocabulary; leave it out.")
    training = from_mapping(TrainConfig, {"dtype": dtype, **sections.get("training", {})}, where, "training.")
    task = from_mapping(TranslationConfig, {**data, **decoding}, where)
    return TranslationRun(task, sections.get("model", {}), training, Path(path))


def translation_data(task: TranslationConfig) -> TranslationData:
    """The corpus tokenised; the vocabulary is learnt from its training part once and kept as an artefact.

    Raises:
        CourseError: the corpus is not there, or no pair for training or validation is short enough.
    """
    splits = {
        split: corpora.sentence_pairs(
            task.corpus, split, task.source, task.target, task.limit if split == "train" else None
        )
        for split in corpora.SPLITS
    }
    key = {
        "corpus": task.corpus,
        "limit": task.limit,
        "vocab_size": task.vocab_size,
        "sha256": _digest(splits["train"]),
    }
    path = artifacts.build(
        "translation-tokenizer", key, lambda folder: _train_tokenizer(folder, splits["train"], task)
    )
    tokenizer = tokenizers.load(path / TOKENIZER)
    training, validation = (
        [pair for pair in _encode(splits[split], tokenizer) if max(map(len, pair)) <= task.longest]
        for split in ("train", "validation")
    )
    for name, pairs in (("training", training), ("validation", validation)):
        if not pairs:
            raise CourseError(f"No {name} pair has {task.longest} tokens or fewer; raise data.longest.")
    return TranslationData(
        tokenizer,
        training,
        validation,
        [source[: task.longest] for source, _ in _encode(splits["test"], tokenizer)],
        [target for _, target in splits["test"]],
    )


def _digest(pairs: list[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update("\0".join(pair).encode() + b"\0")
    return digest.hexdigest()


def _train_tokenizer(folder: Path, pairs: list[tuple[str, str]], task: TranslationConfig) -> None:
    texts = (text for pair in pairs for text in pair)
    tokenizers.LibraryTokenizer.train(texts, task.vocab_size, (PAD, BEGIN, END)).save(folder / TOKENIZER)


def _encode(pairs: list[tuple[str, str]], tokenizer: tokenizers.Tokenizer) -> list[EncodedPair]:
    """Source ids and "<eos>"; "<bos>", target ids and "<eos>". Arrays: WMT14 as lists would take 10 GB."""
    begin, end = tokenizer.special_tokens[BEGIN], tokenizer.special_tokens[END]
    encoded: list[EncodedPair] = []
    for start in range(0, len(pairs), CHUNK):
        sources, targets = (
            tokenizer.encode_batch([pair[side] for pair in pairs[start : start + CHUNK]]) for side in (0, 1)
        )
        encoded += [
            (np.array([*source, end], dtype=np.int32), np.array([begin, *target, end], dtype=np.int32))
            for source, target in zip(sources, targets, strict=True)
        ]
    return encoded


def train_translator(
    run: TranslationRun,
    data: TranslationData,
    directory: Path,
    *,
    device: torch.device,
    resume: bool = False,
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float] | None:
    """Train as `run` says, save `directory/model`, and score the test set.

    Args:
        run: from `load_translation_run`.
        data: from `translation_data(run.task)`.
        directory: the run's folder: checkpoints, history, log, model.
        device: where to train.
        resume: go on from the newest checkpoint in `directory`.
        progress: show a progress line.
        rank, world_size: of this process; with several, torch.distributed is initialised.

    Returns:
        step, val_loss (nats per token) and test_bleu; None on all ranks but the first.

    Raises:
        CourseError: as `Trainer.fit`, and if `directory` holds a run on other data.
    """
    parts = {"model": run.model, "training": run.training.identity()}
    resume = runs.begin(directory, run.data(), parts, resume=resume, rank=rank)
    pad_id, settings = data.tokenizer.special_tokens[PAD], run.training
    torch.manual_seed(settings.seed)  # the same first weights on every process
    model = Transformer(run.model_config(data.tokenizer)).to(device)
    loader = PairLoader(data.training, settings.batch_size, settings.seed, pad_id, rank, world_size)
    trainer = Trainer(
        model,
        settings,
        loader.batch,
        sequence_loss(pad_id, run.task.label_smoothing),
        evaluate=lambda model: {"loss": nats_per_token(model, data.validation, dtype=settings.torch_dtype)},
        directory=directory,
        progress=progress,
    )
    last = trainer.fit(resume=resume)[-1]
    if rank != 0:
        return None
    model_utils.save_model(model, directory / runs.MODEL, data.tokenizer, replace=True)
    score = translation_bleu(model, data, run.task, settings.torch_dtype)
    return {"step": last["step"], "val_loss": last["val_loss"], "test_bleu": score}


def translation_bleu(
    model: nn.Module, data: TranslationData, task: TranslationConfig, dtype: torch.dtype = torch.float32
) -> float:
    """BLEU (sacrebleu, 13a) of beam search on the test set."""
    device = next(model.parameters()).device
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    special = data.tokenizer.special_tokens
    with autocast:
        found = translate(
            model,
            data.test,
            bos_id=special[BEGIN],
            eos_id=special[END],
            max_length=max(map(len, data.test)) + task.extra_length,
            beam_size=task.beam_size,
            alpha=task.length_penalty,
            batch_size=64,
        )
    return bleu([data.tokenizer.decode(ids) for ids in found], data.references)


def describe(run: TranslationRun, data: TranslationData, world_size: int = 1) -> str:
    """One line on what a run will take: parameters, pairs, updates, epochs."""
    with torch.device("meta"):
        parameters = model_utils.count_parameters(Transformer(run.model_config(data.tokenizer)))
    training = run.training
    pairs = training.steps * training.batch_size * training.accumulation * world_size
    return (
        f"{parameters:,} parameters, {len(data.training):,} training pairs, {training.steps:,} updates "
        f"({pairs / len(data.training):.1f} epochs)"
    )
