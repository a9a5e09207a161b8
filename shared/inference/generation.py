"""Decoding: greedy, sampling and beam search, for GPT and for the encoder–decoder Transformer.

Legend: B batch, T time, V vocabulary, K beam, S source length.

Sampling goes through the same filters in the same order as `transformers`: temperature, then top-k, top-p,
min-p, each on what the one before left. With equal logits at the edge, top-k keeps all of them, and top-p the
ones that `torch.sort` puts last.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor, nn

from shared.inference import packed
from shared.inference.kv_cache import KVCache
from shared.runtime.errors import CourseError

NEVER = float("-inf")


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k highest logits of each row, and those equal to the k-th (Fan et al. 2018, §5).

    Args:
        logits: (B, V).
        k: at least 1; more than V keeps all.

    Returns:
        (B, V), −∞ where a token was ruled out.
    """
    edge = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < edge, NEVER)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens that together have probability p or more (Holtzman et al. 2020, §3.1).

    Args:
        logits: (B, V).
        p: in (0, 1]; the most probable token always stays.

    Returns:
        (B, V), −∞ where a token was ruled out.
    """
    ascending, order = logits.sort(dim=-1)
    # From the improbable end: whatever leaves at least p above it can go.
    outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    outside[..., -1] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), NEVER)


def filter_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens that are at least p times as probable as the most probable (Nguyen et al. 2024, §3).

    Args:
        logits: (B, V).
        p: in [0, 1].

    Returns:
        (B, V), −∞ where a token was ruled out.
    """
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), NEVER)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Attributes:
        temperature: what logits are divided by; 0 takes the most probable token and ignores the rest.
        top_k, top_p, min_p: see the filters; None leaves one out.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        """Raises CourseError, naming the setting, its value and what is allowed."""
        allowed = {
            "temperature": (
                self.temperature == 0 or 1e-6 <= self.temperature < float("inf"),
                "0 (greedy) or at least 0.000001",  # dividing by less leaves the range of float32
            ),
            "top_k": (self.top_k is None or self.top_k >= 1, "a whole number of at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
        }
        for name, (fine, range_) in allowed.items():
            if not fine:
                raise CourseError(f"{name} is {getattr(self, name)}; it must be {range_}.")


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature and filters, in that order: the logits that are sampled from.

    Args:
        logits: (B, V).
        sampling: with a temperature above 0.

    Returns:
        (B, V) float32, −∞ where a token was ruled out.
    """
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        logits = filter_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = filter_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = filter_min_p(logits, sampling.min_p)
    return logits


def sample_logits(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row: (B, V) -> (B,) int64."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = filter_logits(logits, sampling).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_ids: Sequence[int] = (),
    seed: int | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue prompts of any lengths, as one batch.

    Shorter prompts are padded on the left, and positions count from the first real token, so that each row
    gets what it would get alone (greedily; when sampling, rows share one stream of random numbers).

    A continuation may outgrow the model's context: each time it is full, the earlier half of it is forgotten
    and the later half read again. In a batch all rows do so together, when the longest one has to.

    Args:
        model: a GPT; its evaluation mode is used and its mode restored.
        prompts: token ids, one sequence a row.
        max_new_tokens: how many tokens to add at most.
        temperature, top_k, top_p, min_p: see `Sampling`; temperature 0, the default, is greedy.
        stop_ids: a row ends before the first of these, which is not returned.
        seed: makes sampling repeatable, whatever else draws random numbers; None draws from PyTorch's
            generator.
        use_cache: keep keys and values; without, every step computes all positions again (same tokens,
            slower).

    Returns:
        The new tokens of each row, at most `max_new_tokens`.

    Raises:
        CourseError: an empty prompt, one longer than the context, or a sampling setting out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    steps = _steps(model, prompts, max_new_tokens, sampling, seed, use_cache)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=_device(model))
    running = torch.ones(len(prompts), dtype=torch.bool, device=stop.device)
    columns = []
    for tokens in steps:
        columns.append(tokens)
        if len(stop):
            running &= torch.isin(tokens, stop, invert=True)
            if not running.any():
                steps.close()
                break
    rows = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in prompts]
    return [_until(row, set(stop_ids)) for row in rows]


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_ids: Sequence[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """Continue one prompt, handing out each token as soon as it is there.

    The tokens are those of `generate` with the same arguments.

    Raises:
        CourseError: as `generate`, when the first token is asked for.
    """
    steps = _steps(
        model, [prompt], max_new_tokens, Sampling(temperature, top_k, top_p, min_p), seed, use_cache=True
    )
    for tokens in steps:
        token = int(tokens)
        if token in stop_ids:
            steps.close()
            return
        yield token


def _until(row: list[int], stop_ids: set[int]) -> list[int]:
    return next((row[:i] for i, token in enumerate(row) if token in stop_ids), row)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _pad_left(
    prompts: Sequence[Sequence[int]], context_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(B, T) ids and (B,) how many tokens at the start of each row are padding."""
    if not prompts:
        raise CourseError("There is no prompt to continue; give at least one.")
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise CourseError("The prompt is empty; give at least one token to continue from.")
    longest = max(lengths)
    if longest > context_length:
        raise CourseError(
            f"The prompt has {longest} tokens and the model's context holds {context_length}; "
            "shorten the prompt."
        )
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    return ids, longest - torch.tensor(lengths, device=device)


def _none_if_zero(padding: Tensor) -> Tensor | None:
    return padding if bool(padding.any()) else None


@torch.inference_mode()
def _steps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    """The next token of every row, (B,) int64, step by step."""
    if max_new_tokens < 0:
        raise CourseError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more.")
    context, device = model.config.context_length, _device(model)
    ids, padding = _pad_left(prompts, context, device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    B, T = ids.shape
    # Tokens are only ever appended: the whole text is one buffer, and what the model reads a view of it.
    text = torch.cat((ids, ids.new_zeros(B, max_new_tokens)), dim=1)
    start, left_padding = 0, _none_if_zero(padding)  # `start` is the first token that is not forgotten yet
    cache = KVCache.for_model(model, B, min(context, T + max_new_tokens)) if use_cache else None
    was_training = model.training
    model.eval()
    decoder = model
    if use_cache and max_new_tokens >= packed.FEWEST_TOKENS and packed.can_pack(model):
        decoder = packed.pack(model, rows=B)
    try:
        for end in range(T, T + max_new_tokens):
            if end - start > context:  # full: forget the earlier half
                start = end - max(1, context // 2)
                left_padding = _none_if_zero((padding - start).clamp(min=0))
                if cache is not None:
                    cache.clear()
            unread = start if cache is None else start + cache.length
            logits, _ = decoder(text[:, unread:end], cache=cache, left_padding=left_padding, last_only=True)
            tokens = sample_logits(logits[:, -1], sampling, generator)
            text[:, end] = tokens
            yield tokens
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Source:
    """A batch of encoded sentences, ready to be decoded one target token at a time.

    Attributes:
        memory: keys and values of the source for each decoder layer, (B, H, S, D).
        padding: (B, S) bool, True = padding.
    """

    memory: list[tuple[Tensor, Tensor]]
    padding: Tensor

    def repeat(self, times: int) -> "_Source":
        """Every sentence `times` times in a row, one for each hypothesis."""
        memory = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.memory]
        return _Source(memory, self.padding.repeat_interleave(times, 0))


def _encode(model: nn.Module, src: Tensor) -> _Source:
    padding = src == model.config.pad_id
    return _Source(model.keys_values(model.encode(src, padding)), padding)


def _evaluating(function: Callable) -> Callable:
    """Run with the model, the first argument, in evaluation mode, without gradients; restore its mode."""

    @wraps(function)
    def wrapped(model: nn.Module, *args, **kwargs):
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                return function(model, *args, **kwargs)
        finally:
            model.train(was_training)

    return wrapped


@_evaluating
def greedy_decode(
    model: nn.Module, src: Tensor, *, bos_id: int, eos_id: int, max_length: int
) -> list[list[int]]:
    """Translate a batch, taking the most probable token at every step.

    Args:
        model: an encoder–decoder `Transformer`.
        src: (B, S) int64, padded with the model's `pad_id`.
        bos_id: what every target starts with; not returned.
        eos_id: ends a target; not returned.
        max_length: tokens at most, the end token included.

    Returns:
        The target tokens of each sentence.

    Raises:
        CourseError: `max_length` is more than the model's positions.
    """
    _check_length(model, max_length)
    B = src.shape[0]
    source, cache = _encode(model, src), KVCache.for_model(model, B, max_length)
    tokens = torch.full((B, 1), bos_id, device=src.device)
    out = torch.full((B, max_length), eos_id, device=src.device)
    ended = torch.zeros(B, dtype=torch.bool, device=src.device)
    for t in range(max_length):
        logits = model.decode(tokens, source.memory, source.padding, cache)  # (B, 1, V)
        tokens = logits[:, -1].argmax(dim=-1, keepdim=True)
        out[:, t] = tokens.squeeze(1)
        ended |= out[:, t] == eos_id
        if ended.all():
            break
    return [_until(row, {eos_id}) for row in out.tolist()]


def _check_length(model: nn.Module, max_length: int) -> None:
    if max_length > model.config.max_length:
        raise CourseError(
            f"{max_length} target tokens were asked for and the model has positions for "
            f"{model.config.max_length}; ask for fewer."
        )


def length_penalty(length: int, alpha: float) -> float:
    """lp(Y) = ((5 + |Y|) / 6)^α, what a hypothesis' log-probability is divided by (Wu et al. 2016, eq. 14).

    Args:
        length: |Y|, tokens with the end token.
        alpha: 0 compares plain log-probabilities, which favours short ones; Vaswani et al. (2017), §6.1, use
            0.6.
    """
    return ((5 + length) / 6) ** alpha


@_evaluating
def beam_search(
    model: nn.Module,
    src: Tensor,
    *,
    beam_size: int,
    alpha: float = 0.6,
    bos_id: int,
    eos_id: int,
    max_length: int,
) -> list[list[int]]:
    """Translate a batch, following the `beam_size` most probable beginnings of each sentence.

    A hypothesis that ends leaves the beam and its place stays empty, so that a beam of 1 is greedy decoding.
    A sentence is done when nothing in its beam can still beat its best ended hypothesis: log-probabilities
    only fall, so log p / lp(max_length) is the most that a beginning can reach. What has not ended after
    `max_length` tokens competes as it is.

    Args:
        model: an encoder–decoder `Transformer`.
        src: (B, S) int64, padded with the model's `pad_id`.
        beam_size: K.
        alpha: α of `length_penalty`.
        bos_id, eos_id, max_length: as `greedy_decode`.

    Returns:
        The best target of each sentence, by log p(Y) / lp(Y).

    Raises:
        CourseError: `max_length` is more than the model's positions.
        ValueError: `beam_size` is below 1, or `alpha` negative.
    """
    if beam_size < 1 or alpha < 0:
        raise ValueError(f"beam_size is {beam_size} and alpha {alpha}; need at least 1 and 0")
    _check_length(model, max_length)
    source = _encode(model, src).repeat(beam_size)
    cache = KVCache.for_model(model, src.shape[0] * beam_size, max_length)
    beam = _Beam(src.shape[0], beam_size, bos_id, eos_id, max_length, alpha, src.device)
    for _ in range(max_length):
        logits = model.decode(beam.last_tokens(), source.memory, source.padding, cache)  # (BK, 1, V)
        cache.reorder(beam.extend(logits[:, -1].float().log_softmax(dim=-1)))
        if beam.done():
            break
    return beam.best()


class _Beam:
    """K living hypotheses a sentence (log-probability −∞ for an empty place), and the best that has ended."""

    def __init__(self, B: int, K: int, bos_id: int, eos_id: int, max_length: int, alpha: float, device):
        self.K, self.eos_id, self.max_length, self.alpha = K, eos_id, max_length, alpha
        self.tokens = torch.full((B, K, max_length + 1), bos_id, device=device)
        self.log_p = torch.full((B, K), NEVER, device=device)
        self.log_p[:, 0] = 0.0  # all start alike: one is enough
        self.best_score = torch.full((B,), NEVER, device=device)
        self.best_tokens = torch.full((B, max_length), eos_id, device=device)
        self.ended = torch.zeros(B, dtype=torch.long, device=device)  # places that stay empty
        self.length = 0
        self._first_row = torch.arange(B, device=device)[:, None] * K  # (B, 1)

    def last_tokens(self) -> Tensor:
        """What the decoder reads next: (BK, 1)."""
        return self.tokens[:, :, self.length].reshape(-1, 1)

    def extend(self, log_p: Tensor) -> Tensor:
        """Extend every hypothesis by one token and keep the best.

        Args:
            log_p: (BK, V), log-probabilities of each hypothesis' next token.

        Returns:
            (BK,) the rows that the new hypotheses come from.
        """
        (B, K), V = self.log_p.shape, log_p.shape[-1]
        candidates = (self.log_p[:, :, None] + log_p.view(B, K, V)).flatten(1)  # (B, KV)
        self.log_p, chosen = candidates.topk(K, dim=-1)  # (B, K), best first
        parents, new = chosen // V, chosen % V
        self.tokens = self.tokens.gather(1, parents[:, :, None].expand_as(self.tokens))
        self.length += 1
        self.tokens[:, :, self.length] = new
        place = torch.arange(K, device=new.device)
        self.log_p.masked_fill_(place >= K - self.ended[:, None], NEVER)
        ends = (new == self.eos_id) & (self.log_p > NEVER)
        self._collect(ends if self.length < self.max_length else self.log_p > NEVER)
        self.log_p.masked_fill_(ends, NEVER)
        self.ended += ends.sum(dim=1)
        return (self._first_row + parents).flatten()

    def _collect(self, finished: Tensor) -> None:
        """Remember each sentence's best hypothesis among those marked (B, K)."""
        score = self.log_p.masked_fill(~finished, NEVER) / length_penalty(self.length, self.alpha)
        top, place = score.max(dim=1)  # (B,)
        better = top > self.best_score
        rows = torch.arange(len(top), device=top.device)
        self.best_tokens[better] = self.tokens[rows, place, 1:][better]
        self.best_score = torch.where(better, top, self.best_score)

    def done(self) -> bool:
        """Nothing that lives can still win."""
        reachable = self.log_p.amax(dim=1) / length_penalty(self.max_length, self.alpha)
        return bool((reachable <= self.best_score).all())

    def best(self) -> list[list[int]]:
        return [_until(row, {self.eos_id}) for row in self.best_tokens.tolist()]
