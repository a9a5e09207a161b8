"""Llama's layout in `transformers`, and the course's GPT in it.

A GPT with rotary positions, RMSNorm, SwiGLU and no biases (Touvron et al. 2023, §2.2), grouped-query
attention or not, is the same function as a `LlamaForCausalLM`. The names differ, and there q, k and v are
three matrices, gate and up are two. Both turn dimension i of a head together with i + D/2, so no row has to
move.

`shared.models.qwen3` differs in QK-norm and windows only and takes the rest from here.
"""

from typing import Any

from torch import Tensor, cat

from shared.models.gpt import GPT, GPTConfig
from shared.runtime.errors import CourseError

ARCHITECTURE = "LlamaForCausalLM"
OUTSIDE = {
    "token_embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
# One of our parameters is one of theirs, or several under each other.
BLOCK = {
    "norms.0.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.q_norm": ("self_attn.q_norm.weight",),
    "attention.k_norm": ("self_attn.k_norm.weight",),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "norms.1.weight": ("post_attention_layernorm.weight",),
    "mlp.up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}
# What the family leaves no choice about, and what Llama itself does not.
FAMILY = {
    "norm": "rmsnorm",
    "norm_affine": True,
    "position": "rope",
    "activation": "swiglu",
    "bias": False,
    "bigram_embedding": False,
}
CHOICES = FAMILY | {"qk_norm": False, "window": None}
# What `transformers` takes for a setting that a config.json does not mention.
DEFAULTS = {"max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None}


def fits(config: object) -> bool:
    """Whether `transformers`' Llama class can express this architecture."""
    return not misfits(config, CHOICES)


def settings(config: GPTConfig) -> dict[str, Any]:
    """The settings of `transformers`' LlamaConfig for this architecture.

    Raises:
        CourseError: a choice is not Llama's.
    """
    refuse_misfits(config, CHOICES, "Llama")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **family_settings(config),
        "mlp_bias": False,
    }


def config_from(values: dict[str, Any]) -> GPTConfig:
    """The architecture that a Llama `config.json` describes.

    Raises:
        CourseError: a setting is missing, or one that this GPT does not have is on.
    """
    return family_config(DEFAULTS | values, "Llama", qk_norm=False)


def misfits(config: object, choices: dict[str, Any]) -> list[str]:
    """The settings that are not as `choices` has them, each as "name = value"."""
    if not isinstance(config, GPTConfig):
        return [f"a {type(config).__name__}"]
    return [f"{n} = {getattr(config, n)!r}" for n, value in choices.items() if getattr(config, n) != value]


def refuse_misfits(config: GPTConfig, choices: dict[str, Any], family: str) -> None:
    """Raises CourseError if `transformers`' class of this family cannot express the architecture."""
    if wrong := misfits(config, choices):
        raise CourseError(
            f"transformers' {family} cannot express {', '.join(wrong)}; only its own choices convert."
        )


def family_settings(config: GPTConfig) -> dict[str, Any]:
    """What the config.json of a Llama and of a Qwen3 have in common.

    Dropout is the one thing in it that `transformers` does in part only: on attention weights, not on
    embeddings and residuals. "dropout" is the course's own key, which it keeps and does not use. Neither
    drops anything outside training.
    """
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # where transformers 4 and many other readers look for it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "dropout": config.dropout,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def family_config(
    values: dict[str, Any], family: str, *, qk_norm: bool, window: int | None = None
) -> GPTConfig:
    """The architecture that the config.json of a Llama or Qwen3 describes.

    Args:
        values: the settings, with the family's defaults for those that are not there.
        family: its name, for messages.
        qk_norm, window: see `GPTConfig`.

    Raises:
        CourseError: a setting is missing, or one that this GPT does not have is on.
    """
    dropout = values.get("dropout", 0.0)
    for name, usual in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("attention_dropout", dropout),
    ):
        if values.get(name, usual) not in (usual, None):
            raise CourseError(
                f"This {family} has {name} = {values[name]!r}, which the course's GPT cannot do."
            )
    try:
        width, heads = values["hidden_size"], values["num_attention_heads"]
        config = GPTConfig(
            vocab_size=values["vocab_size"],
            context_length=values["max_position_embeddings"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            d_model=width,
            num_kv_heads=values["num_key_value_heads"],
            d_ff=values["intermediate_size"],
            dropout=dropout,
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings", False),
            rope_theta=_rope_theta(values, family),
            init_std=values.get("initializer_range", 0.02),
            qk_norm=qk_norm,
            window=window,
            **FAMILY,
        )
    except KeyError as error:
        raise CourseError(f"The {family} settings lack {error.args[0]!r}.") from error
    if values["head_dim"] not in (config.head_dim, None):
        raise CourseError(
            f"This {family} has heads of width {values['head_dim']}, and in the course's GPT they have "
            f"hidden_size / num_attention_heads = {config.head_dim}."
        )
    return config


def _rope_theta(values: dict[str, Any], family: str) -> float:
    """θ of the rotary positions, which are refused if anything else about them is unusual.

    `transformers` 5 writes "rope_parameters"; before, "rope_theta" and "rope_scaling" stood for it.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CourseError(f"This {family} has the rope_parameters {rope!r}; they must be an object.")
    rope = {"rope_theta": values.get("rope_theta", 10_000.0)} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CourseError(
            f"This {family} has rotary positions of the type {kind!r}, and the course's GPT 'default' only."
        )
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if share not in (1.0, None):
        raise CourseError(f"This {family} turns {share!r} of each head, and the course's GPT all of it.")
    if unknown := sorted(rope.keys() - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}):
        raise CourseError(
            f"This {family} has rotary positions with {unknown[0]!r}, which the course's GPT cannot do."
        )
    return float(rope["rope_theta"])


def build(config: GPTConfig) -> GPT:
    """A GPT with random weights."""
    return GPT(config)


def _parts(model: GPT) -> dict[str, dict[str, int]]:
    """Our name of each parameter -> their names of its parts, in order, each with its number of rows."""
    config = model.config
    kv_rows = config.kv_heads * config.head_dim
    rows = {"attention.qkv.weight": (config.d_model, kv_rows, kv_rows), "mlp.up.weight": (config.hidden,) * 2}
    parts = {}
    for name, tensor in model.state_dict().items():
        if name in OUTSIDE:
            parts[name] = {OUTSIDE[name]: len(tensor)}
            continue
        _, index, part = name.split(".", 2)
        names = [f"model.layers.{index}.{theirs}" for theirs in BLOCK[part]]
        parts[name] = dict(zip(names, rows.get(part, (len(tensor),)), strict=True))
    return parts


def to_state(model: GPT) -> dict[str, Tensor]:
    """The weights under the library's names (views of ours); a tied head appears as the embedding only."""
    ours, state = model.state_dict(), {}
    for name, parts in _parts(model).items():
        state |= zip(parts, ours[name].split(list(parts.values())), strict=True)
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    return state


def from_state(model: GPT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the library's names as ours; those that are not ours are kept, to be complained about.

    The parts must have the shapes of `to_state(model)`; one whose other parts are missing is kept too.
    """
    state = {n: t for n, t in state.items() if not n.endswith(".rotary_emb.inv_freq")}  # Llama of 2023
    if model.config.tie_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    ours = {}
    for name, parts in _parts(model).items():
        if all(part in state for part in parts):
            tensors = [state.pop(part) for part in parts]
            ours[name] = tensors[0] if len(tensors) == 1 else cat(tensors)
    return ours | state
