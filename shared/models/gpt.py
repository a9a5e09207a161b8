"""GPT: a decoder-only Transformer whose choices are all explicit.

With the defaults it is GPT-2 (Radford et al. 2019, §2.3); other values of `GPTConfig` give the models that
came later, from the same class.

Legend: B batch, T time, C width of the model, L layers, H heads, D width of a head, V vocabulary.

Departures from GPT-2: dropout is off by default. Its position and token embeddings start from N(0, 0.02), as
in `transformers`; OpenAI's code draws the positions from N(0, 0.01).
"""

import math
from dataclasses import MISSING, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.models.attention import IMPLEMENTATIONS, MultiHeadAttention, attention_mask
from shared.models.losses import cross_entropy, linear_cross_entropy
from shared.models.positions import LearnedPositions, RotaryEmbedding, alibi_bias, alibi_slopes, sinusoidal
from shared.models.transformer_blocks import ACTIVATIONS, MLP, NORMS, Block, make_norm
from shared.runtime.errors import CourseError

POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")
BIGRAM_ROWS = 1 << 16  # tables of pairs grow as V²; larger ones are hashed into this many rows


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides a GPT's architecture and its initial weights.

    Attributes:
        vocab_size: V, tokens.
        context_length: the longest sequence, tokens.
        num_layers, num_heads, d_model: L, H, C.
        num_kv_heads: key/value heads, a divisor of H (grouped-query attention); None for H.
        d_ff: width of the MLP's hidden layer; None for 4·C.
        dropout: probability, on embeddings, attention weights and what each sublayer adds.
        norm: "layernorm" or "rmsnorm", before each sublayer and before the head.
        norm_eps: ε of the norms.
        norm_affine: RMSNorms have a trained weight.
        position: "learned", "sinusoidal" (of root mean square init_std), "rope", "alibi" or "none".
        activation: "gelu_tanh", "gelu", "relu", "relu2" or "swiglu".
        qk_norm: RMSNorm on each head's queries and keys.
        bias: bias vectors in linear layers and LayerNorms.
        tie_embeddings: the head is the token embedding, transposed (Press & Wolf 2017).
        window: a token sees this many tokens, itself included; None for all before it.
        zero_init: whatever adds to the residual stream starts at zero, and so does an untied head.
        bigram_embedding: add a vector for the pair (previous token, token); it starts at zero.
        rope_theta: θ of the rotary positions.
        init_std: standard deviation of the initial weights.
        attention: "auto", "sdpa", "plain" or "tiled"; see `shared.models.attention.attention`.
    """

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    d_model: int
    num_kv_heads: int | None = None
    d_ff: int | None = None
    dropout: float = 0.0
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_affine: bool = True
    position: str = "learned"
    activation: str = "gelu_tanh"
    qk_norm: bool = False
    bias: bool = True
    tie_embeddings: bool = True
    window: int | None = None
    zero_init: bool = False
    bigram_embedding: bool = False
    rope_theta: float = 10_000.0
    init_std: float = 0.02
    attention: str = "auto"

    def __post_init__(self):
        """Raises CourseError, naming key, value and what is allowed."""
        sizes = (
            "vocab_size",
            "context_length",
            "num_layers",
            "num_heads",
            "d_model",
            "num_kv_heads",
            "d_ff",
            "window",
        )
        for name in sizes:
            value = getattr(self, name)
            optional = name in ("num_kv_heads", "d_ff", "window")
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise CourseError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        choices = {
            "norm": NORMS,
            "position": POSITIONS,
            "activation": ACTIVATIONS,
            "attention": IMPLEMENTATIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise CourseError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        if not 0.0 <= self.dropout < 1.0:
            raise CourseError(f"dropout is {self.dropout!r}; it must be at least 0 and less than 1.")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise CourseError(f"{name} is {getattr(self, name)!r}; it must be a number above 0.")
        if self.d_model % self.num_heads or self.num_heads % self.kv_heads:
            raise CourseError(
                f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}, "
                f"and that of num_kv_heads {self.kv_heads}."
            )
        if (self.position == "rope" and self.head_dim % 2) or (
            self.position == "sinusoidal" and self.d_model % 2
        ):
            raise CourseError(f"position {self.position!r} needs an even width; d_model is {self.d_model}.")
        if self.attention == "tiled" and self.dropout:
            raise CourseError("attention 'tiled' has no dropout; set dropout to 0 or choose 'sdpa'.")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def hidden(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @classmethod
    def from_dict(cls, values: dict) -> "GPTConfig":
        """A configuration from a mapping.

        Raises:
            CourseError: a key is unknown or missing, or a value not allowed.
        """
        known = [field.name for field in fields(cls)]
        if unknown := set(values) - set(known):
            raise CourseError(f"Unknown model setting {min(unknown)!r}; choose from {', '.join(known)}.")
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]:
            raise CourseError(f"The model settings lack {', '.join(missing)}; add them.")
        return cls(**values)


def _gpt2(num_layers: int, num_heads: int, d_model: int) -> GPTConfig:
    return GPTConfig(50_257, 1024, num_layers, num_heads, d_model)


# Radford et al. 2019, table 2 (the sizes); the paper counts 117M … 1542M parameters, the released weights
# have 124,439,808 … 1,557,611,200.
PRESETS: dict[str, GPTConfig] = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
}


class GPT(nn.Module):
    """Token ids in, logits of the next token out.

    Args:
        config: the architecture. The weights are drawn from PyTorch's generator; on the meta device
            (`with torch.device("meta")`) nothing is drawn and no memory used.

    Attributes:
        checkpointing: in training, keep only what enters each block and compute the rest again in backward
            (Chen et al. 2016): memory for activations falls to about a block's, arithmetic grows by a third.
            Losses and gradients are the same to the bit.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.position_embedding = LearnedPositions(config.context_length, config.d_model)
        elif config.position == "sinusoidal":
            # Of amplitude 1 they would drown the tokens, whose embeddings start at init_std. The paper makes
            # those larger (§3.4); here the head may share them, so the positions get their size instead.
            table = math.sqrt(2.0) * config.init_std * sinusoidal(config.context_length, config.d_model)
            self.register_buffer("position_table", table, persistent=False)
        elif config.position == "rope":
            self.rotary = RotaryEmbedding(config.head_dim, config.context_length, config.rope_theta)
        elif config.position == "alibi":
            self.register_buffer("slopes", alibi_slopes(config.num_heads), persistent=False)
        if config.bigram_embedding:
            self.bigram_rows = min(config.vocab_size**2, BIGRAM_ROWS)
            self.bigram_embedding = nn.Embedding(
                self.bigram_rows + 1, config.d_model
            )  # last: no previous token
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self._initialise()

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        cache=None,
        left_padding: Tensor | None = None,
        last_only: bool = False,
        loss_only: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits for each position, and the loss if there are targets.

        Args:
            ids: (B, T) int64 token ids; with a cache, only those that are not in it yet.
            targets: (B, T) int64, what follows each position; −100 is left out of the loss.
            cache: keys and values of earlier positions, see `shared.inference.kv_cache`; it is extended by T.
            left_padding: (B,) int64, how many tokens at the start of each row (cache included) are padding.
                Positions count from the first real token, and nothing looks at padding. None for no padding.
            last_only: logits of the last position only, (B, 1, V): all that generation needs.
            loss_only: return None for the logits, which then are never held all at once (large V).

        Returns:
            logits (B, T, V), in the dtype of the head's matmul; loss, the mean over the targets in nats a
            token, float32 scalar, or None.

        Raises:
            CourseError: more positions than the context holds.
        """
        x = self._trunk(ids, cache, left_padding)  # (B, T, C)
        if last_only:
            x = x[:, -1:]
        if loss_only:
            return None, linear_cross_entropy(x, self.head.weight, targets)
        logits = self.head(x)  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def _trunk(self, ids: Tensor, cache, left_padding: Tensor | None) -> Tensor:
        """Everything but the head: (B, T) -> (B, T, C)."""
        config, T = self.config, ids.shape[1]
        start = 0 if cache is None else cache.length
        if start + T > config.context_length:
            raise CourseError(
                f"{start + T} tokens do not fit in the model's context of {config.context_length}; "
                "shorten the text."
            )
        positions = slice(start, start + T)
        if left_padding is not None:
            positions = torch.arange(start, start + T, device=ids.device) - left_padding[:, None]  # (B, T)
        x = self._embed(ids, positions, cache)
        attend = self._attend(positions, start, T, left_padding)
        recompute = self.checkpointing and self.training and cache is None
        for layer, block in enumerate(self.blocks):
            if recompute:
                x = checkpoint(block, x, use_reentrant=False, **attend)
            else:
                x = block(x, cache=cache, layer=layer, **attend)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def _embed(self, ids: Tensor, positions: Tensor | slice, cache) -> Tensor:
        """Token, position and pair embeddings, added up: (B, T, C)."""
        x = self.token_embedding(ids)
        known = positions if isinstance(positions, slice) else positions.clamp(min=0)
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[known]
        elif self.config.position == "sinusoidal":
            x = x + self.position_table[known]
        if self.config.bigram_embedding:
            x = x + self.bigram_embedding(self._pairs(ids, positions, cache))
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _pairs(self, ids: Tensor, positions: Tensor | slice, cache) -> Tensor:
        """The row of each (previous token, token) in the bigram table: (B, T)."""
        V, rows = self.config.vocab_size, self.bigram_rows
        first = ids.new_zeros(ids.shape[0], 1) if cache is None or not cache.length else cache.last_token
        pairs = torch.cat((first, ids[:, :-1]), dim=1) * V + ids  # (B, T), exact
        if rows < V * V:
            pairs = (pairs * 2_654_435_761 >> 16) % rows  # Knuth's multiplicative hash
        if isinstance(positions, Tensor):
            pairs = pairs.masked_fill(positions <= 0, rows)
        elif positions.start == 0:
            pairs[:, 0] = rows
        if cache is not None:
            cache.last_token = ids[:, -1:]
        return pairs

    def _attend(self, positions: Tensor | slice, start: int, T: int, left_padding: Tensor | None) -> dict:
        """What every layer's attention is told, worked out once."""
        config, Tk = self.config, start + T
        attend = {"causal": True, "window": config.window}
        if config.position == "rope":
            known = positions if isinstance(positions, slice) else positions.clamp(min=0)
            attend["rotary"] = self.rotary(known)
        elif config.position == "alibi":
            attend["bias"] = alibi_bias(self.slopes, Tk)
        if left_padding is not None:
            real = torch.arange(Tk, device=left_padding.device) >= left_padding[:, None]  # (B, Tk)
            attend["mask"] = real[:, None, None, :]
        tiled = config.attention == "tiled"
        if T > 1 and not tiled and (config.window is not None or start or "mask" in attend):
            seen = attention_mask(
                T, Tk, causal=True, window=config.window, device=self.token_embedding.weight.device
            )
            attend |= {"causal": False, "window": None, "mask": seen & attend.get("mask", seen)}
        return attend

    def _initialise(self) -> None:
        """N(0, init_std); what adds to the residual stream gets 1/√(2L) of that (GPT-2, §2.3)."""
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for projection in (block.attention.out, block.mlp.down):
                std = 0.0 if config.zero_init else config.init_std / math.sqrt(2 * config.num_layers)
                nn.init.normal_(projection.weight, std=std)
        if config.bigram_embedding:
            nn.init.zeros_(self.bigram_embedding.weight)
        if config.zero_init and not config.tie_embeddings:
            nn.init.zeros_(self.head.weight)

    def num_parameters(self, embeddings: bool = True) -> int:
        """Trained numbers, shared ones counted once; without `embeddings`, only those of matmuls and norms.

        A tied head counts as embedding, an untied one does not.
        """
        total = sum(p.numel() for p in self.parameters())
        if embeddings:
            return total
        return total - sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations to train on one token of a sequence of T, forward and backward.

        6 for each weight of a matmul, head included, and 12·C·min(T, window) a layer for attention's two
        matmuls (Chowdhery et al. 2022, appendix B; like them, the half that a causal mask hides is counted).
        """
        config = self.config
        matmuls = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matmuls + 12 * config.num_layers * config.d_model * min(T, config.window or T)


def _norm(config: GPTConfig) -> nn.Module:
    return make_norm(
        config.norm, config.d_model, config.norm_eps, bias=config.bias, affine=config.norm_affine
    )


def _block(config: GPTConfig) -> Block:
    attention = MultiHeadAttention(
        config.d_model,
        config.num_heads,
        config.num_kv_heads,
        bias=config.bias,
        dropout=config.dropout,
        qk_norm=config.qk_norm,
        qk_norm_affine=config.norm_affine,
        norm_eps=config.norm_eps,
        implementation=config.attention,
    )
    mlp = MLP(config.d_model, config.hidden, config.activation, bias=config.bias, dropout=config.dropout)
    return Block(attention, mlp, [_norm(config), _norm(config)], dropout=config.dropout)
