"""Cross-entropy in float32, with label smoothing, without the copies that a large vocabulary makes dear.

Legend: N tokens, C width of the model, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target that does not count, as in PyTorch and transformers
CHUNKS = {"cpu": 1 << 19}  # logits worked on at once: 2 MB of float32 stay in a core's cache
CHUNK = 1 << 26  # the same where every operation is a kernel launch
ADDED = 8  # times that with a linear layer, where each chunk is added to the whole gradient of the weight


def cross_entropy(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = IGNORE
) -> Tensor:
    """Mean cross-entropy in nats a token, equal to `F.cross_entropy`; the logits are visited in one pass.

    With smoothing ε the target distribution is 1 − ε on the target plus ε/V on every token (Vaswani et al.
    2017, §5.4, after Szegedy et al. 2016, §7).

    Args:
        logits: (…, V), any floating dtype; at least float32 is computed in.
        targets: (…) int64.
        label_smoothing: ε.
        ignore_index: targets of this value do not count.

    Returns:
        Scalar, float32; nan if no target counts.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    return _CrossEntropy.apply(flat, targets.reshape(-1), label_smoothing, ignore_index)


class _CrossEntropy(torch.autograd.Function):
    """∂loss/∂logits = (softmax(logits) − target distribution) / count, taken while the logits are at hand."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, smoothing: float, ignore: int) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        kept, chosen = _targets(targets, ignore)
        total = torch.zeros((), dtype=_wide_dtype(logits), device=logits.device)
        for rows in _chunks(logits, logits.shape[-1]):
            out = None if gradient is None else gradient[rows]
            total += _row_losses(logits[rows], chosen[rows], kept[rows], smoothing, out)
        count = kept.sum()
        ctx.save_for_backward(gradient, count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor):
        gradient, count = ctx.saved_tensors
        return gradient * (outer / count).to(gradient.dtype), None, None, None


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _targets(targets: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Which targets count, and the token of each (any, where it does not): both (N, 1)."""
    kept = (targets != ignore).unsqueeze(-1)
    return kept, targets.unsqueeze(-1).masked_fill(~kept, 0)


def _chunks(rows: Tensor, width: int, times: int = 1) -> Iterator[slice]:
    """Slices of `rows` (N, …), each of at most `times` a chunk's logits, `width` to a row, or one row."""
    step = max(1, times * CHUNKS.get(rows.device.type, CHUNK) // width)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _row_losses(
    logits: Tensor, chosen: Tensor, kept: Tensor, smoothing: float = 0.0, gradient: Tensor | None = None
) -> Tensor:
    """Sum of the losses of some rows (n, V); their gradients, not yet divided by the count, go to `gradient`.

    The logarithm of the sum of exponentials comes from the largest probability, which is at least 1/V and
    loses nothing to rounding: one exponential per logit gives loss and gradient.
    """
    wide = logits.to(_wide_dtype(logits))
    probabilities = wide.softmax(-1)
    log_sum = wide.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
    expected = wide.gather(-1, chosen)
    if smoothing:
        expected = expected.lerp(wide.mean(-1, keepdim=True), smoothing)
    if gradient is not None:
        probabilities.scatter_add_(-1, chosen, torch.full_like(expected, smoothing - 1.0))
        if smoothing:
            probabilities -= smoothing / logits.shape[-1]
        torch.mul(probabilities, kept, out=gradient)
    return (log_sum - expected).mul_(kept).sum()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy(x @ weight.T, targets)` that holds a few rows of logits at a time, in the backward too.

    Each chunk's gradients are taken while its logits are at hand, so nothing is computed twice.

    Args:
        x: (…, C).
        weight: (V, C).
        targets: (…) int64, −100 does not count.

    Returns:
        Scalar, float32, nats a token.
    """
    if torch.is_autocast_enabled(x.device.type):  # what autocast would do to a linear layer
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), needs_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
        kept, chosen = _targets(targets, IGNORE)
        total = torch.zeros((), dtype=_wide_dtype(x), device=x.device)
        dx, dweight = (
            (torch.empty_like(x), torch.zeros_like(weight, dtype=total.dtype))
            if needs_gradient
            else (None, None)
        )
        for rows in _chunks(x, weight.shape[0], ADDED):
            logits = x[rows] @ weight.T  # (step, V)
            gradient = torch.empty_like(logits) if needs_gradient else None
            total += _row_losses(logits, chosen[rows], kept[rows], gradient=gradient)
            if needs_gradient:
                torch.mm(gradient, weight, out=dx[rows])
                dweight += gradient.T @ x[rows]
        ctx.save_for_backward(dx, dweight, kept.sum())
        return total / kept.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor):
        dx, dweight, count = ctx.saved_tensors
        share = outer / count
        return dx * share, dweight * share, None, None
