"""The encoder–decoder Transformer of *Attention Is All You Need* (Vaswani et al. 2017).

Legend: B batch, S source length, T target length, C width of the model, H heads, D width of a head, V
vocabulary.

Departures: weights start from Xavier's uniform distribution, which the paper does not state; with
`pre_norm=True` the norms stand before the sublayers (Xiong et al. 2020) and one more closes each stack.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.attention import IMPLEMENTATIONS, MultiHeadAttention
from shared.models.positions import LearnedPositions, sinusoidal
from shared.models.transformer_blocks import MLP, Block, LayerNorm
from shared.runtime.errors import CourseError

POSITIONS = ("sinusoidal", "learned", "none")
KeysValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TransformerConfig:
    """The architecture; the defaults are the paper's base model (table 3).

    Attributes:
        vocab_size: V, shared by source and target.
        pad_id: the token that fills short sequences up; nothing looks at it.
        max_length: the longest source or target, tokens.
        num_layers: of the encoder, and of the decoder.
        num_heads, d_model, d_ff: H, C, and the width of the MLP's hidden layer.
        dropout: probability, on embeddings, attention weights and what each sublayer adds.
        position: "sinusoidal", "learned" or "none".
        pre_norm: norms before the sublayers instead of after them.
        norm_eps: ε of the norms.
        attention: see `shared.models.attention.attention`.
    """

    vocab_size: int
    pad_id: int = 0
    max_length: int = 512
    num_layers: int = 6
    num_heads: int = 8
    d_model: int = 512
    d_ff: int = 2048
    dropout: float = 0.1
    position: str = "sinusoidal"
    pre_norm: bool = False
    norm_eps: float = 1e-5
    attention: str = "auto"

    def __post_init__(self):
        """Raises CourseError, naming key, value and what is allowed."""
        for name in ("vocab_size", "max_length", "num_layers", "num_heads", "d_model", "d_ff"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise CourseError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.position not in POSITIONS:
            raise CourseError(f"position is {self.position!r}; choose one of {', '.join(POSITIONS)}.")
        if self.attention not in IMPLEMENTATIONS:
            raise CourseError(f"attention is {self.attention!r}; choose one of {', '.join(IMPLEMENTATIONS)}.")
        if self.d_model % self.num_heads or self.d_model % 2:
            raise CourseError(
                f"d_model {self.d_model} must be even and a multiple of num_heads {self.num_heads}."
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise CourseError(f"pad_id is {self.pad_id}; it must be a token id below {self.vocab_size}.")
        if not 0.0 <= self.dropout < 1.0:
            raise CourseError(f"dropout is {self.dropout!r}; it must be at least 0 and less than 1.")
        if self.attention == "tiled" and self.dropout:
            raise CourseError("attention 'tiled' has no dropout; set dropout to 0 or choose 'auto'.")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads


class Transformer(nn.Module):
    """Source ids in, logits of the target's next token out.

    One matrix embeds source and target, times √C, and is the output layer too (§3.4).
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.position_embedding = LearnedPositions(config.max_length, config.d_model)
        elif config.position == "sinusoidal":
            self.register_buffer(
                "position_table", sinusoidal(config.max_length, config.d_model), persistent=False
            )
        self.encoder = nn.ModuleList(_block(config, cross=False) for _ in range(config.num_layers))
        self.decoder = nn.ModuleList(_block(config, cross=True) for _ in range(config.num_layers))
        closing = config.pre_norm  # a post-norm stack ends in a norm already
        self.encoder_norm = LayerNorm(config.d_model, config.norm_eps) if closing else nn.Identity()
        self.decoder_norm = LayerNorm(config.d_model, config.norm_eps) if closing else nn.Identity()
        self._initialise()

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits of what follows each target token, all at once (teacher forcing).

        Args:
            src: (B, S) int64, padded with `pad_id`.
            tgt: (B, T) int64, starting with the start token. Padding at the end needs no mask: nothing before
                it sees it.

        Returns:
            (B, T, V).
        """
        src_padding = src == self.config.pad_id
        return self.decode(tgt, self.encode(src, src_padding), src_padding)

    def encode(self, src: Tensor, src_padding: Tensor | None = None) -> Tensor:
        """Source ids (B, S) -> memory (B, S, C).

        Args:
            src: token ids.
            src_padding: (B, S) bool, True = padding; None for none.
        """
        x = self._embed(src, 0)
        mask = _mask(src_padding)
        for block in self.encoder:
            x = block(x, mask=mask)
        return self.encoder_norm(x)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Keys and values of the memory (B, S, C) for every decoder layer, (B, H, S, D) each."""
        return [block.cross_attention.keys_values(memory) for block in self.decoder]

    def decode(
        self, tgt: Tensor, memory: Tensor | KeysValues, src_padding: Tensor | None = None, cache=None
    ) -> Tensor:
        """Logits of what follows each target token: (B, T) -> (B, T, V).

        Args:
            tgt: token ids; with a cache, only those that are not in it yet.
            memory: from `encode`; or, decoding step by step, from `keys_values`, which is computed once then.
            src_padding: (B, S) bool, True = padding in the source; None for none.
            cache: keys and values of earlier targets, see `shared.inference.kv_cache`; it is extended by T.

        Raises:
            CourseError: the target is longer than `max_length`.
        """
        if isinstance(memory, Tensor):
            memory = self.keys_values(memory)
        x = self._embed(tgt, 0 if cache is None else cache.length)
        mask = _mask(src_padding)
        for layer, block in enumerate(self.decoder):
            x = block(x, memory=memory[layer], memory_mask=mask, causal=True, cache=cache, layer=layer)
        if cache is not None:
            cache.advance(tgt.shape[1])
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def _embed(self, ids: Tensor, start: int) -> Tensor:
        config, stop = self.config, start + ids.shape[1]
        if stop > config.max_length:
            raise CourseError(
                f"{stop} tokens are more than the model's {config.max_length}; shorten the text."
            )
        x = self.embedding(ids) * math.sqrt(config.d_model)
        if config.position == "learned":
            x = x + self.position_embedding.weight[start:stop]
        elif config.position == "sinusoidal":
            x = x + self.position_table[start:stop]
        return F.dropout(x, config.dropout, self.training) if config.dropout else x

    def _initialise(self) -> None:
        """Xavier's uniform for matrices; embeddings N(0, 1/C), which times √C have the positions' size."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.d_model**-0.5)


def _mask(padding: Tensor | None) -> Tensor | None:
    """Padding (B, S), True = padding -> attention mask (B, 1, 1, S), True = may attend."""
    return None if padding is None else ~padding[:, None, None, :]


def _block(config: TransformerConfig, *, cross: bool) -> Block:
    def attention() -> MultiHeadAttention:
        return MultiHeadAttention(
            config.d_model, config.num_heads, dropout=config.dropout, implementation=config.attention
        )

    norms = [LayerNorm(config.d_model, config.norm_eps) for _ in range(3 if cross else 2)]
    return Block(
        attention(),
        MLP(config.d_model, config.d_ff, "relu", dropout=config.dropout),
        norms,
        cross_attention=attention() if cross else None,
        pre_norm=config.pre_norm,
        dropout=config.dropout,
    )
