"""From a configuration file to a trained language model: tokenizer, token shards, training, saved model."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.data import corpora, shards, tokenizers
from shared.data.preprocessing import token_stream
from shared.evaluation.metrics import nats_to_bits_per_byte
from shared.models import model_utils
from shared.models.gpt import GPT, GPTConfig
from shared.recipes import runs
from shared.runtime import artifacts
from shared.runtime.errors import CourseError
from shared.training import sharding
from shared.training.config import DataConfig, Run
from shared.training.trainer import History, Trainer, lm_evaluator, token_batches

TOKENIZER, TRAINING, VALIDATION = "tokenizer.json", "training.tokens", "validation.tokens"
EVALUATION_TOKENS = 4096  # of one evaluation batch: enough to fill two cores, few enough for 8 GB at V = 50k


@dataclass(frozen=True)
class TokenData:
    """A corpus as token ids.

    Attributes:
        tokenizer: what made them.
        training, validation: (N,) ids, memory-mapped.
        validation_bytes: UTF-8 length of the validation text, for bits per byte.
        path: the artefact.
    """

    tokenizer: tokenizers.Tokenizer
    training: np.ndarray
    validation: np.ndarray
    validation_bytes: int
    path: Path


@dataclass(frozen=True)
class Cost:
    """What a run will take: trained numbers, tokens seen, floating-point operations."""

    parameters: int
    tokens: int
    flops: float

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.tokens:,} tokens, {self.flops:.2e} FLOPs"


def token_data(config: DataConfig) -> TokenData:
    """The corpus tokenised, by a tokenizer trained on its training part; made once and kept as an artefact.

    Raises:
        CourseError: the corpus is not there, or too short to be split; or the artefact was damaged since.
    """
    corpus = corpora.load(config.corpus, **({"path": config.path} if config.path else {}))
    key = dataclasses.asdict(config) | {"path": None, "sha256": corpus.manifest["sha256"]}
    if config.tokenizer == "char":
        del key["vocab_size"]
    path = artifacts.build("tokens", key, lambda folder: _write_tokens(folder, corpus, config))
    tokenizer = tokenizers.load(path / TOKENIZER)
    training, validation = (_checked(path / name, tokenizer) for name in (TRAINING, VALIDATION))
    if len(validation) < 2:
        raise CourseError(
            f"The part of {config.path or config.corpus} that is held out has {len(validation)} token and "
            "nothing to predict; use a longer text, or raise data.validation."
        )
    size = artifacts.lineage(path)["metrics"]["validation_bytes"]
    return TokenData(tokenizer, training, validation, size, path)


def _checked(path: Path, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """The ids of a shard, every byte compared with its checksum."""
    shard = shards.open_shards(path, tokenizer)
    shard.verify()
    return shard.tokens


def _write_tokens(folder: Path, corpus: corpora.Corpus, config: DataConfig) -> dict[str, int]:
    training, validation = ([d.text for d in part] for part in corpus.split(config.validation))
    if config.tokenizer == "char":
        tokenizer: tokenizers.Tokenizer = tokenizers.CharTokenizer.from_text(corpus.text())
    else:
        tokenizer = tokenizers.LibraryTokenizer.train(training, config.vocab_size)
    tokenizer.save(folder / TOKENIZER)
    for name, texts in ((TRAINING, training), (VALIDATION, validation)):
        stream = token_stream(texts, tokenizer)
        shards.write_shards(folder / name, stream, tokenizer.vocab_size, tokenizer.fingerprint())
    return {"validation_bytes": sum(len(text.encode()) for text in validation)}


def planned_cost(run: Run, config: GPTConfig, world_size: int = 1) -> Cost:
    """Parameters, tokens and FLOPs of a run, from its configuration alone: no memory is taken."""
    with torch.device("meta"):
        model = GPT(config)
    stages = run.training.tokens_by_context(world_size)
    flops = sum(tokens * model.flops_per_token(context) for context, tokens in stages)
    return Cost(model.num_parameters(), sum(tokens for _, tokens in stages), float(flops))


def train_language_model(
    run: Run,
    data: TokenData,
    directory: Path,
    *,
    device: torch.device,
    resume: bool = False,
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> History:
    """Train a GPT as `run` says and save it in `directory/model`, beside checkpoints, history and log.

    The weights are drawn from `run.training.seed`, the same on every device.

    Args:
        run: from `load_run`.
        data: from `token_data(run.data)`.
        directory: the run's folder.
        device: where to train.
        resume: go on from the newest checkpoint in `directory`.
        progress: show a progress line.
        rank, world_size: of this process; with several, torch.distributed is initialised.

    Returns:
        The trainer's history; the last entry has val_loss (nats per token) and val_bits_per_byte.

    Raises:
        CourseError: as `Trainer.fit`, and if `directory` holds a run on other data.
    """
    settings = {"model": run.model, "training": run.training.identity()}
    with runs.reserved(directory, resume=resume, rank=rank):
        resume = runs.begin(directory, data.path.name, settings, resume=resume, rank=rank)
        torch.manual_seed(run.training.seed)
        config = run.model_config(data.tokenizer.vocab_size)
        model = GPT(config).to(device)
        trainer = Trainer(
            model,
            run.training,
            token_batches(data.training, run.training, rank, world_size),
            evaluate=_evaluator(run, data),
            directory=directory,
            progress=progress,
            bytes_per_token=data.validation_bytes / len(data.validation),
        )
        history = trainer.fit(resume=resume)
        if trainer.sharded:
            state = sharding.gather_model(model).state_dict()
            model = GPT(config)
            model.load_state_dict(state)
        if rank == 0:
            model_utils.save_model(model, directory / runs.MODEL, data.tokenizer, replace=True)
        return history


def _evaluator(run: Run, data: TokenData) -> Any:
    context = run.training.context_length
    loss = lm_evaluator(
        data.validation, context, max(1, EVALUATION_TOKENS // context), run.training.torch_dtype
    )
    predicted = len(data.validation) - 1

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        nats = loss(model)["loss"]
        return {"loss": nats, "bits_per_byte": nats_to_bits_per_byte(nats * predicted, data.validation_bytes)}

    return evaluate
