"""Optimisers and learning-rate schedules.

AdamW is PyTorch's own (Loshchilov & Hutter 2019); what is ours is which parameters decay. Muon (Jordan et al.
2024, "Muon: An optimizer for hidden layers in neural networks") is written out: momentum, then the nearest
semi-orthogonal matrix by a Newton–Schulz iteration. It departs from that description in two ways: matrices
of one shape are iterated as one batch (small ones otherwise cost more in calls than in arithmetic), and
the iteration's number format is a choice, since bfloat16 pays only where hardware multiplies it fast.

Schedules are pure functions of the step. `step` is the number of updates already made: 0 for the first one.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.training import sharding

if TYPE_CHECKING:
    from shared.training.trainer import TrainConfig

# Coefficients of the quintic x ↦ ax + bx³ + cx⁵ (Jordan et al. 2024): steep at 0, so that five rounds bring
# singular values from 0.002 up to about 1 (between 0.7 and 1.2: near enough for an update direction).
QUINTIC = (3.4445, -4.7750, 2.0315)
OUTPUT_LAYERS = ("lm_head", "head", "generator")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices and embeddings decay; biases and norm gains (1-D) do not.

    A parameter shared by two modules (tied embeddings) is listed once.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The 2-D weights that Muon is made for: all but embeddings and the output layer (tied or not)."""
    excluded = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in OUTPUT_LAYERS:
            excluded.update(id(parameter) for parameter in module.parameters())
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in excluded]


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrix UVᵀ of each M = USVᵀ, roughly: singular values end near 1.

    Args:
        matrices: (..., R, C).
        steps: rounds of the quintic Newton–Schulz iteration.
        dtype: number format of the iteration; bfloat16 is accurate enough for an update.

    Returns:
        (..., R, C) in `dtype`.
    """
    a, b, c = QUINTIC
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices  # iterate on the smaller Gram matrix
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = (x / norm.clamp_min(1e-7)).to(dtype)  # the Frobenius norm bounds the largest singular value
    multiply_add = torch.baddbmm if x.ndim == 3 else torch.addmm
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalised by Newton–Schulz, for the 2-D weights of hidden layers (Jordan et al. 2024).

    B ← μB + (1−μ)G;  O = orthogonalize((1−μ)G + μB);  W ← (1 − ηλ)W − η·√max(1, rows/columns)·O

    Args:
        params: matrices of shape (out, in); embeddings, gains, biases and the output layer belong to AdamW.
        lr: η, the step in units of spectral norm.
        momentum: μ of the Nesterov momentum.
        weight_decay: λ, decoupled.
        steps: Newton–Schulz rounds.
        dtype: number format of the iteration.

    Raises:
        ValueError: a parameter is not 2-D.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.steps, self.dtype = steps, dtype
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]
        if shapes:
            raise ValueError(f"Muon takes 2-D parameters only, got one of shape {shapes[0]}.")

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            buffers = [self._buffer(p) for p in params]
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            updates = self._orthogonal(torch._foreach_lerp(gradients, buffers, momentum))
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-lr)

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _orthogonal(self, updates: list[Tensor]) -> list[Tensor]:
        """Orthogonalise and scale; matrices of one shape (either way up) go through as one batch."""
        batches = defaultdict(list)
        for index, update in enumerate(updates):
            batches[tuple(sorted(update.shape))].append(index)
        result = list(updates)
        for indices in batches.values():
            wide = [u if u.size(0) <= u.size(1) else u.T for u in (updates[i] for i in indices)]
            stacked = orthogonalize(torch.stack(wide), self.steps, self.dtype).to(wide[0].dtype)
            for index, matrix in zip(indices, stacked.unbind(), strict=True):
                R, C = updates[index].shape
                result[index] = matrix if R <= C else matrix.T * math.sqrt(R / C)
        return result


class OptimizerPair:
    """Muon and AdamW stepped as one: Muon has the hidden matrices, AdamW everything else."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all optimisers, each with its own `lr`."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """One update of every parameter."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The optimisers' states, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


Optimizer = torch.optim.Optimizer | OptimizerPair


def build_optimizer(model: nn.Module, config: "TrainConfig") -> Optimizer:
    """AdamW over everything, or Muon for hidden matrices with AdamW for the rest, as `config.optimizer` says.

    Each group keeps its peak rate in `base_lr`; the trainer multiplies that by the schedule.
    """
    if config.optimizer == "adamw":
        optimizer: Optimizer = _adamw(parameter_groups(model, config.weight_decay), config)
    else:
        hidden = hidden_matrices(model)
        ids = {id(parameter) for parameter in hidden}
        groups = parameter_groups(model, config.weight_decay)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
        muon = Muon(
            hidden,
            config.muon_learning_rate,
            config.muon_momentum,
            config.weight_decay,
            config.muon_steps,
            config.torch_dtype,
        )
        rest = [group for group in groups if group["params"]]
        optimizer = OptimizerPair(muon, _adamw(rest, config)) if rest else muon
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def _adamw(groups: list[dict[str, Any]], config: "TrainConfig") -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups, config.learning_rate, betas=config.betas, eps=config.epsilon, fused=config.fused
    )


def warm_up(step: int, warmup_steps: int) -> float:
    """Linear from 1/(warmup_steps + 1) at step 0 to 1 at `warmup_steps`, then 1."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def cosine(step: int, steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Multiplier of the peak rate: linear warm-up, then half a cosine down to `min_ratio` at `steps`."""
    if step < warmup_steps:
        return warm_up(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, steps: int, warmup_steps: int, decay_steps: int, min_ratio: float = 0.0
) -> float:
    """Multiplier of the peak rate: warm-up, constant, then linear to `min_ratio` over the last `decay_steps`.

    Source: Hu et al. 2024 (MiniCPM), §4; the linear decay follows Hägele et al. 2024.
    """
    left = max(0, steps - step) / max(1, decay_steps)
    return warm_up(step, warmup_steps) * (min_ratio + (1 - min_ratio) * min(1.0, left))


def noam(step: int, d_model: int, warmup_steps: int) -> float:
    """Learning rate of Vaswani et al. 2017, §5.3, eq. 3: d_model^−½ · min(s^−½, s·warmup^−3⁄2), s = step + 1.

    Unlike the other schedules this is the rate itself. Its peak, at s = warmup_steps, is
    (d_model · warmup_steps)^−½.
    """
    s = step + 1
    return d_model**-0.5 * min(s**-0.5, s * max(1, warmup_steps) ** -1.5)


def build_schedule(config: "TrainConfig") -> Callable[[int], float]:
    """The multiplier of every group's peak rate as a function of the step, by `config.schedule`.

    "noam" is scaled so that its peak is 1: the paper's own rate is learning_rate = (d_model·warmup)^−½.
    """
    steps, warmup_steps, least = config.steps, config.warmup_steps, config.min_lr_ratio
    decay_steps = round(config.decay_fraction * steps)
    peak = noam(max(1, warmup_steps) - 1, 1, warmup_steps)
    return {
        "constant": lambda step: warm_up(step, warmup_steps),
        "cosine": lambda step: cosine(step, steps, warmup_steps, least),
        "wsd": lambda step: warmup_stable_decay(step, steps, warmup_steps, decay_steps, least),
        "noam": lambda step: noam(step, 1, warmup_steps) / peak,
    }[config.schedule]


def set_learning_rate(optimizer: Optimizer, multiplier: float) -> None:
    """Set every group's `lr` to its `base_lr` times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * multiplier


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their global L2 norm is at most `max_norm` (0: no limit).

    Returns:
        The norm before clipping, a 0-d tensor.
    """
    limit = max_norm if max_norm > 0 else math.inf
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and sharding.is_shard(gradients[0]):
        gradients = [sharding.local(gradient) for gradient in gradients]
        norm = sharding.global_norm(gradients)
    else:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if limit < math.inf:
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm
