"""Hiding tokens for a masked language model to find (Devlin et al. 2019, §3.1, task 1, and appendix C.2).

Legend: B batch, T time, V vocabulary.

Of the tokens chosen, 80 % become "[MASK]", 10 % a random token and 10 % stay: the model, which never meets
"[MASK]" after pretraining, has to look at every token. Masking whole words, all pieces of one or none, came
with the paper's code in 2019; guessing "##ing" from its own word is too easy.

Departures: a random token is never a special one. The paper's code rounds the number of tokens to hide;
here it is right on average, also where a whole word does not fit.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from shared.runtime.errors import CourseError

IGNORE = -100  # a target that does not count, as in PyTorch and transformers


def mask_tokens(
    ids: Tensor,
    generator: torch.Generator,
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: Iterable[int] = (),
    share: float = 0.15,
    continues: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a masked language model, a pure function of its arguments.

    In each row `share` of the ordinary tokens is chosen at random, and at least one. What a chosen token
    becomes is drawn for each token alone, also where whole words are chosen, as in the paper's code.

    Args:
        ids: (B, T) int64, on the generator's device.
        generator: the source of all draws, moved on by the call. Seeded with the step, it makes a batch that
            can be made again; a new draw for each epoch is the "dynamic masking" of Liu et al. 2019, §4.1.
        vocab_size: V.
        mask_id: the id of "[MASK]".
        special_ids: tokens that are never chosen: padding, "[CLS]", "[SEP]", …; `mask_id` is one of them.
        share: of the ordinary tokens in a row, in (0, 1].
        continues: (V,) bool, True for a token that goes on with the word of the token before it: "##…" in
            WordPiece. Given, all tokens of a word are chosen or none. A special token ends a word.

    Returns:
        inputs (B, T): `ids`, with 80 % of the chosen tokens replaced by `mask_id`, 10 % by a random ordinary
        token, which may be the same. targets (B, T): the ids of the chosen tokens, −100 elsewhere.

    Raises:
        CourseError: an argument has the wrong shape or is out of range, or no token is ordinary.
    """
    special = _special(vocab_size, {mask_id, *special_ids}, ids.device)
    _check(ids, vocab_size, share, continues)
    chosen = _choose(ids, special, generator, share, continues)
    ordinary_ids = (~special).nonzero().squeeze(-1)
    fate = torch.rand(ids.shape, generator=generator, device=ids.device)
    random = torch.randint(len(ordinary_ids), ids.shape, generator=generator, device=ids.device)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, ids)
    inputs = torch.where(chosen & (fate >= 0.9), ordinary_ids[random], inputs)
    return inputs, ids.masked_fill(~chosen, IGNORE)


def _special(vocab_size: int, special_ids: set[int], device: torch.device) -> Tensor:
    """(V,) bool, True for the special tokens."""
    for index in sorted(special_ids):
        if not 0 <= index < vocab_size:
            raise CourseError(f"The special token {index} is no id of a vocabulary of {vocab_size} tokens.")
    if len(special_ids) == vocab_size:
        raise CourseError(f"All {vocab_size} tokens of the vocabulary are special; none can be masked.")
    special = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    special[sorted(special_ids)] = True
    return special


def _check(ids: Tensor, vocab_size: int, share: float, continues: Tensor | None) -> None:
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise CourseError(f"ids is {ids.dtype} of shape {tuple(ids.shape)}; it must be int64, (B, T).")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise CourseError(
            f"The ids run from {int(ids.min())} to {int(ids.max())}; they must be 0 … {vocab_size - 1}."
        )
    if not 0.0 < share <= 1.0:
        raise CourseError(f"share is {share!r}; it must be above 0 and at most 1.")
    if continues is not None and (continues.shape != (vocab_size,) or continues.dtype != torch.bool):
        raise CourseError(
            f"continues is {continues.dtype} of shape {tuple(continues.shape)}; it must be bool, "
            f"({vocab_size},)."
        )


def _choose(
    ids: Tensor, special: Tensor, generator: torch.Generator, share: float, continues: Tensor | None
) -> Tensor:
    """Which tokens to hide: (B, T) bool.

    Words are taken in random order while they fit into the row's budget, `share` of its ordinary tokens. The
    word that overlaps its end is taken with the probability that it fits, so that the expected number of
    tokens is the budget; the first word is taken always.
    """
    ordinary = ~special[ids]  # (B, T)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = places if continues is None else _word_starts(ordinary, continues[ids], places)
    luck = torch.rand(ids.shape, generator=generator, device=ids.device)
    luck = luck.gather(1, first).masked_fill(~ordinary, 2.0)  # one number a word; special tokens come last
    order = luck.argsort(dim=1, stable=True)  # ranks to places
    rank = torch.empty_like(order).scatter_(1, order, places)
    before = rank.gather(1, first)  # tokens in the words taken earlier; those of one word stay together
    length = torch.zeros_like(ids).scatter_add_(1, first, ordinary.long()).gather(1, first)
    budget = share * ordinary.sum(1, keepdim=True)
    overlap = torch.rand(ids.shape[0], 1, generator=generator, device=ids.device)
    return ordinary & ((before + overlap * length < budget) | (before == 0))


def _word_starts(ordinary: Tensor, continues: Tensor, places: Tensor) -> Tensor:
    """For each token the place of the first token of its word: (B, T)."""
    inside = ordinary & continues & ordinary.roll(1, dims=1)  # at place 0 it makes no difference
    return places.masked_fill(inside, 0).cummax(dim=1).values
