"""Matching on a loss: implicit gradients are right, and planted permutations come back."""

import pytest
import torch
from _networks import mlp, vectors
from _structured import STRUCTURED
from torch.func import functional_call

import nlm
from nlm.align.learned import sinkhorn, sinkhorn_matching, straight_through_matching


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (2, 2, 3, 3), (0, 3, 3)])
def test_sinkhorn_is_doubly_stochastic_and_its_gradient_is_right(shape):
    torch.manual_seed(0)
    scores = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plan = sinkhorn(scores)
    for dim in (-1, -2):
        torch.testing.assert_close(plan.sum(dim), torch.ones(shape[:-1], dtype=torch.float64))
    shift = plan.log() - scores  # a row's number and a column's
    torch.testing.assert_close(
        shift - shift[..., :1, :], (shift - shift[..., :1, :])[..., :1].expand(shape)
    )
    assert torch.autograd.gradcheck(sinkhorn, scores)


def test_the_implicit_gradient_is_that_of_the_iterations():
    torch.manual_seed(1)
    scores, gradient = torch.randn(2, 6, 6, dtype=torch.float64)
    scores.requires_grad_()
    implicit = torch.autograd.grad(sinkhorn(scores), scores, gradient)[0]
    plan = scores
    for _ in range(200):
        plan = plan - plan.logsumexp(-2, keepdim=True)
        plan = plan - plan.logsumexp(-1, keepdim=True)
    unrolled = torch.autograd.grad(plan.exp(), scores, gradient)[0]
    torch.testing.assert_close(implicit, unrolled, rtol=1e-10, atol=1e-12)


def test_the_gradient_stays_finite_where_the_plan_is_a_permutation():
    scores = (100 * torch.eye(5)).requires_grad_()
    [gradient] = torch.autograd.grad(sinkhorn(scores), scores, torch.randn(5, 5))
    assert gradient.abs().max() < 1e-6


def distance(first):
    """Of the mean from A: a quarter of that of B from A."""

    def loss(state):
        return sum((state[name] - tensor).square().sum() for name, tensor in first.items())

    return loss


@pytest.mark.parametrize("match", [straight_through_matching, sinkhorn_matching])
@pytest.mark.parametrize("case", ["mlp", "attention, fused as a sum", "experts"])
def test_planted_permutations_come_back(case, match):
    torch.manual_seed(0)
    if case == "mlp":
        model = mlp()
        spec = nlm.trace(model, vectors(8))
    else:
        model, spec, inputs = STRUCTURED[case]()
        spec.verify(model.eval(), inputs[:4])
    first = model.state_dict()
    planted = spec.random(1)
    noisy = {name: t + 0.05 * t.std() * torch.randn_like(t) for name, t in first.items()}
    other = spec.apply(planted, noisy)
    seen = []
    result = match(
        first, other, spec, distance(first), steps=30, progress=lambda *of: seen.append(of)
    )
    whole = spec.compose(planted, result.permutation)
    assert all(torch.equal(whole[group], still) for group, still in spec.identity().items())
    assert seen == list(enumerate(result.report.objective, 1))
    assert min(result.report.correlation.values()) > 0.9


@pytest.mark.parametrize("match", [straight_through_matching, sinkhorn_matching])
def test_a_loss_on_data_ends_no_higher_than_it_starts(match):
    models = [mlp(seed) for seed in range(2)]
    spec = nlm.trace(models[0], vectors(8))
    inputs = vectors(256, 3)
    targets = models[0](inputs).argmax(1)
    generator = torch.Generator().manual_seed(0)

    def on(rows):
        return lambda state: torch.nn.functional.cross_entropy(
            functional_call(models[0], state, inputs[rows]), targets[rows]
        )

    def batch(state):
        return on(torch.randint(256, (64,), generator=generator))(state)

    first, other = (model.state_dict() for model in models)
    rate = 0.5 if match is straight_through_matching else 0.1
    result = match(first, other, spec, batch, rate=on(slice(None)), steps=30, learning_rate=rate)
    ratings = result.report.objective
    moved = spec.apply(result.permutation, other)
    middle = {name: (tensor + moved[name]) / 2 for name, tensor in first.items()}
    assert float(on(slice(None))(middle)) == pytest.approx(min(ratings), rel=1e-6)
    assert min(ratings) < ratings[0] and len(ratings) == 30
    assert all(torch.equal(tensor, first[name]) for name, tensor in models[0].state_dict().items())


@pytest.mark.parametrize("match", [straight_through_matching, sinkhorn_matching])
def test_what_is_refused(match):
    first, other = mlp(0).state_dict(), mlp(1).state_dict()
    spec = nlm.trace(mlp(0), vectors(8))
    with pytest.raises(ValueError, match="there is at least one step, got 0"):
        match(first, other, spec, distance(first), steps=0)
    spec.verified = None
    with pytest.raises(nlm.SymmetryError, match="got one that is not verified"):
        match(first, other, spec, distance(first))
