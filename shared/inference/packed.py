"""Weights laid out for decoding on a CPU.

Decoding multiplies a few rows (one a sequence) by every weight matrix. For so few rows the general fp32
matrix product that `nn.Linear` calls on a CPU uses one core and reads the weights in a poor order. oneDNN's
kernel, given the weights in blocks of its own choosing, uses all cores: the same sums in another order, on
two free cores about twice as fast for one row and three to five times for eight. Rearranging costs about as
much as three to six steps, and the memory of a second copy of the matrices.
"""

import copy

import torch
from torch import Tensor, nn

SMALLEST = 1 << 18  # multiplications; up to here the kernel's own start-up (10 µs) costs more than it saves
FEWEST_TOKENS = 24  # new tokens for which rearranging the weights pays


class PackedLinear(nn.Module):
    """x·Wᵀ + b with W in oneDNN's blocked layout: (…, in) -> (…, out). Float32, CPU, no gradients.

    Args:
        linear: what to compute; its weights are copied into the new layout.
        rows: how many rows x usually has; the layout is chosen for it, other numbers work too.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        # PyTorch's compiler uses these two operators for the same purpose. The layout that oneDNN picks for
        # 16 rows suits a single one too: the one it picks for that is read up to a third slower.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), max(rows, 16))
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self._packed, self._bias, "none", [], "")


def can_pack(model: nn.Module) -> bool:
    """Is `model` in float32 on a CPU with oneDNN, outside autocast?"""
    weight = next(model.parameters())
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )


@torch.no_grad()
def pack(model: nn.Module, rows: int) -> nn.Module:
    """A copy of `model` for decoding, its larger matrices packed, everything else shared with the original.

    Later changes of the original's matrices do not reach the copy.

    Args:
        model: a GPT for which `can_pack` holds.
        rows: sequences decoded at a time.

    Returns:
        The copy, in evaluation mode; it computes no gradients.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared).eval()
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.weight.numel() * rows > SMALLEST:
                setattr(module, name, PackedLinear(child, rows))
    return packed
