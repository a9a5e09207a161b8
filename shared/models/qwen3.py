"""Qwen3's layout in `transformers`, and the course's GPT in it: that of the course's own base model.

Qwen3 (Yang et al. 2025, §2) is Llama with an RMSNorm on each head of queries and keys, before they turn, and
windows if asked for. A GPT with these choices is the same function as a `Qwen3ForCausalLM`.
"""

from typing import Any

from shared.models import llama
from shared.models.gpt import GPTConfig
from shared.models.llama import build, from_state, to_state
from shared.runtime.errors import CourseError

__all__ = ["ARCHITECTURE", "build", "config_from", "fits", "from_state", "settings", "to_state"]

ARCHITECTURE = "Qwen3ForCausalLM"
CHOICES = llama.FAMILY | {"qk_norm": True}
# What `transformers` takes for a setting that a config.json does not mention.
DEFAULTS = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def fits(config: object) -> bool:
    """Whether `transformers`' Qwen3 class can express this architecture."""
    return not llama.misfits(config, CHOICES)


def settings(config: GPTConfig) -> dict[str, Any]:
    """The settings of `transformers`' Qwen3Config for this architecture.

    Raises:
        CourseError: a choice is not Qwen3's.
    """
    llama.refuse_misfits(config, CHOICES, "Qwen3")
    windowed = config.window is not None
    kind = "sliding_attention" if windowed else "full_attention"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        **llama.family_settings(config),
        "use_sliding_window": windowed,
        "sliding_window": config.window,
        "max_window_layers": 0 if windowed else config.num_layers,  # the layers before the first window
        "layer_types": [kind] * config.num_layers,
    }


def config_from(values: dict[str, Any]) -> GPTConfig:
    """The architecture that a Qwen3 `config.json` describes.

    Raises:
        CourseError: a setting is missing, or one that this GPT does not have is on.
    """
    values = DEFAULTS | values
    return llama.family_config(values, "Qwen3", qk_norm=True, window=_window(values))


def _window(values: dict[str, Any]) -> int | None:
    """The window that all layers have, or None if none has one."""
    if not values.get("use_sliding_window", False) or values["sliding_window"] is None:
        return None
    layers = values.get("num_hidden_layers", 0)
    first = values["max_window_layers"]
    kinds = values.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    kinds = set(kinds[:layers])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise CourseError("This Qwen3 has a window in some layers only, and the course's GPT in all or none.")
    return values["sliding_window"]
