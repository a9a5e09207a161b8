"""What a training run is made of, read from YAML and checked key by key.

A file in `configs/training/` states the difference from the defaults below, in three sections:

    data:      which corpus, which tokenizer                  (DataConfig)
    model:     GPTConfig's fields, or `preset: gpt2` and what differs from it
    training:  optimiser, schedule, sizes, intervals          (TrainConfig)

Every key carries its unit and range here, once; a wrong key, type or value is refused with file, key, value
and what is allowed.
"""

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from shared.runtime.errors import CourseError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What does not decide the weights, and so may change from one part of a run to the next.
ASIDE = (
    "activation_checkpointing",
    "parallel",
    "log_interval",
    "eval_interval",
    "checkpoint_interval",
    "keep",
    "keep_every",
    "save_best",
    "patience",
    "tracker",
    "peak_tflops",
)
# Younger than some checkpoints: named in a run's identity only where they differ from the default.
YOUNGER = ("compile", "guard", "guard_window", "guard_patience", "guard_rollbacks")
C = TypeVar("C")


def _key(
    default: Any = dataclasses.MISSING,
    unit: str = "",
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field with its unit and its range (both ends allowed)."""
    return field(default=default, metadata={"unit": unit, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """From update `start` on, batches have this size: short contexts first, say, then long ones."""

    start: int = _key(unit="update", least=0)
    batch_size: int = _key(unit="sequences a micro-batch", least=1)
    context_length: int = _key(unit="tokens a sequence", least=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. One update = `accumulation` micro-batches of `batch_size` sequences a process.

    Raises:
        CourseError: a value is of the wrong type or out of its range.
    """

    steps: int = _key(unit="updates", least=1)
    batch_size: int = _key(16, "sequences a micro-batch", least=1)
    context_length: int = _key(128, "tokens a sequence", least=1)
    stages: tuple[Stage, ...] = _key((), "sizes that change on the way; empty: the two above throughout")
    sampling: str = _key("epochs", "each window once an epoch, or drawn anew", choices=("epochs", "uniform"))
    accumulation: int = _key(1, "micro-batches an update", least=1)
    optimizer: str = _key("adamw", choices=("adamw", "muon"))
    learning_rate: float = _key(1e-3, "AdamW's peak rate", least=0.0)
    betas: tuple[float, float] = _key((0.9, 0.95), "decay of AdamW's two moments", least=0.0, most=0.99999)
    epsilon: float = _key(1e-8, "added to AdamW's denominator", least=0.0)
    fused: bool = _key(True, "one kernel for AdamW's whole update")
    muon_learning_rate: float = _key(0.02, "Muon's peak rate, in spectral norm", least=0.0)
    muon_momentum: float = _key(0.95, "Nesterov momentum", least=0.0, most=0.99999)
    muon_steps: int = _key(5, "Newton–Schulz rounds", least=1, most=20)
    weight_decay: float = _key(0.1, "decoupled, matrices and embeddings only", least=0.0)
    schedule: str = _key("cosine", choices=("constant", "cosine", "wsd", "noam"))
    warmup_steps: int = _key(0, "updates of linear warm-up", least=0)
    min_lr_ratio: float = _key(0.1, "last rate over peak rate (cosine, wsd)", least=0.0, most=1.0)
    decay_fraction: float = _key(0.2, "share of the updates in wsd's decay", least=0.0, most=1.0)
    clip: float = _key(1.0, "largest global gradient norm; 0: no clipping", least=0.0)
    dtype: str = _key(
        "float32",
        "number format of matrix multiplications; float16: losses are scaled",
        choices=tuple(DTYPES),
    )
    activation_checkpointing: bool = _key(
        False, "compute each block's activations again in backward: less memory, a third more arithmetic"
    )
    compile: bool = _key(False, "let torch.compile generate kernels: a minute at the start, then faster")
    parallel: str = _key(
        "ddp", "on several processes: a copy of the model on each, or shards of it", choices=("ddp", "fsdp2")
    )
    guard: float = _key(
        0.0,
        "standard deviations above the mean from which a loss or gradient norm is skipped; 0: off",
        least=0.0,
    )
    guard_window: int = _key(128, "updates that mean and deviation are taken over", least=8)
    guard_patience: int = _key(5, "skipped updates in a row before going back to a checkpoint", least=1)
    guard_rollbacks: int = _key(2, "times to go back before the run stops", least=0)
    seed: int = _key(0, "order of the data", least=0, most=2**32 - 1)
    log_interval: int = _key(10, "updates between history entries", least=1)
    eval_interval: int = _key(0, "updates between evaluations; 0: only after the last", least=0)
    checkpoint_interval: int = _key(0, "updates between checkpoints; 0: only after the last", least=0)
    keep: int = _key(2, "checkpoints to keep, beside the best", least=1)
    keep_every: int = _key(0, "updates; a checkpoint at each multiple is kept for good; 0: none", least=0)
    save_best: bool = _key(False, "a checkpoint at every evaluation with the lowest val_loss so far, too")
    patience: int = _key(0, "evaluations without a lower val_loss before the run stops; 0: never", least=0)
    tracker: str = _key("tensorboard", "where to watch the run", choices=("tensorboard", "wandb", "none"))
    peak_tflops: float = _key(
        0.0, "of a process's hardware, in 10^12 FLOP/s, for MFU; 0: measured by a matmul", least=0.0
    )

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):  # `dtype=machine.dtype` reads well in a notebook
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        _check(self, "training configuration")
        starts = [stage.start for stage in self.stages]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise CourseError(
                f"stages start at {starts}; the first must start at 0 and each later than the last."
            )
        if self.patience and not self.eval_interval:
            raise CourseError(
                f"patience is {self.patience} and eval_interval 0; evaluations are what patience counts."
            )
        if self.parallel == "fsdp2" and (self.optimizer == "muon" or self.dtype == "float16"):
            raise CourseError(
                f"parallel is 'fsdp2' with {self.optimizer} in {self.dtype}; shards of a model are trained "
                "by adamw, in bfloat16 or float32."
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as PyTorch names it."""
        return DTYPES[self.dtype]

    def stage_at(self, step: int) -> Stage:
        """Batch size and context length of update `step`."""
        first = Stage(start=0, batch_size=self.batch_size, context_length=self.context_length)
        return next((stage for stage in reversed(self.stages) if stage.start <= step), first)

    def tokens_by_context(self, world_size: int = 1) -> list[tuple[int, int]]:
        """(context length, tokens of all processes together) of each stage."""
        stages = self.stages or (self.stage_at(0),)
        ends = [stage.start for stage in stages[1:]] + [self.steps]
        result = []
        for stage, end in zip(stages, ends, strict=True):
            updates = min(end, self.steps) - min(stage.start, self.steps)
            sequences = updates * self.accumulation * stage.batch_size * world_size
            result.append((stage.context_length, sequences * stage.context_length))
        return result

    def identity(self) -> dict[str, Any]:
        """What decides the weights: all but intervals, logging, and how the work is laid out."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key not in ASIDE and not (key in YOUNGER and value == defaults[key])
        }


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a model is trained on.

    Raises:
        CourseError: a value is of the wrong type or out of its range.
    """

    corpus: str = _key("python-docs", "a name of `corpora.load`")
    path: str | None = _key(None, "file or folder, for corpus `text`")
    tokenizer: str = _key(
        "bpe", "characters, or byte-level BPE trained on the training part", choices=("char", "bpe")
    )
    vocab_size: int = _key(8192, "entries of the BPE vocabulary", least=257, most=2**20)
    validation: float = _key(0.1, "share held out", least=0.001, most=0.5)

    def __post_init__(self) -> None:
        _check(self, "data configuration")
        if self.path is not None and self.corpus != "text":
            raise CourseError(
                f"data.path is {self.path!r} and data.corpus {self.corpus!r}; only 'text' has a path."
            )


@dataclass(frozen=True)
class Run:
    """A checked configuration file: `model` holds GPTConfig's fields but for the vocabulary's size."""

    data: DataConfig
    model: dict[str, Any]
    training: TrainConfig
    path: Path

    def model_config(self, vocab_size: int) -> Any:
        """The GPTConfig of this run.

        Raises:
            CourseError: the model's choices do not fit together.
        """
        from shared.models.gpt import PRESETS, GPTConfig

        choices = {"context_length": self.training.context_length, **self.model, "vocab_size": vocab_size}
        preset = choices.pop("preset", None)
        try:
            if preset:
                config = dataclasses.replace(PRESETS[preset], **choices)
            else:
                config = GPTConfig.from_dict(choices)
        except CourseError as error:
            raise CourseError(f"{self.path}: model: {error}") from error
        longest = max([self.training.context_length, *[s.context_length for s in self.training.stages]])
        if longest > config.context_length:
            raise CourseError(
                f"{self.path}: training has sequences of {longest} tokens and model.context_length is "
                f"{config.context_length}; raise it, or shorten them."
            )
        return config


def load_run(path: Path | str, overrides: Sequence[str] = (), *, dtype: str = "float32") -> Run:
    """Read a configuration file.

    Args:
        path: a YAML file with the sections data, model and training.
        overrides: "training.steps=100" and the like; values are read as YAML.
        dtype: for `training.dtype` where the file does not say.

    Raises:
        CourseError: the file cannot be read, or a key or value is not allowed; file, key, value and the
            allowed range are named.
    """
    path = Path(path)
    sections = read_sections(path, overrides, ("data", "model", "training"))
    training = {"dtype": dtype, **sections.get("training", {})}
    return Run(
        data=from_mapping(DataConfig, sections.get("data", {}), str(path), "data."),
        model=_model_choices(sections.get("model", {}), path),
        training=from_mapping(TrainConfig, training, str(path), "training."),
        path=path,
    )


def read_sections(
    path: Path | str, overrides: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The sections of a configuration file, as plain values, with `overrides` applied.

    Args:
        path: a YAML file.
        overrides: "training.steps=100" and the like.
        names: the sections that there may be.

    Raises:
        CourseError: the file cannot be read, an override is malformed, or a section is unknown or no mapping.
    """
    path = Path(path)
    sections = _read(path)
    for override in overrides:
        _override(sections, override)
    _known(sections, names, str(path), "")
    for name, content in sections.items():
        if not isinstance(content, dict):
            raise CourseError(f"{path}: {name} is {content!r}; it must hold keys, each with a value.")
    return sections


def from_mapping(cls: type[C], values: Mapping[str, Any], where: str, prefix: str = "") -> C:
    """An instance of a configuration dataclass from plain values (lists become tuples, "1e-3" a number).

    Raises:
        CourseError: unknown or missing key, wrong type, out of range.
    """
    hints = get_type_hints(cls)
    _known(values, tuple(hints), where, prefix)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise CourseError(f"{where}: {prefix}{missing[0]} is missing; it has no default.")
    converted = {key: _convert(value, hints[key], where, prefix + key) for key, value in values.items()}
    for f in fields:
        if f.name in converted:
            _check_field(f, converted[f.name], hints[f.name], where, prefix)
    try:
        return cls(**converted)
    except CourseError as error:
        raise CourseError(f"{where}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CourseError(
            f"Cannot read {path}: {error.strerror}; name a file of configs/training."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise CourseError(f"{path} is not valid YAML{line}; see configs/training for examples.") from error
    if not isinstance(content, dict):
        raise CourseError(f"{path} holds no sections; it needs data, model and training.")
    return content


def _override(sections: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise CourseError(
            f"--set {override!r} is not of the form section.key=value, such as training.steps=100."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CourseError(f"--set {override!r}: the value is not valid YAML.") from error
    content = sections.setdefault(section, {})
    if isinstance(content, dict):
        content[name] = value


def _model_choices(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    from shared.models.gpt import PRESETS, GPTConfig

    hints = get_type_hints(GPTConfig)
    _known(values, ("preset", *hints), str(path), "model.")
    if "vocab_size" in values:
        raise CourseError(f"{path}: model.vocab_size is decided by the tokenizer; set data.vocab_size.")
    preset = values.get("preset")
    if preset is not None and preset not in PRESETS:
        raise CourseError(f"{path}: model.preset is {preset!r}; choose one of {', '.join(PRESETS)}.")
    rest = {key: value for key, value in values.items() if key != "preset"}
    converted = {key: _convert(value, hints[key], str(path), f"model.{key}") for key, value in rest.items()}
    for key, value in converted.items():
        _check_type(value, hints[key], str(path), f"model.{key}")
    return converted | ({"preset": preset} if preset else {})


def _known(values: Mapping[str, Any], names: Sequence[str], where: str, prefix: str) -> None:
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}."
            raise CourseError(f"{where}: unknown key {prefix}{key}; {advice}")


def _convert(value: Any, hint: Any, where: str, name: str) -> Any:
    """YAML's value as the field's type: 1e-3 (a string to YAML 1.1) and 3 as float, lists as tuples."""
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    if get_origin(hint) is tuple and isinstance(value, list):
        inner = get_args(hint)[0]
        if dataclasses.is_dataclass(inner):
            return tuple(
                from_mapping(inner, item, where, f"{name}[{i}].") if isinstance(item, dict) else item
                for i, item in enumerate(value)
            )
        return tuple(_convert(item, inner, where, name) for item in value)
    return value


def _check(config: Any, where: str) -> None:
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        _check_field(f, getattr(config, f.name), hints[f.name], where, "")


def _check_field(f: dataclasses.Field, value: Any, hint: Any, where: str, prefix: str) -> None:
    name = prefix + f.name
    _check_type(value, hint, where, name)
    least, most, choices = (f.metadata.get(key) for key in ("least", "most", "choices"))
    if choices and value not in choices:
        raise CourseError(f"{where}: {name} is {value!r}; choose one of {', '.join(choices)}.")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        # Written so that NaN, which compares false with everything, is out of range too.
        if not ((least is None or number >= least) and (most is None or number <= most)):
            raise CourseError(f"{where}: {name} is {value}; it must be {_range(least, most)}.")


def _range(least: float | None, most: float | None) -> str:
    return f"at least {least}" if most is None else f"from {least} to {most}"


def _check_type(value: Any, hint: Any, where: str, name: str) -> None:
    if not _is_a(value, hint):
        raise CourseError(f"{where}: {name} is {value!r}; it must be {_type_name(hint)}.")


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_a(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        right_length = inner[-1] is Ellipsis or (isinstance(value, tuple) and len(value) == len(inner))
        return isinstance(value, tuple) and right_length and all(_is_a(item, inner[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        count = "a list of" if inner[-1] is Ellipsis else f"{len(inner)} values, each"
        return f"{count} {_type_name(inner[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
