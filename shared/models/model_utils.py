"""Models on disk and in `transformers`.

A saved model is a folder with `config.json`, `model.safetensors` and, if given, the tokenizer as
`tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained` reads. `LAYOUTS` lists the
architectures of `transformers` that the course's models can be: such a model is written so that its
`from_pretrained` reads it, and what it writes is read here. Any other model of the course has the model type
"course-gpt" or "course-transformer" and its own parameter names.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.models.gpt import GPT, GPTConfig
from shared.models.transformer import Transformer, TransformerConfig
from shared.runtime import files
from shared.runtime.errors import CourseError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"
WEIGHTS_INDEX, PICKLED_WEIGHTS = "model.safetensors.index.json", "pytorch_model.bin"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
# `transformers`' special tokens, and the names that the course's tokenizers have for them.
SPECIAL_TOKENS = {
    "bos_token": ("<bos>", END_OF_TEXT),
    "eos_token": ("<eos>", END_OF_TEXT),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]",),
}
COURSE_MODELS = {"course-gpt": (GPT, GPTConfig), "course-transformer": (Transformer, TransformerConfig)}


# The classes of `transformers` that the course's models can be -> their model type, which is also the name of
# the module of `shared.models` that knows the layout: fits(config), settings(config), config_from(settings),
# build(config), to_state(model), from_state(model, state). Of several that fit a model, the first is written.
LAYOUTS = {
    "GPT2LMHeadModel": "gpt2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "BertForMaskedLM": "bert",
    "BertForPreTraining": "bert",
    "BertForSequenceClassification": "bert",
}


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Numbers in the parameters, shared ones counted once; with `trainable`, those that get gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _layouts() -> Iterator[ModuleType]:
    return (import_module(f"shared.models.{name}") for name in dict.fromkeys(LAYOUTS.values()))


def _layout_of(model: nn.Module) -> ModuleType | None:
    """The module that knows how `transformers` writes this model; None if it has no such architecture."""
    return next((layout for layout in _layouts() if layout.fits(model.config)), None)


def to_hf(model: nn.Module) -> "PreTrainedModel":
    """The same model as a `transformers` class: equal outputs and gradients, its own copy of the weights.

    Raises:
        CourseError: no class in `LAYOUTS` has this model's choices.
    """
    import transformers

    layout = _layout_of(model)
    if layout is None:
        raise CourseError(
            f"This {type(model).__name__} has choices that no class of transformers has, of those that the "
            f"course knows: {', '.join(LAYOUTS)}."
        )
    settings = layout.settings(model.config)
    hf_class = getattr(transformers, settings["architectures"][0])
    weight = next(model.parameters())
    hf = hf_class(hf_class.config_class(**settings)).to(weight.device, weight.dtype)
    missing, unexpected = hf.load_state_dict(layout.to_state(model), strict=False)
    if unexpected or not set(missing) <= set(hf.all_tied_weights_keys):
        raise RuntimeError(
            f"{layout.__name__} leaves {missing} without weights and {unexpected} without a place"
        )
    return hf.train(model.training)


def from_hf(hf: "PreTrainedModel") -> nn.Module:
    """A `transformers` model as the course's: equal outputs and gradients, its own copy of the weights.

    Raises:
        CourseError: its class is not in `LAYOUTS`, or a setting is on that the course's model does not have.
    """
    layout = _layout_named(hf.config.model_type, type(hf).__name__)
    model = layout.build(layout.config_from({**hf.config.to_dict(), "architectures": [type(hf).__name__]}))
    _load(model.to(hf.device, hf.dtype), dict(hf.state_dict()), "the transformers model", layout)
    return model.train(hf.training)


gpt_to_hf, gpt_from_hf = to_hf, from_hf  # as week 2 calls them


def _layout_named(model_type: object, architecture: object) -> ModuleType:
    """The module for what a config.json says about itself; few leave the architecture out (None)."""
    if model_type not in LAYOUTS.values():
        known = ", ".join([*dict.fromkeys(LAYOUTS.values()), *COURSE_MODELS])
        raise CourseError(f"the model type {model_type!r} is none of {known}.")
    if architecture is not None and LAYOUTS.get(str(architecture)) != model_type:
        known = ", ".join(name for name, kind in LAYOUTS.items() if kind == model_type)
        raise CourseError(f"the architecture {architecture!r} is none of {known}.")
    return import_module(f"shared.models.{model_type}")


def save_model(
    model: nn.Module,
    directory: Path | str,
    tokenizer=None,
    *,
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> None:
    """Write `config.json`, `model.safetensors` and, if given, the tokenizer into `directory`, all or nothing.

    Args:
        model: a model of the course, on any device.
        directory: the folder to make.
        tokenizer: has `save(path)` and `special_tokens`.
        dtype: of the weights in the file: bfloat16 takes half the space of float32, and rounds them to 8
            binary digits. None for the model's own.
        replace: put it in the place of an existing folder.

    Raises:
        CourseError: the folder exists and is not to be replaced, or cannot be written; or a weight is too
            large for the dtype.
    """
    from safetensors.torch import save_file

    dtype = dtype or next(model.parameters()).dtype
    settings, state = _settings_and_state(model, dtype)
    tensors = {name: _as_stored(name, tensor, dtype) for name, tensor in state.items()}
    if tokenizer is not None:
        for role, name in _special_tokens(tokenizer).items():
            if role in ("bos_token", "eos_token") and f"{role}_id" in settings:
                settings[f"{role}_id"] = tokenizer.special_tokens[name]
    with files.atomic_directory(directory, replace=replace) as folder:
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read it
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)
            text = json.dumps(_tokenizer_config(model, tokenizer), indent=2) + "\n"
            (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def _as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.detach().to("cpu", dtype).contiguous()
    if stored.dtype != tensor.dtype and stored.isinf().any() and not tensor.isinf().any():
        raise CourseError(f"{name} holds numbers too large for {_name(dtype)}; save it as float32.")
    return stored


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _special_tokens(tokenizer) -> dict[str, str]:
    """Which of `transformers`' roles the tokenizer has a token for, and its name."""
    named = {
        role: next((name for name in names if name in tokenizer.special_tokens), None)
        for role, names in SPECIAL_TOKENS.items()
    }
    return {role: name for role, name in named.items() if name}


def _tokenizer_config(model: nn.Module, tokenizer) -> dict[str, Any]:
    """What `AutoTokenizer` has to know: to take `tokenizer.json` as it is.

    Told nothing, it goes by the model type and cuts every text into GPT-2's words, even for characters.
    """
    config = model.config
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_length if isinstance(model, Transformer) else config.context_length,
        "clean_up_tokenization_spaces": False,
        **_special_tokens(tokenizer),
    }


def _settings_and_state(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layout = _layout_of(model)
    if layout is not None:
        return {**layout.settings(model.config), "dtype": _name(dtype)}, layout.to_state(model)
    kind = next((name for name, (cls, _) in COURSE_MODELS.items() if isinstance(model, cls)), None)
    if kind is None:
        raise TypeError(f"{type(model).__name__} is not a model of the course")
    state = dict(model.state_dict())
    if getattr(model.config, "tie_embeddings", False):
        del state["head.weight"]
    return {"model_type": kind, **asdict(model.config)}, state


def load_model(directory: Path | str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Read what `save_model` wrote, or any model of `LAYOUTS`; on the CPU, in evaluation mode.

    Args:
        directory: the folder, with the weights in one file or in shards.
        dtype: of the model's weights, whatever they are in the file.

    Raises:
        CourseError: a file is missing, truncated or unreadable, or weights and configuration do not fit
            together.
    """
    directory = Path(directory)
    settings = _read_config(directory / CONFIG)
    try:
        model, layout = _new_model(settings)
    except (TypeError, ValueError) as error:
        reason = error if isinstance(error, CourseError) else "a setting has the wrong type."
        raise CourseError(f"{directory / CONFIG} cannot be used: {reason}") from error
    _load(model, _read_weights(directory), directory, layout)
    return model.to(dtype).eval()


def _new_model(settings: dict[str, Any]) -> tuple[nn.Module, ModuleType | None]:
    """A model with random weights as a config.json describes it, and its layout; None for our own."""
    kind = settings.get("model_type")
    if str(kind) in COURSE_MODELS:
        model_class, config_class = COURSE_MODELS[kind]
        return model_class(_config(config_class, settings)), None
    names = settings.get("architectures") or [None]
    layout = _layout_named(kind, names[0] if isinstance(names, list) else names)
    if settings.get("quantization_config"):
        raise CourseError("its weights are quantised, and the course reads whole ones only.")
    return layout.build(layout.config_from(settings)), layout


def _config(config_class: type, settings: dict[str, Any]):
    known = {field.name for field in fields(config_class)}
    if unknown := sorted(settings.keys() - known - {"model_type"}):
        raise CourseError(f"unknown setting {unknown[0]!r}.")
    try:
        return config_class(**{name: value for name, value in settings.items() if name in known})
    except TypeError as error:
        raise CourseError("a setting is missing or has the wrong type.") from error


def _read_config(path: Path) -> dict[str, Any]:
    settings = _read_json(path)
    if not isinstance(settings, dict):
        raise CourseError(f"{path} does not hold a model's settings; save the model again.")
    return settings


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CourseError(f"There is no {path}; give the folder of a saved model.") from error
    except (OSError, ValueError) as error:
        raise CourseError(f"{path} is damaged or not JSON; save the model again.") from error


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """All weights of a saved model: of one file, or of those that an index lists (large models)."""
    path, index = directory / WEIGHTS, directory / WEIGHTS_INDEX
    if path.exists() or not index.exists():
        if not path.exists() and (directory / PICKLED_WEIGHTS).exists():
            raise CourseError(
                f"{directory / PICKLED_WEIGHTS} is a pickle, which could run any program when it is loaded; "
                f"have transformers save the model as {WEIGHTS}."
            )
        return _read_file(path)
    values = _read_json(index)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not all(_is_file_name(name) for name in places.values()):
        raise CourseError(f"{index} does not say in which file each weight is; copy the model again.")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        state |= _read_file(directory / name)
    return state


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CourseError(f"There is no {path}; give the folder of a saved model.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CourseError(f"{path} is truncated or damaged; copy or save the model again.") from error


def _load(model: nn.Module, state: dict[str, Tensor], source: Path | str, layout: ModuleType | None) -> None:
    """Copy weights, under the layout's names or ours, into the model after checking every name and shape."""
    theirs = {} if layout is None else layout.to_state(model)
    _check_shapes(theirs, state, source)
    ours = _untied(model, state) if layout is None else layout.from_state(model, state)
    expected = model.state_dict()
    if missing := sorted(expected.keys() - ours.keys()):
        if theirs.keys() & state.keys():  # then say it in the names of the file
            missing = sorted(theirs.keys() - state.keys()) or missing
        raise CourseError(
            f"The weights in {source} lack {missing[0]} ({len(missing)} missing); save the model again."
        )
    if extra := sorted(ours.keys() - expected.keys()):
        raise CourseError(
            f"The weights in {source} hold {extra[0]}, which the configuration has no place for."
        )
    _check_shapes(expected, ours, source)
    with torch.no_grad():
        model.load_state_dict(ours)


def _untied(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file in our own layout, where a tied head appears as the embedding only."""
    if getattr(model.config, "tie_embeddings", False) and "token_embedding.weight" in state:
        return {**state, "head.weight": state["token_embedding.weight"]}
    return state


def _check_shapes(expected: dict[str, Tensor], state: dict[str, Tensor], source: Path | str) -> None:
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            raise CourseError(
                f"In {source} {name} has the shape {tuple(state[name].shape)} and the configuration says "
                f"{tuple(tensor.shape)}; weights and configuration are of different models."
            )
