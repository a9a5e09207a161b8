"""GPT-2's layout in `transformers`, and the course's GPT in it.

A GPT with GPT-2's choices (Radford et al. 2019, §2.3) is the same function as a `GPT2LMHeadModel`. The names
differ, and its linear layers ("Conv1D") keep the weight transposed: (in, out).
"""

from typing import Any

from torch import Tensor

from shared.models.gpt import GPT, GPTConfig
from shared.runtime.errors import CourseError

ARCHITECTURE = "GPT2LMHeadModel"
OUTSIDE = {"token_embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"}
BLOCK = {
    "norms.0": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norms.1": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
# What GPT-2's architecture leaves no choice about.
CHOICES = {
    "norm": "layernorm",
    "position": "learned",
    "qk_norm": False,
    "bias": True,
    "window": None,
    "bigram_embedding": False,
}


def _misfits(config: GPTConfig) -> list[str]:
    names = [name for name, value in CHOICES.items() if getattr(config, name) != value]
    if config.activation not in ACTIVATIONS:
        names.append("activation")
    if config.kv_heads != config.num_heads:
        names.append("num_kv_heads")
    return names


def fits(config: object) -> bool:
    """Whether `transformers`' GPT-2 class can express this architecture."""
    return isinstance(config, GPTConfig) and not _misfits(config)


def settings(config: GPTConfig) -> dict[str, Any]:
    """The settings of `transformers`' GPT2Config for this architecture.

    Raises:
        CourseError: a choice is not GPT-2's.
    """
    if names := _misfits(config):
        raise CourseError(
            f"transformers' GPT-2 has no such {', '.join(names)}; only GPT-2's own choices convert."
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": ACTIVATIONS[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def config_from(values: dict[str, Any]) -> GPTConfig:
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
    activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
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
        raise CourseError(f"The GPT-2 settings lack {error.args[0]!r}.") from error


def build(config: GPTConfig) -> GPT:
    """A GPT with random weights."""
    return GPT(config)


def _their_name(name: str) -> tuple[str, bool]:
    """GPT-2's name of one of our parameters, and whether it is kept transposed."""
    module, _, kind = name.rpartition(".")
    if module == "head":
        return "lm_head.weight", False
    if module in OUTSIDE:
        return f"transformer.{OUTSIDE[module]}.{kind}", False
    _, index, part = module.split(".", 2)
    linear = not part.startswith("norms")
    return f"transformer.h.{index}.{BLOCK[part]}.{kind}", linear and kind == "weight"


def to_state(model: GPT) -> dict[str, Tensor]:
    """The weights under GPT-2's names and in its layout, as views; a tied head is the embedding only."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and model.config.tie_embeddings:
            continue
        theirs, transposed = _their_name(name)
        state[theirs] = tensor.T if transposed else tensor
    return state


def from_state(model: GPT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in GPT-2's layout under our names; those that are not ours are kept, to be complained about.

    OpenAI's own file has no "transformer." before its names, and keeps the causal masks as if they were
    weights.
    """
    state = {
        n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}": t
        for n, t in state.items()
        if not n.endswith((".attn.bias", ".attn.masked_bias"))
    }
    if model.config.tie_embeddings and "transformer.wte.weight" in state:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    ours = {}
    for name in model.state_dict():
        theirs, transposed = _their_name(name)
        if theirs in state:
            tensor = state.pop(theirs)
            ours[name] = tensor.T if transposed else tensor
    return ours | state
