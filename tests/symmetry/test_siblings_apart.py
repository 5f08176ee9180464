"""Symmetry between modules: siblings that are told apart, and random mixtures."""

import random

import pytest
import torch
import torch.nn.functional as F
from symmetry.mixtures import (
    EXPERTS,
    HIDDEN,
    INPUT,
    WIDTH,
    Mixture,
    branches,
    expert,
    interchanged,
    several,
    softmax,
)
from torch import Tensor, nn

import nlm
from nlm.symmetry.discover import discover


def first_always(model: Mixture, x: Tensor) -> Tensor:
    return model.experts[0](x) + softmax(model, x)


def first_gate(model: Mixture, x: Tensor) -> Tensor:
    return softmax(model, x) + model.gates(x)[:, :1]


def first_row(model: Mixture, x: Tensor) -> Tensor:
    return softmax(model, x) * model.router.weight[0].sum()


def weighted(model: Mixture, x: Tensor) -> Tensor:
    return sum((i + 1) * each(x) for i, each in enumerate(model.experts))


def constant(model: Mixture, x: Tensor) -> Tensor:
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)
    return sum(factors[i] * each(x) for i, each in enumerate(model.experts))


def alphas(model: Mixture, x: Tensor) -> Tensor:
    for i, each in enumerate(model.experts):
        x = torch.add(x, each(x.detach()), alpha=i + 1)
    return x


def summed_up(model: Mixture, x: Tensor) -> Tensor:
    gates = model.router(x).cumsum(-1)
    return sum(gates[:, i : i + 1] * each(x) for i, each in enumerate(model.experts))


def ranked(model: Mixture, x: Tensor) -> Tensor:
    gates = model.router(x).sort(-1).values
    return sum(gates[:, i : i + 1] * each(x) for i, each in enumerate(model.experts))


def up_to(model: Mixture, x: Tensor) -> Tensor:
    chosen = model.router(x).argmax(-1)
    return sum((chosen <= i).unsqueeze(-1) * each(x) for i, each in enumerate(model.experts))


def next_gate(model: Mixture, x: Tensor) -> Tensor:
    gates = model.gates(x)
    shifted = sum(gates[:, (i + 1) % 4, None] * each(x) for i, each in enumerate(model.experts))
    return shifted + gates[:, :1]


def chain(model: Mixture, x: Tensor) -> Tensor:
    for each in model.experts:
        x = x + each(x)
    return x


def signs(model: Mixture, x: Tensor) -> Tensor:
    a, b, c, d = (each(x) for each in model.experts)
    return a - b + c - d


def neighbours(model: Mixture, x: Tensor) -> Tensor:
    results = [each(x) for each in model.experts]
    return sum(results[i] * results[(i + 1) % 4] for i in range(4))


def turned(model: Mixture, x: Tensor) -> Tensor:
    results = torch.stack([each(x) for each in model.experts])
    return (results * results.flip(0)).sum(0) + results.flip(0)[0]


def samples(model: Mixture, x: Tensor) -> Tensor:
    return torch.stack([each(x[i]) for i, each in enumerate(model.experts)]).sum(0)


def crossed(model: Mixture, x: Tensor) -> Tensor:
    gates = model.gates(x)
    pairs = enumerate(zip(model.experts, model.more, strict=True))
    return sum(gates[:, i, None] * e(x) + gates[:, 3 - i, None] * m(x) for i, (e, m) in pairs)


UNLIKE = {
    "first expert always": Mixture(first_always),
    "first gate": Mixture(first_gate),
    "first row of the router": Mixture(first_row),
    "weighted": Mixture(weighted),
    "constant factors": Mixture(constant),
    "alpha": Mixture(alphas),
    "gates summed up": Mixture(summed_up),
    "gates ranked": Mixture(ranked),
    "chosen up to": Mixture(up_to),
    "the next gate": Mixture(next_gate),
    "chain": Mixture(chain),
    "signs": Mixture(signs),
    "neighbours": Mixture(neighbours),
    "turned round": Mixture(turned),
    "a sample each": Mixture(samples),
    "gates in two orders": Mixture(crossed, more=several(expert)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_siblings_that_are_told_apart_stay(name: str) -> None:
    spec = discover(UNLIKE[name], (INPUT,), {})
    assert not spec.stacks
    assert spec.permutation_count > EXPERTS


def test_only_equal_siblings_that_share_nothing_are_interchangeable() -> None:
    model = Mixture(branches)
    model.experts[0] = expert(HIDDEN + 1)
    spec = nlm.trace(model, INPUT)
    assert interchanged(spec) == [3]
    model.experts[2] = model.experts[1]
    spec = nlm.trace(model, INPUT)
    assert interchanged(spec) == []


def test_grouped_gates_leave_the_groups() -> None:
    def grouped(model: Mixture, x: Tensor) -> Tensor:
        scores = model.router(x).view(-1, 2, 2)
        gates = (scores * torch.sigmoid(scores.sum(-1, keepdim=True))).view(-1, 4)
        return sum(gates[:, i : i + 1] * each(x) for i, each in enumerate(model.experts))

    spec = nlm.trace(Mixture(grouped), INPUT)
    assert str(spec.params["router.bias"][0]).count(":2") == 2
    assert spec.params["experts.*.0.bias"][0] == spec.params["router.bias"][0]
    assert spec.permutation_count == 1 + (1 + 2) + 4


@pytest.mark.parametrize("seed", range(24))
def test_random_mixtures(seed: int) -> None:
    """What is found holds, and is found where nothing tells the siblings apart."""
    draw = random.Random(seed)
    odd = draw.choice([None, None, "gate", "expert", "factor", "part"])
    inside = draw.choice(["plain", "gated", "normed", "twice"])
    closing = draw.choice(["sum", "stack", "cat", "largest", "product"])

    def mix(model: Mixture, x: Tensor) -> Tensor:
        gates = model.gates(x)
        results = []
        for i, each in enumerate(model.experts):
            gate = gates[:, (i * 3) % 4 if odd == "gate" else i].unsqueeze(-1)
            y = each(x)
            if inside == "gated":
                y = torch.sigmoid(y) * gate + x
            elif inside == "normed":
                y = F.layer_norm(gate * y, (WIDTH,))
            elif inside == "twice":
                y = y + each(y * gate)
            if odd == "factor" and i == 2:
                y = y * 1.5
            results.append(y * gate)
        if odd == "expert":
            results[1] = results[1] + model.experts[1](x)
        if closing == "sum":
            out = x + draw_sum(results)
        elif closing == "stack":
            out = torch.stack(results, 1).amax(1)
        elif closing == "cat":
            out = model.project(torch.cat(results, -1))
        elif closing == "largest":
            out = torch.maximum(
                torch.maximum(results[3], results[1]), torch.maximum(results[0], results[2])
            )
        else:
            out = (results[0] * results[1]) * (results[2] * results[3])
        return out + results[0] if odd == "part" else out

    def draw_sum(results: list[Tensor]) -> Tensor:
        order = random.Random(seed).sample(range(4), 4)
        return sum(results[i] for i in order)

    model = Mixture(mix, project=nn.Linear(4 * WIDTH, WIDTH))
    spec = discover(model, (INPUT,), {})
    assert interchanged(spec) == ([4] if odd is None else [])
    used = [group for group in spec.free if spec.carriers(group)]
    try:
        spec.restrict(used).verify(model, INPUT)
    except nlm.symmetry.VacuousError as error:  # a product of small numbers hides units
        spec.restrict(set(used) - set(error.groups)).verify(model, INPUT)
