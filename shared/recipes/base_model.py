"""The course's base model: a tokenizer, token shards, a modern decoder trained on them, and its model card.

Documentation and code of the installed Python environment are mixed by fixed shares
(`configs/data/pydoc.yaml`) and divided by package: a package that is held out is held out of every corpus.
The decoder has rotary positions, RMSNorm, QK-norm, SwiGLU, grouped-query attention and tied embeddings, and
is saved as a `Qwen3ForCausalLM` in bfloat16. One file of `configs/training` is one run:

    pydoc-gpt.yaml         the long one, on CPU: the model that the course ships
    pydoc-gpt-gpu.yaml     the same on a GPU, with more parameters
    pydoc-gpt-short.yaml   about a minute on CPU, for notebooks: what `base_model("cpu")` builds

The long run: python -m shared.recipes.base_model --config configs/training/pydoc-gpt.yaml --out FOLDER
Ctrl-C saves and ends; --resume goes on.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from shared.data import corpora, shards, tokenizers
from shared.data.datasets import TokenLoader
from shared.data.preprocessing import hash_fraction, normalize, token_stream
from shared.evaluation.metrics import LMScore, evaluate_lm, nats_to_bits_per_byte
from shared.models import model_utils, qwen3
from shared.models.gpt import GPT, GPTConfig
from shared.recipes import model_card, runs
from shared.runtime import artifacts, files
from shared.runtime import scale as scales
from shared.runtime.errors import CourseError
from shared.training.config import Run, TrainConfig, from_mapping, load_run
from shared.training.trainer import History, Trainer

NAME = "pydoc-gpt"
WEEK = "week4"
CONFIGS = {"cpu": f"{NAME}-short.yaml", "gpu": f"{NAME}-gpu.yaml", "h100x2": f"{NAME}-gpu.yaml"}
TOKENIZER, MANIFEST = "tokenizer.json", "manifest.json"
LARGEST = 40_000_000  # bytes of the saved weights: they live in the repository
PERIOD = 1000  # sequences after which the corpora's shares are exact
EVALUATION_TOKENS = 8192  # of one evaluation batch
LONG_LINE = 40  # characters from which a line that two packages have in common says something
_FORMAT = 1  # of the rendered documents; part of the artefacts' keys


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A file of `configs/data` that mixes corpora.

    Attributes:
        corpora: name -> share of the sequences in a batch; the first decides which packages are held out.
        special_tokens: get the ids from 0 on; `<|endoftext|>` must be one of them.
        tokenizer_megabytes: 10⁶ bytes of each corpus that the tokenizer is trained on.
        baseline_megabytes: 10⁶ bytes of training text for the baselines of the model card.
        keep: name -> share of the corpus's documents that is trained on; 1 where it is not named.
        held_out: the same for the documents of the packages that are held out.

    Raises:
        CourseError: a share is out of its range, or no end of text.
    """

    corpora: dict[str, float]
    special_tokens: tuple[str, ...]
    tokenizer_megabytes: float
    baseline_megabytes: float
    keep: dict[str, float] | None = None
    held_out: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for key in ("keep", "held_out"):
            object.__setattr__(self, key, getattr(self, key) or {})
        if not self.corpora:
            raise CourseError("corpora names none; give at least one, with its share.")
        for key in ("corpora", "keep", "held_out"):
            for name, share in getattr(self, key).items():
                if name not in self.corpora:
                    raise CourseError(f"{key} names {name!r}, which is not among the corpora.")
                if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
                    raise CourseError(f"{key}.{name} is {share!r}; it must be more than 0 and at most 1.")
        if abs(sum(self.corpora.values()) - 1) > 1e-6:
            raise CourseError(f"The shares of the corpora add up to {sum(self.corpora.values()):g}, not 1.")
        if tokenizers.END_OF_TEXT not in self.special_tokens:
            raise CourseError(f"special_tokens lacks {tokenizers.END_OF_TEXT}, which ends a document.")
        for key in ("tokenizer_megabytes", "baseline_megabytes"):
            if not getattr(self, key) > 0:
                raise CourseError(f"{key} is {getattr(self, key)}; it must be more than 0.")


@dataclass(frozen=True)
class MixedData:
    """Corpora as token ids.

    Attributes:
        tokenizer: what made them.
        mix: what they were mixed by.
        training, validation: corpus -> (N,) ids, memory-mapped; each stream starts with an end of text, and
            each document ends with one.
        manifest: what is in it: documents, bytes, tokens and packages of each corpus.
        path: the artefact.
    """

    tokenizer: tokenizers.Tokenizer
    mix: Mix
    training: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    manifest: dict[str, Any]
    path: Path

    def validation_bytes(self, name: str) -> int:
        """UTF-8 length of a corpus's held-out text."""
        return self.manifest["corpora"][name]["validation"]["bytes"]


def config_path(scale: str = "cpu") -> Path:
    """The configuration that `base_model(scale)` builds from.

    Raises:
        CourseError: no such scale.
    """
    if scale not in CONFIGS:
        raise CourseError(f"Unknown scale {scale!r}; choose one of {', '.join(CONFIGS)}.")
    return files.repository_root() / "configs" / "training" / CONFIGS[scale]


def load_mix(name: str) -> Mix:
    """`configs/data/NAME.yaml`, checked.

    Raises:
        CourseError: there is no such file, or a key or value in it is not allowed.
    """
    path = files.repository_root() / "configs" / "data" / f"{name}.yaml"
    if not path.is_file():
        raise CourseError(
            f"data.corpus is {name!r}, and there is no mix of corpora configs/data/{name}.yaml."
        )
    try:
        values = yaml.safe_load(files.read_text(path))
    except yaml.YAMLError as error:
        raise CourseError(f"{path} is not valid YAML.") from error
    if not isinstance(values, dict):
        raise CourseError(f"{path} holds no keys; see configs/data/pydoc.yaml.")
    return from_mapping(Mix, values, str(path))


# --------------------------------------------------------------------------------- documents and tokens


def render(corpus: str, document: corpora.Document) -> str:
    """A document as the model reads it: what it is and its full name, an empty line, the text.

    "function os.path.join(a, *p)", "class collections.OrderedDict(dict)", "module json", "topic assert"; of
    `python-code`, "source json.decoder".
    """
    name = document.id.partition("#")[0]  # a second definition of a name is "name#2"
    if corpus == "python-code":
        return f"source {name}\n\n{normalize(document.text)}"
    if document.kind == "topic":
        name = name.removeprefix("help.")
    short = name.rpartition(".")[2]
    if document.signature.removeprefix("async ").startswith(short):
        signature = document.signature.removeprefix("async ")
        name = name.removesuffix(short) + " ".join(signature.split())
    return f"{document.kind} {name}\n\n{normalize(document.text)}"


def held_out_packages(mix: Mix, validation: float) -> set[str]:
    """The packages that no corpus is trained on: chosen by hash in the mix's first corpus.

    Raises:
        CourseError: none is small enough.
    """
    first = corpora.load(next(iter(mix.corpora)))
    return {document.package for document in first.split(validation, by="package")[1]}


def base_tokenizer(scale: str = "cpu") -> Path:
    """The base model's tokenizer: a folder with `tokenizer.json`, made once; a few seconds to half a minute.

    The same for every scale whose mix names the same corpora.

    Raises:
        CourseError: no such scale, or a corpus is not there.
    """
    run = load_run(config_path(scale))
    return _tokenizer(run, load_mix(run.data.corpus))


def _tokenizer(run: Run, mix: Mix) -> Path:
    key = {
        "format": _FORMAT,
        "corpora": {name: corpora.load(name).manifest["sha256"] for name in mix.corpora},
        "megabytes": mix.tokenizer_megabytes,
        "special_tokens": mix.special_tokens,
        "vocab_size": run.data.vocab_size,
        "validation": run.data.validation,
    }

    def make(folder: Path) -> dict[str, Any]:
        held_out = held_out_packages(mix, run.data.validation)
        texts = [text for name in mix.corpora for text in _tokenizer_texts(name, mix, held_out)]
        tokenizer = tokenizers.LibraryTokenizer.train(texts, run.data.vocab_size, mix.special_tokens)
        tokenizer.save(folder / TOKENIZER)
        return {"bytes": sum(len(text.encode()) for text in texts), "vocab_size": tokenizer.vocab_size}

    return artifacts.build(f"tokenizers/{NAME}", key, make, week=WEEK)


def _tokenizer_texts(name: str, mix: Mix, held_out: set[str]) -> Iterator[str]:
    """About `tokenizer_megabytes` of a corpus's training part, drawn by document."""
    corpus = corpora.load(name)
    share = mix.tokenizer_megabytes * 1e6 / max(1, corpus.manifest["bytes"])
    for document in corpus.documents:
        if document.package not in held_out and hash_fraction(f"tokenizer {document.id}") < share:
            yield render(name, document)


def mixed_data(run: Run) -> MixedData:
    """The corpora of a run's mix as token ids, made once and kept as an artefact.

    Texts that are the same to the letter are used once; one that is in the training part of any corpus is
    left out of what is held out.

    Raises:
        CourseError: there is no such mix, a corpus is not there or too short, or the artefact is damaged.
    """
    mix = load_mix(run.data.corpus)
    parent = _tokenizer(run, mix)
    tokenizer = tokenizers.load(parent / TOKENIZER)
    key = {
        "format": _FORMAT,
        "corpora": {name: corpora.load(name).manifest["sha256"] for name in mix.corpora},
        "keep": mix.keep,
        "held_out": mix.held_out,
        "validation": run.data.validation,
    }
    path = artifacts.build(
        f"tokens/{NAME}",
        key,
        lambda folder: _write_tokens(folder, run, mix, tokenizer),
        parents=[parent],
        week=WEEK,
    )
    parts: dict[str, dict[str, np.ndarray]] = {"training": {}, "validation": {}}
    for name in mix.corpora:
        for part, streams in parts.items():
            shard = shards.open_shards(path / f"{name}.{part}.tokens", tokenizer)
            shard.verify()
            streams[name] = shard.tokens
    manifest = json.loads(files.read_text(path / MANIFEST))
    return MixedData(tokenizer, mix, parts["training"], parts["validation"], manifest, path)


class _Counted:
    """Counts what goes through: documents, bytes, and both for each package."""

    def __init__(self) -> None:
        self.documents = self.bytes = 0
        self.packages: dict[str, dict[str, Any]] = {}

    def add(self, document: corpora.Document, text: str) -> None:
        size = len(text.encode())
        row = self.packages.setdefault(
            document.package,
            {"version": document.version, "license": document.license, "documents": 0, "bytes": 0},
        )
        for counts in (self.__dict__, row):
            counts["documents"] += 1
            counts["bytes"] += size


def _write_tokens(folder: Path, run: Run, mix: Mix, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    held_out = held_out_packages(mix, run.data.validation)
    seen: set[bytes] = set()
    lines: set[int] = set()
    report: dict[str, Any] = {name: {"sha256": corpora.load(name).manifest["sha256"]} for name in mix.corpora}
    for part in ("training", "validation"):  # all training texts first: nothing of them may be held out
        for name in mix.corpora:
            counted, overlap = _Counted(), [0, 0]
            texts = _distinct(name, mix, held_out, part, seen, counted)
            if part == "training":
                texts = _noting_lines(texts, lines)
            else:
                texts = _comparing_lines(texts, lines, overlap)
            path = folder / f"{name}.{part}.tokens"
            stream = _with_end_in_front(token_stream(texts, tokenizer), tokenizer)
            shards.write_shards(path, stream, tokenizer.vocab_size, tokenizer.fingerprint())
            if not counted.documents:
                raise CourseError(f"{name} has no document in its {part} part; raise its share.")
            tokens = len(shards.open_shards(path, tokenizer))
            report[name][part] = {
                "documents": counted.documents,
                "bytes": counted.bytes,
                "tokens": tokens,
                "packages": counted.packages,
            }
            if part == "validation":
                report[name][part]["seen_lines"] = overlap[0] / max(1, overlap[1])
    content = {"held_out": sorted(held_out), "corpora": report}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sizes = ("documents", "bytes", "tokens")
    return {
        name: {part: {key: report[name][part][key] for key in sizes} for part in ("training", "validation")}
        for name in report
    }


def _distinct(
    name: str, mix: Mix, held_out: set[str], part: str, seen: set[bytes], counted: _Counted
) -> Iterator[str]:
    """The rendered documents of one part of a corpus, those left out whose text was there before."""
    share = (mix.keep if part == "training" else mix.held_out).get(name, 1.0)
    for document in corpora.load(name).documents:
        if (document.package in held_out) != (part == "validation") or hash_fraction(document.id) >= share:
            continue
        text = document.text.encode("utf-8", "replace").decode()  # some sources spell out half a surrogate
        digest = hashlib.sha256(normalize(text).encode()).digest()
        if digest not in seen:
            seen.add(digest)
            rendered = render(name, document)
            counted.add(document, rendered)
            yield rendered


def _long_lines(text: str) -> Iterator[str]:
    return (line for line in map(str.strip, text.split("\n")) if len(line) >= LONG_LINE)


def held_out_texts(data: MixedData) -> dict[str, dict[str, list[str]]]:
    """Corpus -> package -> its held-out documents, as the model reads them.

    A model that was trained in another environment may have read some of these packages; it is scored on the
    others.
    """
    end = data.tokenizer.special_tokens[tokenizers.END_OF_TEXT]
    texts: dict[str, dict[str, list[str]]] = {}
    for name, tokens in data.validation.items():
        pieces = np.split(np.asarray(tokens), np.flatnonzero(np.asarray(tokens) == end) + 1)
        # Before the first end there is nothing, and after the last. A corpus has its packages in turn.
        found = iter([data.tokenizer.decode(piece[:-1].tolist()) for piece in pieces[1:-1]])
        packages = data.manifest["corpora"][name]["validation"]["packages"]
        texts[name] = {key: list(islice(found, row["documents"])) for key, row in packages.items()}
    return texts


def _noting_lines(texts: Iterable[str], lines: set[int]) -> Iterator[str]:
    for text in texts:
        lines.update(map(hash, _long_lines(text)))
        yield text


def _comparing_lines(texts: Iterable[str], lines: set[int], overlap: list[int]) -> Iterator[str]:
    """Add up the characters of long lines that training has too, and of all long lines."""
    for text in texts:
        for line in _long_lines(text):
            overlap[0] += len(line) * (hash(line) in lines)
            overlap[1] += len(line)
        yield text


def _with_end_in_front(stream: Iterable[np.ndarray], tokenizer: tokenizers.Tokenizer) -> Iterator[np.ndarray]:
    """The stream after an end of text, so that its first token has something before it, too."""
    yield np.array([tokenizer.special_tokens[tokenizers.END_OF_TEXT]])
    yield from stream


# ---------------------------------------------------------------------------------------------- batches


def interleaved(shares: Sequence[float], period: int = PERIOD) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An order in which K streams are taken in turn, each by its share, spread as evenly as can be.

    Args:
        shares: K numbers that add up to 1.
        period: sequences after which the order repeats.

    Returns:
        which (period,), the stream of each place; number (period,), how many of that stream came before in
        the period; counts (K,), how many there are of each in a period, at least 1.

    Raises:
        CourseError: a share is less than one in `period`.
    """
    counts = np.diff(np.round(period * np.cumsum([0.0, *shares]) / sum(shares))).astype(int)
    if counts.min() < 1:
        raise CourseError(f"A share of {min(shares):g} is too small; give each corpus at least 1/{period}.")
    which = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((number + 0.5) / counts[which], kind="stable")
    return which[order], number[order], counts


def mixed_batches(
    streams: Sequence[np.ndarray], shares: Sequence[float], config: TrainConfig
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """(inputs, targets) of micro-step m, each (B, T) int64, of several streams by their shares.

    A pure function of seed and m, as training must have it to be resumed. Each stream runs through epochs of
    its own: a small one with a large share comes round more often.

    Args:
        streams: (N,) ids each.
        shares: of the sequences; they add up to 1.
        config: sizes, stages, seed, sampling.

    Raises:
        CourseError: a stream is shorter than a window, or a share too small.
    """
    which, number, counts = interleaved(shares)
    loaders: dict[tuple[int, int], TokenLoader] = {}

    def loader(stream: int, context_length: int) -> TokenLoader:
        key = (stream, context_length)
        if key not in loaders:
            loaders[key] = TokenLoader(
                streams[stream], 1, context_length, config.seed, sampling=config.sampling
            )
        return loaders[key]

    def batch(micro_step: int) -> tuple[Tensor, Tensor]:
        stage = config.stage_at(micro_step // config.accumulation)
        rows = []
        for sequence in range(micro_step * stage.batch_size, (micro_step + 1) * stage.batch_size):
            period, place = divmod(sequence, len(which))
            stream = int(which[place])
            window = period * int(counts[stream]) + int(number[place])
            rows.append(loader(stream, stage.context_length).batch(window))
        inputs, targets = zip(*rows, strict=True)
        return torch.cat(inputs), torch.cat(targets)

    return batch


# --------------------------------------------------------------------------------------------- training


def model_config(run: Run, vocab_size: int) -> GPTConfig:
    """The architecture of a run, once it is known to be a Qwen3 that fits into the repository.

    Raises:
        CourseError: a choice is not Qwen3's, or the weights take more than `LARGEST` bytes in bfloat16.
    """
    config = run.model_config(vocab_size)
    if not qwen3.fits(config):
        qwen3.settings(config)  # says which choice it is
    with torch.device("meta"):
        size = 2 * GPT(config).num_parameters()
    if size > LARGEST:
        raise CourseError(
            f"{run.path}: this model takes {size / 1e6:.1f} MB in bfloat16 and the repository has room for "
            f"{LARGEST / 1e6:.0f} MB; make d_model, num_layers or d_ff smaller."
        )
    return config


def held_out_scores(
    model: nn.Module, data: MixedData, context_length: int, dtype: torch.dtype = torch.float32
) -> dict[str, LMScore]:
    """What the model pays for each corpus's held-out text, all of it; each token is predicted once."""
    batch_size = max(1, EVALUATION_TOKENS // context_length)
    return {
        name: evaluate_lm(model, tokens, context_length=context_length, batch_size=batch_size, dtype=dtype)
        for name, tokens in data.validation.items()
    }


def summary(scores: Mapping[str, LMScore], data: MixedData) -> dict[str, float]:
    """loss (nats per token) and bits_per_byte over all held-out text, and bits per byte of each corpus."""
    nats = sum(score.total_nats for score in scores.values())
    num_bytes = sum(map(data.validation_bytes, scores))
    each = {
        f"bits_per_byte_{name}": s.bits_per_byte(data.validation_bytes(name)) for name, s in scores.items()
    }
    return {
        "loss": nats / sum(score.tokens for score in scores.values()),
        "bits_per_byte": nats_to_bits_per_byte(nats, num_bytes),
        **each,
    }


def train_base_model(
    run: Run,
    data: MixedData,
    directory: Path,
    *,
    device: torch.device,
    resume: bool = False,
    progress: bool = True,
) -> History:
    """Train as `run` says; the model lands in `directory/model`, with card and lineage, all or nothing.

    Args:
        run: from `load_run`.
        data: from `mixed_data(run)`.
        directory: the run's folder: checkpoints, history, log.
        device: where to train.
        resume: go on from the newest checkpoint in `directory`.
        progress: show a progress line.

    Returns:
        The trainer's history; the last entry has val_loss, val_bits_per_byte and val_bits_per_byte_CORPUS.

    Raises:
        CourseError: as `model_config` and `Trainer.fit`, and if `directory` holds a run on other data.
    """
    config = model_config(run, data.tokenizer.vocab_size)
    settings = run.training
    identity = {"tokens": data.path.name, "shares": data.mix.corpora}
    parts = {"model": asdict(config), "training": settings.identity()}
    with runs.reserved(directory, resume=resume, rank=0):
        resume = runs.begin(directory, identity, parts, resume=resume, rank=0)
        torch.manual_seed(settings.seed)
        model = GPT(config).to(device)

        def evaluate(model: nn.Module) -> dict[str, float]:
            scores = held_out_scores(model, data, settings.context_length, settings.torch_dtype)
            return summary(scores, data)

        trainer = Trainer(
            model,
            settings,
            mixed_batches(list(data.training.values()), list(data.mix.corpora.values()), settings),
            evaluate=evaluate,
            directory=directory,
            progress=progress,
            bytes_per_token=sum(map(data.validation_bytes, data.validation))
            / sum(len(tokens) - 1 for tokens in data.validation.values()),
        )
        history = trainer.fit(resume=resume)
        with files.atomic_directory(directory / runs.MODEL, replace=True) as folder:
            metrics = write_model(folder, model, run, data, history)
            _write_lineage(folder, run, data, metrics, "cpu" if device.type == "cpu" else "gpu")
    return history


def write_model(folder: Path, model: GPT, run: Run, data: MixedData, history: History) -> dict[str, Any]:
    """Save weights (bfloat16), tokenizer, curve and model card into a folder; the saved weights are scored.

    Args:
        folder: an existing, empty one.
        model: on any device.
        run, data, history: what made it.

    Returns:
        The scores of the saved model: as `summary`; under "baselines" bits per byte of gzip, primed zstd and
        the 8-gram on the same text; under "curve" the run's losses, as `model_card.points`.
    """
    model_utils.save_model(model, folder, data.tokenizer, dtype=torch.bfloat16, replace=True)
    device = next(model.parameters()).device
    saved = model_utils.load_model(folder).to(device)
    scores = held_out_scores(saved, data, run.training.context_length, run.training.torch_dtype)
    baselines = model_card.baselines(
        data.training, data.validation, data.mix.corpora, data.tokenizer, data.mix.baseline_megabytes
    )
    metrics = {**summary(scores, data), "baselines": baselines, "curve": model_card.points(history)}
    samples = model_card.samples(saved, data.tokenizer)
    (folder / model_card.CURVE).write_text(model_card.curve(history), encoding="utf-8")
    card = model_card.render(
        run=run,
        config=saved.config,
        parameters=saved.num_parameters(),
        weight_bytes=(folder / model_utils.WEIGHTS).stat().st_size,
        manifest=data.manifest,
        mix=data.mix.corpora,
        baseline_megabytes=data.mix.baseline_megabytes,
        history=history,
        metrics=metrics,
        samples=samples,
        device=device,
    )
    (folder / model_card.CARD).write_text(card, encoding="utf-8")
    return metrics


def _write_lineage(folder: Path, run: Run, data: MixedData, metrics: Mapping[str, Any], scale: str) -> None:
    """The record that `artifacts.build` would make, for a model that was trained in a folder of its own.

    It also has the size and the SHA-256 of every file, because this folder travels.
    """
    key = {
        "kind": f"models/{NAME}",
        "config": _key(run, data),
        "parents": [artifacts.lineage(data.path)["key"]],
        "scale": scale,
    }
    record = {
        **key,
        "key": files.sha256_json(key),
        "metrics": dict(metrics),
        "data": data.manifest,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
            for path in sorted(folder.iterdir())
        },
        "week": WEEK,
        "commit": artifacts.commit(),
    }
    text = json.dumps(record, indent=2) + "\n"
    (folder / artifacts.LINEAGE).write_text(text, encoding="utf-8")


def _key(run: Run, data: MixedData) -> dict[str, Any]:
    """Everything that decides the weights but for the tokens."""
    config = run.model_config(data.tokenizer.vocab_size)
    return {"model": asdict(config), "training": run.training.identity(), "shares": data.mix.corpora}


def base_model(scale: str = "cpu") -> Path:
    """The folder of a base model that is built here if it is not there yet: Qwen3's layout, tokenizer, card.

    At "cpu" this is the short run, training about a minute: enough to show every step, not the model that the
    course ships. At "gpu" and "h100x2" it is the long one, on one GPU.

    Raises:
        CourseError: no such scale on this machine, or a corpus is not there.
    """
    machine = scales.start(scale, quiet=True)
    run = load_run(config_path(machine.name), dtype=str(machine.dtype).removeprefix("torch."))
    data = mixed_data(run)

    def make(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as work:
            directory = Path(work) / "run"
            train_base_model(run, data, directory, device=machine.device)
            for file in (directory / runs.MODEL).iterdir():
                if file.name != artifacts.LINEAGE:
                    (folder / file.name).write_bytes(file.read_bytes())
            return artifacts.lineage(directory / runs.MODEL)["metrics"]

    return artifacts.build(
        f"models/{NAME}", _key(run, data), make, parents=[data.path], scale=machine.name, week=WEEK
    )


def shipped_model() -> Path:
    """The folder of the model that comes with the course, from the long run.

    Raises:
        CourseError: it is not there.
    """
    path = files.repository_root() / "models" / "phase1" / NAME
    if not (path / model_utils.WEIGHTS).is_file():
        raise CourseError(
            f"There is no {path}; fetch the whole repository, or train it: "
            f"python -m shared.recipes.base_model --config configs/training/{NAME}.yaml --out FOLDER."
        )
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a base model; exit status 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m shared.recipes.base_model", description=main.__doc__)
    parser.add_argument("--config", required=True, type=Path, help="a file of configs/training")
    parser.add_argument("--out", required=True, type=Path, help="folder of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="training.steps=100")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--scale", default="auto", help="auto, cpu or gpu")
    options = parser.parse_args(arguments)
    try:
        machine = scales.start(options.scale, quiet=True)
        dtype = str(machine.dtype).removeprefix("torch.")
        run = load_run(options.config, options.set, dtype=dtype)
        data = mixed_data(run)
        print("\n".join(machine.reasons), file=sys.stderr, flush=True)
        last = train_base_model(run, data, options.out, device=machine.device, resume=options.resume)[-1]
    except CourseError as error:
        print(f"base_model: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"base_model: {interrupt or 'stopped before training began.'}", file=sys.stderr)
        return getattr(interrupt, "exit_status", 130)
    print(f"{last['val_bits_per_byte']:.4f} bits per byte on held-out packages: {options.out / runs.MODEL}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
