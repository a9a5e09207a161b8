"""Models on disk and in other libraries: `transformers`' GPT-2 layout where the choices are GPT-2's.

A saved model is a folder with `config.json`, `model.safetensors` and, if given, the tokenizer as
`tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained` reads. A GPT with GPT-2's
choices is written so that `AutoModelForCausalLM.from_pretrained` reads it; any other model of the course has
the model type "course-gpt" or "course-transformer" and its own parameter names.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.models.gpt import GPT, GPTConfig
from shared.models.transformer import Transformer, TransformerConfig
from shared.runtime import files
from shared.runtime.errors import CourseError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
# `transformers`' special tokens, and the names that the course's tokenizers have for them.
SPECIAL_TOKENS = {
    "bos_token": ("<bos>", END_OF_TEXT),
    "eos_token": ("<eos>", END_OF_TEXT),
    "pad_token": ("<pad>",),
    "unk_token": ("<unk>",),
}
COURSE_MODELS = {"course-gpt": (GPT, GPTConfig), "course-transformer": (Transformer, TransformerConfig)}

# Our names and GPT-2's. Its linear layers ("Conv1D") keep the weight transposed: (in, out).
GPT2_OUTSIDE = {"token_embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"}
GPT2_BLOCK = {
    "norms.0": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norms.1": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
# What GPT-2's architecture leaves no choice about.
GPT2_CHOICES = {
    "norm": "layernorm",
    "position": "learned",
    "qk_norm": False,
    "bias": True,
    "window": None,
    "bigram_embedding": False,
}


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Numbers in the parameters, shared ones counted once; with `trainable`, those that get gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def is_gpt2(config: GPTConfig) -> bool:
    """Whether `transformers`' GPT-2 class can express this architecture."""
    return (
        all(getattr(config, name) == value for name, value in GPT2_CHOICES.items())
        and config.activation in GPT2_ACTIVATIONS
        and config.kv_heads == config.num_heads
    )


def gpt2_config(config: GPTConfig) -> dict[str, Any]:
    """The settings of `transformers`' GPT2Config for this architecture.

    Raises:
        CourseError: a choice is not GPT-2's.
    """
    if not is_gpt2(config):
        names = ", ".join(n for n, value in GPT2_CHOICES.items() if getattr(config, n) != value)
        reason = names or ("activation" if config.activation not in GPT2_ACTIVATIONS else "num_kv_heads")
        raise CourseError(f"transformers' GPT-2 has no such {reason}; only GPT-2's own choices convert.")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": GPT2_ACTIVATIONS[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def gpt_config_from_gpt2(values: dict[str, Any]) -> GPTConfig:
    """The architecture that a GPT-2 `config.json` describes.

    Raises:
        CourseError: a setting is missing, or one that this GPT does not have is on.
    """
    for name, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if values.get(name, usual) != usual:
            raise CourseError(f"This GPT-2 has {name} = {values[name]}, which the course's GPT cannot do.")
    activations = {theirs: ours for ours, theirs in GPT2_ACTIVATIONS.items()} | {
        "gelu_pytorch_tanh": "gelu_tanh"
    }
    activation = values.get("activation_function", "gelu_new")
    if activation not in activations:
        raise CourseError(
            f"This GPT-2 has the activation {activation!r}; known are {', '.join(activations)}."
        )
    try:
        return GPTConfig(
            vocab_size=values["vocab_size"],
            context_length=values["n_positions"],
            num_layers=values["n_layer"],
            num_heads=values["n_head"],
            d_model=values["n_embd"],
            d_ff=values.get("n_inner"),
            dropout=float(values.get("resid_pdrop", 0.1)),
            norm_eps=values.get("layer_norm_epsilon", 1e-5),
            activation=activations[activation],
            tie_embeddings=values.get("tie_word_embeddings", True),
            init_std=values.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise CourseError(
            f"The GPT-2 settings lack {error.args[0]!r}; the {CONFIG} is not complete."
        ) from error


def _gpt2_name(name: str) -> tuple[str, bool]:
    """GPT-2's name of one of our parameters, and whether it is kept transposed."""
    module, _, kind = name.rpartition(".")
    if module == "head":
        return "lm_head.weight", False
    if module in GPT2_OUTSIDE:
        return f"transformer.{GPT2_OUTSIDE[module]}.{kind}", False
    _, index, part = module.split(".", 2)
    linear = not part.startswith("norms")
    return f"transformer.h.{index}.{GPT2_BLOCK[part]}.{kind}", linear and kind == "weight"


def gpt2_state_dict(model: GPT) -> dict[str, Tensor]:
    """The weights under GPT-2's names and in its layout; a tied head appears as the embedding only."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and model.config.tie_embeddings:
            continue
        theirs, transposed = _gpt2_name(name)
        state[theirs] = tensor.T if transposed else tensor
    return state


def _from_gpt2_state(model: GPT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in GPT-2's layout under our names; those that are not ours are kept, to be complained about."""
    state = {
        n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}": t for n, t in state.items()
    }
    state = {
        n: t for n, t in state.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))
    }  # causal masks
    if model.config.tie_embeddings and "transformer.wte.weight" in state:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    ours = {}
    for name in model.state_dict():
        theirs, transposed = _gpt2_name(name)
        if theirs in state:
            tensor = state.pop(theirs)
            ours[name] = tensor.T if transposed else tensor
    return ours | state


def gpt_to_hf(model: GPT) -> "GPT2LMHeadModel":
    """The same model as a `transformers` class: equal logits and gradients, its own copy of the weights.

    Raises:
        CourseError: a choice is not GPT-2's.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = gpt2_config(model.config)
    weight = model.token_embedding.weight
    hf = GPT2LMHeadModel(GPT2Config(**settings)).to(weight.device, weight.dtype)
    state = gpt2_state_dict(model)
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    hf.load_state_dict(state)
    return hf.train(model.training)


def gpt_from_hf(hf: "GPT2LMHeadModel") -> GPT:
    """A `transformers` GPT-2 as the course's GPT: equal logits and gradients, its own copy of the weights.

    Raises:
        CourseError: a setting is on that the course's GPT does not have.
    """
    model = GPT(gpt_config_from_gpt2(hf.config.to_dict())).to(hf.device, hf.dtype)
    _load(model, _from_gpt2_state(model, dict(hf.state_dict())), "the transformers model")
    return model.train(hf.training)


def save_model(
    model: GPT | Transformer, directory: Path | str, tokenizer=None, *, replace: bool = False
) -> None:
    """Write `config.json`, `model.safetensors` and, if given, the tokenizer into `directory`, all or nothing.

    Args:
        model: a GPT or an encoder–decoder Transformer, on any device.
        directory: the folder to make.
        tokenizer: has `save(path)` and `special_tokens`.
        replace: put it in the place of an existing folder.

    Raises:
        CourseError: the folder exists and is not to be replaced, or cannot be written.
    """
    from safetensors.torch import save_file

    settings, state = _settings_and_state(model)
    if tokenizer is not None and settings["model_type"] == "gpt2":
        settings["bos_token_id"] = settings["eos_token_id"] = tokenizer.special_tokens.get(END_OF_TEXT)
    with files.atomic_directory(directory, replace=replace) as folder:
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)
            text = json.dumps(_tokenizer_config(model, tokenizer), indent=2) + "\n"
            (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def _tokenizer_config(model: GPT | Transformer, tokenizer) -> dict[str, Any]:
    """What `AutoTokenizer` has to know: to take `tokenizer.json` as it is.

    Told nothing, it goes by the model type and cuts every text into GPT-2's words, even for characters.
    """
    longest = model.config.context_length if isinstance(model, GPT) else model.config.max_length
    named = {
        role: next((name for name in names if name in tokenizer.special_tokens), None)
        for role, names in SPECIAL_TOKENS.items()
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        **{role: name for role, name in named.items() if name},
    }


def _settings_and_state(model: GPT | Transformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if isinstance(model, GPT) and is_gpt2(model.config):
        return gpt2_config(model.config), gpt2_state_dict(model)
    kind = next(name for name, (cls, _) in COURSE_MODELS.items() if isinstance(model, cls))
    state = dict(model.state_dict())
    if getattr(model.config, "tie_embeddings", False):
        del state["head.weight"]
    return {"model_type": kind, **asdict(model.config)}, state


def load_model(directory: Path | str) -> GPT | Transformer:
    """Read what `save_model` wrote, or any GPT-2 in `transformers`' layout; on the CPU, in evaluation mode.

    Raises:
        CourseError: a file is missing, truncated or unreadable, or weights and configuration do not fit
            together.
    """
    directory = Path(directory)
    settings = _read_config(directory / CONFIG)
    kind = settings.pop("model_type", None)
    try:
        if kind == "gpt2":
            model = GPT(gpt_config_from_gpt2(settings))
        elif str(kind) in COURSE_MODELS:
            model_class, config_class = COURSE_MODELS[kind]
            model = model_class(_config(config_class, settings))
        else:
            raise CourseError(f"the model type {kind!r} is none of gpt2, {', '.join(COURSE_MODELS)}.")
    except (TypeError, ValueError) as error:
        reason = error if isinstance(error, CourseError) else "a setting has the wrong type."
        raise CourseError(f"{directory / CONFIG} cannot be used: {reason}") from error
    state = _read_weights(directory / WEIGHTS)
    if kind == "gpt2":
        state = _from_gpt2_state(model, state)
    elif settings.get("tie_embeddings") and "token_embedding.weight" in state:
        state["head.weight"] = state["token_embedding.weight"]
    _load(model, state, directory)
    return model.eval()


def _config(config_class: type, settings: dict[str, Any]):
    known = {field.name for field in fields(config_class)}
    if unknown := sorted(set(settings) - known):
        raise CourseError(f"unknown setting {unknown[0]!r}.")
    try:
        return config_class(**settings)
    except TypeError as error:
        raise CourseError("a setting is missing or has the wrong type.") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CourseError(f"There is no {path}; give the folder of a saved model.") from error
    except (OSError, ValueError) as error:
        raise CourseError(f"{path} is damaged or not JSON; save the model again.") from error
    if not isinstance(settings, dict):
        raise CourseError(f"{path} does not hold a model's settings; save the model again.")
    return settings


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CourseError(f"There is no {path}; give the folder of a saved model.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CourseError(f"{path} is truncated or damaged; copy or save the model again.") from error


def _load(model: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """Copy `state` into the model after checking every name and shape."""
    expected = model.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise CourseError(
            f"The weights in {source} lack {missing[0]} ({len(missing)} missing); save the model again."
        )
    if extra := sorted(state.keys() - expected.keys()):
        raise CourseError(
            f"The weights in {source} hold {extra[0]}, which the configuration has no place for."
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise CourseError(
                f"In {source} {name} has the shape {tuple(state[name].shape)} and the configuration says "
                f"{tuple(tensor.shape)}; weights and configuration are of different models."
            )
    with torch.no_grad():
        model.load_state_dict(state)
