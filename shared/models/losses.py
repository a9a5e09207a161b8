"""Cross-entropy in float32, with label smoothing, without the copies that a large vocabulary makes dear.

Legend: N tokens, C width of the model, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target that does not count, as in PyTorch and transformers
CHUNK = 1 << 21  # logits held at once by `linear_cross_entropy`: 8 MB of float32


def cross_entropy(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = IGNORE
) -> Tensor:
    """Mean cross-entropy in nats a token, equal to `F.cross_entropy` and lighter by one copy of the logits.

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


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _CrossEntropy(torch.autograd.Function):
    """∂loss/∂logits = (softmax(logits) − target distribution) / count, in one buffer."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, smoothing: float, ignore: int) -> Tensor:
        wide, kept = _wide(logits), targets != ignore
        chosen = targets.masked_fill(~kept, 0).unsqueeze(-1)  # (N, 1)
        log_sum = wide.logsumexp(-1, keepdim=True)
        expected = wide.gather(-1, chosen)
        if smoothing:
            expected = expected.lerp(wide.mean(-1, keepdim=True), smoothing)
        count = kept.sum()
        ctx.save_for_backward(logits, log_sum, chosen, kept, count)
        ctx.smoothing = smoothing
        return (log_sum - expected).squeeze(-1).mul(kept).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        logits, log_sum, chosen, kept, count = ctx.saved_tensors
        share = (gradient / count * kept).unsqueeze(-1)  # (N, 1)
        return (
            _logit_gradient(_wide(logits) - log_sum, chosen, share, ctx.smoothing).to(logits.dtype),
            None,
            None,
            None,
        )


def _logit_gradient(log_probs: Tensor, chosen: Tensor, share: Tensor, smoothing: float = 0.0) -> Tensor:
    """share · (softmax − target distribution), written over `log_probs` (N, V)."""
    gradient = log_probs.exp_()
    if smoothing:
        gradient -= smoothing / gradient.shape[-1]
    gradient *= share
    return gradient.scatter_add_(-1, chosen, share * (smoothing - 1.0))


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
        kept = targets != IGNORE
        count = kept.sum()
        chosen, share = targets.masked_fill(~kept, 0).unsqueeze(-1), (kept / count).unsqueeze(-1)  # (N, 1)
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        dx, dweight = (
            (torch.empty_like(x), torch.zeros_like(weight, dtype=total.dtype))
            if needs_gradient
            else (None, None)
        )
        step = max(1, CHUNK // weight.shape[0])
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            logits = _wide(x[rows] @ weight.T)  # (step, V)
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += ((log_sum - logits.gather(-1, chosen[rows])) * share[rows]).sum()
            if needs_gradient:
                gradient = _logit_gradient(
                    logits.sub_(log_sum), chosen[rows], share[rows].to(logits.dtype)
                ).to(x.dtype)
                torch.mm(gradient, weight, out=dx[rows])
                dweight += gradient.T @ x[rows]
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        dx, dweight = ctx.saved_tensors
        return dx * gradient, dweight * gradient, None, None
