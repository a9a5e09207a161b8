"""Muon against PyTorch's and against the SVD, who decays, and the schedules against their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shared.training.optimization import (
    Muon,
    OptimizerPair,
    build_optimizer,
    build_schedule,
    clip_gradients,
    cosine,
    hidden_matrices,
    noam,
    orthogonalize,
    parameter_groups,
    set_learning_rate,
    warmup_stable_decay,
)
from shared.training.trainer import TrainConfig

SHAPES = [(8, 8), (8, 24), (24, 8), (8, 24), (5, 7)]


class Model(nn.Module):
    """Tied embeddings, biases, a norm and two hidden matrices of different shape."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.norm(self.down(torch.relu(self.up(self.embedding(ids))))))


def model_with_gradients(seed=0):
    torch.manual_seed(seed)
    model = Model()
    model(torch.arange(20)).square().mean().backward()
    return model


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return parameters, generator


def test_only_matrices_decay_and_tied_weights_are_listed_once():
    model = Model()
    decayed, not_decayed = parameter_groups(model, 0.1)
    assert {id(p) for p in decayed["params"]} == {
        id(p) for p in (model.embedding.weight, model.up.weight, model.down.weight)
    }
    assert {id(p) for p in not_decayed["params"]} == {
        id(p) for p in (model.up.bias, model.norm.weight, model.norm.bias)
    }
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.1, 0.0)


def test_muon_gets_hidden_matrices_and_neither_embeddings_nor_head():
    model = Model()
    assert [id(p) for p in hidden_matrices(model)] == [id(model.up.weight), id(model.down.weight)]
    optimizer = build_optimizer(model, TrainConfig(steps=1, optimizer="muon"))
    assert isinstance(optimizer, OptimizerPair)
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("shape", [(6, 6), (4, 16), (16, 4), (3, 4, 16)])
def test_the_iteration_finds_the_orthogonal_factor_of_the_svd(shape):
    u, s, vh = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(3)), full_matrices=False
    )
    s = torch.linspace(1.0, 0.01, s.size(-1)).expand_as(s)  # far from orthogonal
    got = orthogonalize(u @ torch.diag_embed(s) @ vh)
    # The quintic leaves singular values between 0.68 and 1.21, in the SVD's own directions.
    values = (u.mT @ got @ vh.mT).diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(u @ torch.diag_embed(values) @ vh, got, rtol=0, atol=1e-4)


def test_the_iteration_in_bfloat16_is_close_to_the_one_in_float32():
    matrix = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    exact, rough = orthogonalize(matrix), orthogonalize(matrix, dtype=torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.05


def test_a_zero_gradient_gives_a_zero_update():
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_muon_takes_the_same_steps_as_pytorchs():
    (ours, generator), (theirs, _), (others, _) = matrices(), matrices(), matrices()
    start = [p.detach().clone() for p in ours]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    optimizers = (Muon(ours, **options), torch.optim.Muon(theirs, **options))
    optimizers += (Muon(others, **options | {"momentum": 0.5}),)
    for _ in range(4):
        for a, b, c in zip(ours, theirs, others, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad, c.grad = a.grad.clone(), a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c, first in zip(ours, theirs, others, start, strict=True):
        moved = (b - first).norm()
        assert (a - b).norm() < 0.03 * moved  # bfloat16 rounds batched and single products differently
        assert (c - b).norm() > 0.06 * moved  # another momentum is told apart


def test_muons_update_is_the_svds_up_to_the_spread_of_the_singular_values():
    parameters, generator = matrices()
    start = [p.detach().clone() for p in parameters]
    gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    Muon(parameters, lr=1.0, momentum=0.9, dtype=torch.float32).step()
    for parameter, first, gradient in zip(parameters, start, gradients, strict=True):
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        R, C = gradient.shape
        reference = -math.sqrt(max(1.0, R / C)) * (u @ vh)
        update = parameter.detach() - first
        cosine_similarity = (update * reference).sum() / (update.norm() * reference.norm())
        assert cosine_similarity > 0.97
        unlike = (-gradient * reference).sum() / (gradient.norm() * reference.norm())
        assert cosine_similarity > unlike  # the gradient as it is
        assert 0.65 < update.norm() / reference.norm() < 1.25


def test_muon_refuses_what_is_not_a_matrix():
    with pytest.raises(ValueError, match="2-D"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_muons_state_survives_a_round_trip():
    first, second = model_with_gradients(), model_with_gradients()
    config = TrainConfig(steps=9, optimizer="muon")
    a, b = build_optimizer(first, config), build_optimizer(second, config)
    a.step()
    b.step()
    c = build_optimizer(second, config)
    c.load_state_dict(b.state_dict())
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        p.grad, q.grad = p.grad.flip(0), q.grad.flip(0)  # the same again would not need the state
    a.step()
    c.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_decays_by_the_rate_times_the_decay(fused):
    model = Model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight, gain = model.up.weight.detach().clone(), model.norm.weight.detach().clone()
    build_optimizer(model, TrainConfig(steps=1, learning_rate=0.5, weight_decay=0.1, fused=fused)).step()
    torch.testing.assert_close(model.up.weight, weight * 0.95)
    assert torch.equal(model.norm.weight, gain)


@pytest.mark.parametrize("limit", [0.01, 1e6, 0.0])
def test_clipping_equals_pytorchs(limit):
    ours, theirs = model_with_gradients(), model_with_gradients()
    norm = clip_gradients(list(ours.parameters()), limit)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf)
    torch.testing.assert_close(norm, expected)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


def test_noam_is_the_papers_formula():
    d, warmup = 512, 4000
    for s in (1, 100, 4000, 4001, 100_000):
        expected = d**-0.5 * min(s**-0.5, s * warmup**-1.5)
        assert noam(s - 1, d, warmup) == pytest.approx(expected, rel=1e-12)
    assert max(range(10_000), key=lambda step: noam(step, d, warmup)) == warmup - 1
    assert noam(warmup - 1, d, warmup) == pytest.approx((d * warmup) ** -0.5)


def test_cosine_passes_through_its_landmarks():
    def at(step):
        return cosine(step, steps=2000, warmup_steps=100, min_ratio=0.1)

    assert at(0) == pytest.approx(1 / 101)
    assert at(99) == pytest.approx(100 / 101)
    assert at(100) == 1.0
    assert at(1050) == pytest.approx(0.55)  # halfway
    assert at(2000) == pytest.approx(0.1)
    assert at(5000) == pytest.approx(0.1)


def test_warmup_stable_decay_has_three_parts():
    values = [warmup_stable_decay(s, 100, 10, 20, 0.0) for s in range(101)]
    assert values[0] == pytest.approx(1 / 11)
    assert values[10:81] == [1.0] * 71
    assert values[90] == pytest.approx(0.5)
    assert values[100] == 0.0


@given(
    schedule=st.sampled_from(["constant", "cosine", "wsd", "noam"]),
    steps=st.integers(1, 500),
    warmup=st.integers(0, 600),
    least=st.floats(0, 1),
)
def test_every_schedule_stays_between_nothing_and_the_peak(schedule, steps, warmup, least):
    config = TrainConfig(steps=steps, schedule=schedule, warmup_steps=warmup, min_lr_ratio=least)
    multiplier = build_schedule(config)
    assert all(0.0 <= multiplier(step) <= 1.0 + 1e-9 for step in range(steps))


def test_the_schedule_scales_every_group_from_its_own_peak():
    model = Model()
    optimizer = build_optimizer(
        model, TrainConfig(steps=1, optimizer="muon", learning_rate=0.004, muon_learning_rate=0.05)
    )
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.002, 0.002]
    set_learning_rate(optimizer, 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.004, 0.004]
