"""BERT: a bidirectional encoder that learns by filling in what was hidden (Devlin et al. 2019).

Legend: B batch, T time, C width of the model, L layers, H heads, V vocabulary, K classes.

| part                  | choice                                                          | source           |
|-----------------------|-----------------------------------------------------------------|------------------|
| embedding             | token + position + token type, then LayerNorm and dropout       | §3, figure 2     |
| layers                | post-norm, GELU, learned positions, each token sees all others  | §3, appendix A.2 |
| masked language model | linear, GELU, LayerNorm, then the token embedding with a bias   | §3.1; its code   |
| classifier            | tanh(linear) of the first token ("pooler"), then a linear layer | §3.2; its code   |

`shared.data.masking.mask_tokens` makes the inputs and targets of the masked language model.

Departures: there is no next-sentence prediction (§3.1, task 2), without which the model learns as well or
better (Liu et al. 2019, §4.2). Weights start from N(0, 0.02), as in `transformers`; the paper's code cuts
that distribution off at two standard deviations.

The second half of this file is the layout of the same models in `transformers`: `settings` and `config_from`
for `config.json`, `to_state` and `from_state` for the weights.
"""

import math
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.attention import IMPLEMENTATIONS, MultiHeadAttention
from shared.models.losses import IGNORE, cross_entropy
from shared.models.normalization import LayerNorm
from shared.models.positions import LearnedPositions
from shared.models.transformer_blocks import ACTIVATIONS, MLP, Block
from shared.runtime.errors import CourseError

ARCHITECTURE = "BertForMaskedLM"
CLASSIFIER_ARCHITECTURE = "BertForSequenceClassification"

# Our activations and `transformers`' names for them.
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
# Our module names and `transformers`'.
OUTSIDE = {
    "bert.token_embedding": "bert.embeddings.word_embeddings",
    "bert.position_embedding": "bert.embeddings.position_embeddings",
    "bert.token_type_embedding": "bert.embeddings.token_type_embeddings",
    "bert.norm": "bert.embeddings.LayerNorm",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions",
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
}
BLOCK = {
    "attention.out": "attention.output.dense",
    "norms.0": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "norms.1": "output.LayerNorm",
}
# What a released checkpoint may hold beside a masked language model.
NEXT_SENTENCE = ("bert.pooler.", "cls.seq_relationship.")
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


@dataclass(frozen=True)
class BertConfig:
    """The architecture; the defaults are the paper's BERT-base (§3).

    Attributes:
        vocab_size: V, tokens.
        context_length: the longest sequence, tokens.
        num_layers, num_heads, d_model: L, H, C.
        d_ff: width of the MLP's hidden layer; None for 4·C.
        num_token_types: how many parts a sequence may have, each with a trained vector of its own.
        num_labels: K, the classes of a `BertClassifier`; None for a masked language model.
        pad_id: the token that fills short sequences up; its embedding starts at zero and is not trained by
            being looked up. None for no such token.
        dropout: probability, on embeddings, attention weights, what each sublayer adds and the classifier's
            input.
        activation: "gelu", "gelu_tanh" or "relu".
        norm_eps: ε of the LayerNorms.
        init_std: standard deviation of the initial weights.
        attention: "auto", "sdpa", "plain" or "tiled"; see `shared.models.attention.attention`.
    """

    vocab_size: int
    context_length: int = 512
    num_layers: int = 12
    num_heads: int = 12
    d_model: int = 768
    d_ff: int | None = None
    num_token_types: int = 2
    num_labels: int | None = None
    pad_id: int | None = 0
    dropout: float = 0.1
    activation: str = "gelu"
    norm_eps: float = 1e-12
    init_std: float = 0.02
    attention: str = "auto"

    def __post_init__(self):
        """Raises CourseError, naming key, value and what is allowed."""
        sizes = ("vocab_size", "context_length", "num_layers", "num_heads", "d_model", "num_token_types")
        for name in sizes:
            _whole_number(name, getattr(self, name), 1)
        if self.d_ff is not None:
            _whole_number("d_ff", self.d_ff, 1)
        if self.num_labels is not None:
            _whole_number("num_labels", self.num_labels, 2)
        if self.d_model % self.num_heads:
            raise CourseError(f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}.")
        if self.pad_id is not None and (
            type(self.pad_id) is not int or not 0 <= self.pad_id < self.vocab_size
        ):
            raise CourseError(f"pad_id is {self.pad_id!r}; it must be a token id below {self.vocab_size}.")
        for name, allowed in (("activation", ACTIVATION_NAMES), ("attention", IMPLEMENTATIONS)):
            if getattr(self, name) not in allowed:
                raise CourseError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        if not (_is_number(self.dropout) and 0.0 <= self.dropout < 1.0):
            raise CourseError(f"dropout is {self.dropout!r}; it must be at least 0 and less than 1.")
        for name in ("norm_eps", "init_std"):
            value = getattr(self, name)
            if not (_is_number(value) and 0.0 < value < math.inf):
                raise CourseError(f"{name} is {value!r}; it must be a number above 0.")
        if self.attention == "tiled" and self.dropout:
            raise CourseError("attention 'tiled' has no dropout; set dropout to 0 or choose 'auto'.")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def hidden(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BertConfig":
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


def _whole_number(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise CourseError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Devlin et al. 2019, §3. The vocabulary is that of the released uncased models.
PRESETS: dict[str, BertConfig] = {
    "bert-base": BertConfig(30_522),
    "bert-large": BertConfig(30_522, num_layers=24, num_heads=16, d_model=1024),
}


class Bert(nn.Module):
    """The encoder: token ids in, one vector for each token out, each made from the whole sequence.

    Args:
        config: the architecture. The weights are drawn from PyTorch's generator; on the meta device
            (`with torch.device("meta")`) nothing is drawn and no memory used.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_id)
        self.position_embedding = LearnedPositions(config.context_length, config.d_model)
        self.token_type_embedding = nn.Embedding(config.num_token_types, config.d_model)
        self.norm = LayerNorm(config.d_model, config.norm_eps)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.num_layers))
        _initialise(self, config)
        if config.pad_id is not None:
            with torch.no_grad():
                self.token_embedding.weight[config.pad_id].zero_()

    def forward(
        self, ids: Tensor, *, token_types: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) -> (B, T, C).

        Args:
            ids: int64.
            token_types: (B, T) int64, the part of the sequence that a token belongs to; None for all in the
                first.
            padding: (B, T) bool, True = padding, which nothing looks at; None for none. `ids == pad_id`
                gives it.

        Raises:
            CourseError: more tokens than the context holds, or `padding` is not of type bool.
        """
        x = self._embed(ids, token_types)
        mask = _attention_mask(padding)
        for block in self.blocks:
            x = block(x, mask=mask)
        return x

    def _embed(self, ids: Tensor, token_types: Tensor | None) -> Tensor:
        config, T = self.config, ids.shape[1]
        if config.context_length < T:
            raise CourseError(
                f"{T} tokens do not fit in the model's context of {config.context_length}; shorten the text."
            )
        parts = self.token_type_embedding
        x = self.token_embedding(ids) + (parts.weight[0] if token_types is None else parts(token_types))
        x = self.norm(x + self.position_embedding.weight[:T])  # (B, T, C)
        return F.dropout(x, config.dropout, self.training) if config.dropout else x


class MaskedLMHead(nn.Module):
    """gelu(x·W + b), LayerNorm, then one logit a token: the embedding's rows, transposed, plus a bias."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = LayerNorm(config.d_model, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Vectors (…, C) and the token embedding (V, C) -> logits (…, V)."""
        return F.linear(self.norm(self.activation(self.dense(x))), embedding, self.bias)


class BertMaskedLM(nn.Module):
    """Token ids with some of them hidden in, logits of what stood there out (§3.1, task 1).

    Equal to `transformers`' BertForMaskedLM.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.head = MaskedLMHead(config)
        _initialise(self.head, config)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        token_types: Tensor | None = None,
        padding: Tensor | None = None,
        loss_only: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits for each position, and the loss if there are targets.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64, the token that was hidden; −100 where nothing was.
            token_types: see `Bert.forward`.
            padding: (B, T) bool, True = padding; None for none.
            loss_only: return None for the logits, which are then computed where there is a target and
                nowhere else: at about a seventh of the positions.

        Returns:
            logits (B, T, V); loss, the mean over the targets in nats a token, float32 scalar, or None. The
            loss is nan if no position has a target.

        Raises:
            CourseError: more tokens than the context holds, or `padding` is not of type bool.
        """
        x = self.bert(ids, token_types=token_types, padding=padding)
        embedding = self.bert.token_embedding.weight
        if loss_only:
            hidden = targets != IGNORE  # (B, T)
            return None, cross_entropy(self.head(x[hidden], embedding), targets[hidden])
        logits = self.head(x, embedding)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def flops_per_token(self, T: int, masked: float = 0.15) -> int:
        """Floating-point operations to train on one token of a sequence of T, forward and backward.

        6 for each weight of a matmul and 12·C·T a layer for attention (Chowdhery et al. 2022, appendix B).

        Args:
            T: tokens a sequence.
            masked: share of the positions that go through the head, as with `loss_only`; 1 without.
        """
        config = self.config
        layers = sum(m.weight.numel() for m in self.bert.modules() if isinstance(m, nn.Linear))
        head = config.d_model * (config.d_model + config.vocab_size)
        return round(6 * (layers + masked * head)) + 12 * config.num_layers * config.d_model * T


class BertClassifier(nn.Module):
    """Token ids in, logits of `config.num_labels` classes out, read from the first token (§3.2).

    Equal to `transformers`' BertForSequenceClassification.

    Raises:
        CourseError: `config.num_labels` is None.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        if config.num_labels is None:
            raise CourseError("num_labels is None; a classifier needs a whole number of at least 2.")
        self.config = config
        self.bert = Bert(config)
        self.pooler = nn.Linear(config.d_model, config.d_model)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        for layer in (self.pooler, self.classifier):
            _initialise(layer, config)

    @classmethod
    def from_pretrained(cls, model: BertMaskedLM, num_labels: int) -> "BertClassifier":
        """A copy of a masked language model's encoder under a new, random pooler and classifier."""
        weight = model.bert.token_embedding.weight
        new = cls(replace(model.config, num_labels=num_labels)).to(weight.device, weight.dtype)
        new.bert.load_state_dict(model.bert.state_dict())
        return new

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        token_types: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the classes, and the loss if there are targets.

        Args:
            ids: (B, T) int64; the first token of each row stands for the whole.
            targets: (B,) int64, classes.
            token_types: see `Bert.forward`.
            padding: (B, T) bool, True = padding; None for none.

        Returns:
            logits (B, K); loss, the mean in nats a sequence, float32 scalar, or None.

        Raises:
            CourseError: more tokens than the context holds, or `padding` is not of type bool.
        """
        x = self.bert(ids, token_types=token_types, padding=padding)
        pooled = self.pooler(x[:, 0]).tanh()  # (B, C)
        logits = self.classifier(F.dropout(pooled, self.config.dropout, self.training))
        return logits, None if targets is None else cross_entropy(logits, targets)


def _block(config: BertConfig) -> Block:
    attention = MultiHeadAttention(
        config.d_model, config.num_heads, dropout=config.dropout, implementation=config.attention
    )
    mlp = MLP(config.d_model, config.hidden, config.activation, dropout=config.dropout)
    norms = [LayerNorm(config.d_model, config.norm_eps) for _ in range(2)]
    return Block(attention, mlp, norms, pre_norm=False, dropout=config.dropout)


def _attention_mask(padding: Tensor | None) -> Tensor | None:
    """Padding (B, T), True = padding -> attention mask (B, 1, 1, T), True = may attend."""
    if padding is None:
        return None
    if padding.dtype != torch.bool:  # an attention mask of transformers, 1 = real, would be taken inside out
        raise CourseError(f"padding is of type {padding.dtype}; it must be bool, True for padding.")
    return ~padding[:, None, None, :]


def _initialise(module: nn.Module, config: BertConfig) -> None:
    """N(0, init_std) for matrices and embeddings, zero for biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=config.init_std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


def fits(config: object) -> bool:
    """Whether `transformers`' BERT can express this configuration: every `BertConfig`, and no other."""
    return isinstance(config, BertConfig)


def build(config: BertConfig) -> BertMaskedLM | BertClassifier:
    """The model that a configuration describes: a classifier if it has `num_labels`."""
    return BertMaskedLM(config) if config.num_labels is None else BertClassifier(config)


def settings(config: BertConfig) -> dict[str, Any]:
    """`config.json` of `transformers`' BERT for this configuration."""
    values = {
        "architectures": [ARCHITECTURE if config.num_labels is None else CLASSIFIER_ARCHITECTURE],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden,
        "type_vocab_size": config.num_token_types,
        "pad_token_id": config.pad_id,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "classifier_dropout": None,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }
    if config.num_labels is not None:
        names = [f"LABEL_{label}" for label in range(config.num_labels)]
        values["id2label"] = {str(label): name for label, name in enumerate(names)}
        values["label2id"] = {name: label for label, name in enumerate(names)}
        values["problem_type"] = "single_label_classification"
    return values


def config_from(values: dict[str, Any]) -> BertConfig:
    """The configuration that a BERT `config.json` describes.

    Args:
        values: its settings. "architectures" decides between masked language model, also with the
            next-sentence head of the released checkpoints (which `from_state` leaves out), and classifier.

    Raises:
        CourseError: a setting is missing, or one that this BERT does not have is on.
    """
    architecture = (values.get("architectures") or [ARCHITECTURE])[0]
    if architecture not in (ARCHITECTURE, "BertForPreTraining", CLASSIFIER_ARCHITECTURE):
        raise CourseError(
            f"This BERT is a {architecture}; known are {ARCHITECTURE} and {CLASSIFIER_ARCHITECTURE}."
        )
    dropout = values.get("hidden_dropout_prob", 0.1)
    usual = {
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "position_embedding_type": ("absolute",),
        "attention_probs_dropout_prob": (dropout,),
        "classifier_dropout": (None, dropout),
        "problem_type": (None, "single_label_classification"),
    }
    for name, allowed in usual.items():
        if values.get(name, allowed[0]) not in allowed:
            raise CourseError(f"This BERT has {name} = {values[name]!r}, which the course's cannot do.")
    activations = {theirs: ours for ours, theirs in ACTIVATION_NAMES.items()}
    activations["gelu_pytorch_tanh"] = "gelu_tanh"
    activation = values.get("hidden_act", "gelu")
    if activation not in activations:
        raise CourseError(f"This BERT has the activation {activation!r}; known are {', '.join(activations)}.")
    labels = None
    if architecture == CLASSIFIER_ARCHITECTURE:
        labels = len(values["id2label"]) if values.get("id2label") else values.get("num_labels", 2)
    try:
        width, hidden = values["hidden_size"], values["intermediate_size"]
        return BertConfig(
            vocab_size=values["vocab_size"],
            context_length=values["max_position_embeddings"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            d_model=width,
            d_ff=None if hidden == 4 * width else hidden,
            num_token_types=values.get("type_vocab_size", 2),
            num_labels=labels,
            pad_id=values.get("pad_token_id", 0),
            dropout=float(dropout),
            activation=activations[activation],
            norm_eps=values.get("layer_norm_eps", 1e-12),
            init_std=values.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise CourseError(f"The BERT settings lack {error.args[0]!r}.") from error


def to_state(model: BertMaskedLM | BertClassifier) -> dict[str, Tensor]:
    """The weights under `transformers`' names, as views; the tied decoder appears as the embedding only."""
    state = {}
    for name, tensor in model.state_dict().items():
        theirs = _their_names(name)
        state |= zip(theirs, tensor.chunk(len(theirs)), strict=True)
    return state


def from_state(model: BertMaskedLM | BertClassifier, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under `transformers`' names, or those of older BERT files, as `model.state_dict()` has them.

    What a masked language model has no use for, a pooler and a next-sentence head, is left out. All other
    weights that are not the model's are kept, to be complained about.

    Raises:
        CourseError: a weight is missing or has another shape than the configuration says.
    """
    state = {_modern_name(name): tensor for name, tensor in state.items()}
    state.pop("bert.embeddings.position_ids", None)  # 0, 1, 2, …
    for copy, original in TIED.items():
        if copy in state and torch.equal(state[copy], state.get(original, state[copy])):
            state.setdefault(original, state.pop(copy))
    if isinstance(model, BertMaskedLM):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(NEXT_SENTENCE)}
    expected = to_state(model)
    if missing := [name for name in expected if name not in state]:
        raise CourseError(f"The weights lack {missing[0]} ({len(missing)} missing).")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:  # joined, wrong parts could still make a right whole
            raise CourseError(
                f"{name} has the shape {tuple(state[name].shape)} and the configuration says "
                f"{tuple(tensor.shape)}."
            )
    ours = {}
    for name in model.state_dict():
        parts = [state.pop(theirs) for theirs in _their_names(name)]
        ours[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ours | state


def _their_names(name: str) -> list[str]:
    """`transformers`' name of one of our parameters; three for the matrix of queries, keys and values."""
    module, _, kind = name.rpartition(".")
    if module in OUTSIDE:
        return [f"{OUTSIDE[module]}.{kind}"]
    _, _, index, part = module.split(".", 3)
    layer = f"bert.encoder.layer.{index}"
    if part == "attention.qkv":
        return [f"{layer}.attention.self.{which}.{kind}" for which in ("query", "key", "value")]
    return [f"{layer}.{BLOCK[part]}.{kind}"]


def _modern_name(name: str) -> str:
    """The first released files call the weight and bias of a LayerNorm gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
