"""Symmetry between modules: siblings that are interchangeable."""

import pytest
import torch
import torch.nn.functional as F
from symmetry.mixtures import (
    EXPERTS,
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


def unbound(model: Mixture, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for gate, each in zip(model.gates(x).unbind(-1), model.experts, strict=True):
        out += gate.unsqueeze(-1) * each(x)
    return out


def top_two(model: Mixture, x: Tensor) -> Tensor:
    weights, chosen = model.gates(x).topk(2)
    out = torch.zeros_like(x)
    for i, each in enumerate(model.experts):
        out = out + (weights * (chosen == i)).sum(-1, keepdim=True) * each(x)
    return out


def one_hot(model: Mixture, x: Tensor) -> Tensor:
    weights, chosen = model.gates(x).topk(2)
    masks = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    return sum(
        (weights * masks[i].t().to(x.dtype)).sum(-1, keepdim=True) * each(x)
        for i, each in enumerate(model.experts)
    )


def scattered(model: Mixture, x: Tensor) -> Tensor:
    weights, chosen = model.router(x).topk(2)
    full = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, chosen, weights.softmax(-1))
    return sum(full[:, i].unsqueeze(1) * each(x) for i, each in enumerate(model.experts))


def stacked(model: Mixture, x: Tensor) -> Tensor:
    results = torch.stack([each(x) for each in model.experts], 1)
    return torch.einsum("ne,ned->nd", model.gates(x), results)


def scaled_before(model: Mixture, x: Tensor) -> Tensor:
    gates = torch.sigmoid(model.router(x))
    return torch.stack([e(x * gates[:, i : i + 1]) for i, e in enumerate(model.experts)]).mean(0)


def with_shared(model: Mixture, x: Tensor) -> Tensor:
    return model.shared(x) + softmax(model, x)


def scored(model: Mixture, x: Tensor) -> Tensor:
    gates = torch.cat([score(x) for score in model.scores], -1).softmax(-1)
    return sum(gates[:, i : i + 1] * each(x) for i, each in enumerate(model.experts))


def two_lists(model: Mixture, x: Tensor) -> Tensor:
    return sum(last(each(x)) for last, each in zip(model.last, model.experts, strict=True))


def largest(model: Mixture, x: Tensor) -> Tensor:
    out = model.experts[0](x)
    for each in model.experts[1:]:
        out = torch.maximum(each(x), out)
    return out


def concatenated(model: Mixture, x: Tensor) -> Tensor:
    return model.project(torch.cat([x, *(each(x) for each in model.experts)], -1))


def chunks(model: Mixture, x: Tensor) -> Tensor:
    parts = model.widen(x).chunk(EXPERTS, -1)
    return sum(each(part) for each, part in zip(model.experts, parts, strict=True))


def attended(model: Mixture, x: Tensor) -> Tensor:
    results = torch.stack([each(x) for each in model.experts], 1)
    return ((results @ results.transpose(1, 2)).softmax(-1) @ results).sum(1)


def twice(model: Mixture, x: Tensor) -> Tensor:
    x = x + softmax(model, x)
    gates = model.second(x).softmax(-1)
    return sum(gates[:, i : i + 1] * each(x) for i, each in enumerate(model.more))


def one_router(model: Mixture, x: Tensor) -> Tensor:
    gates = model.gates(x)
    x = x + softmax(model, x)
    return sum(gates[:, i : i + 1] * each(x) for i, each in enumerate(model.more))


def named(model: Mixture, x: Tensor) -> Tensor:
    return model.branch1(x) + (model.branch2(x) + model.branch3(x))


def scaled_by_buffer(model: Mixture, x: Tensor) -> Tensor:
    return sum(model.scales.running_var[i] * each(x) for i, each in enumerate(model.experts))


ALIKE = {  # the modules that may be exchanged, and the number of permutations
    "softmax": (Mixture(softmax), [4], 1 + 1 + 4),
    "gates unbound": (Mixture(unbound), [4], 6),
    "top two, masks": (Mixture(top_two), [4], 6),
    "top two, one-hot": (Mixture(one_hot), [4], 6),
    "top two, scattered": (Mixture(scattered), [4], 6),
    "stacked results": (Mixture(stacked), [4], 6),
    "gates before": (Mixture(scaled_before), [4], 6),
    "a shared expert": (Mixture(with_shared, shared=expert()), [4], 7),
    "a score of each": (Mixture(scored, scores=several(lambda: nn.Linear(WIDTH, 1))), [4], 6),
    "branches": (Mixture(branches), [4], 6),
    "two lists": (Mixture(two_lists, last=several(lambda: nn.Linear(WIDTH, WIDTH))), [4], 10),
    "largest": (Mixture(largest), [4], 6),
    "concatenated": (Mixture(concatenated, project=nn.Linear(5 * WIDTH, WIDTH)), [4], 10),
    "chunks": (Mixture(chunks, widen=nn.Linear(WIDTH, 4 * WIDTH)), [4], 10),
    "attended": (Mixture(attended), [4], 6),
    "two layers": (
        Mixture(twice, second=nn.Linear(WIDTH, EXPERTS), more=several(expert)),
        [4, 4],
        11,
    ),
    "one router": (Mixture(one_router, more=several(expert)), [4], 10),
    "named": (Mixture(named, branch1=expert(), branch2=expert(), branch3=expert()), [3], 5),
    "buffer": (Mixture(scaled_by_buffer, scales=nn.BatchNorm1d(EXPERTS)), [4], 6),
}


@pytest.mark.parametrize("name", ALIKE)
def test_alike_siblings_are_interchangeable(name: str) -> None:
    model, sizes, permutations = ALIKE[name]
    spec = nlm.trace(model, INPUT)
    assert spec.proven
    assert not any("proof" in why for why in spec.pinned.values())
    assert interchanged(spec) == sizes
    assert spec.permutation_count == permutations


def test_an_expert_carries_its_units_and_its_gate_along() -> None:
    model = Mixture(softmax)
    spec = nlm.trace(model, INPUT)
    [group] = {str(spec.params[name][0]).partition(":")[0] for name in spec.stacks}
    order = torch.tensor([2, 0, 3, 1])
    state = model.state_dict()
    moved = spec.apply({group: order}, state)
    for new, old in enumerate(order.tolist()):
        for end in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert torch.equal(moved[f"experts.{new}.{end}"], state[f"experts.{old}.{end}"])
        assert torch.equal(moved["router.weight"][new], state["router.weight"][old])
    assert list(moved) == list(state)


class ResNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(several(self.branch, 3) for _ in range(2))
        self.head = nn.Linear(8, 5)

    @staticmethod
    def branch() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + sum(branch(x) for branch in block))
        return self.head(x.mean((2, 3)))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, size) for size in (3, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        return scores.masked_fill(future, -1e9).softmax(-1) @ self.value(x)


class Transformer(nn.Module):
    """Every head is a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, WIDTH)
        self.heads = nn.ModuleList(several(Head) for _ in range(2))
        self.project = several(lambda: nn.Linear(4 * 5, WIDTH), 2)
        self.logits = nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for heads, project in zip(self.heads, self.project, strict=True):
            x = x + project(torch.cat([head(x) for head in heads], -1))
        return self.logits(x)


def test_branches_of_convolutions_and_heads_that_are_modules() -> None:
    spec = nlm.trace(ResNeXt(), torch.randn(2, 3, 8, 8))
    assert interchanged(spec) == [3, 3]
    assert spec.permutation_count == 1 + 2 * (1 + 2 * 3)
    spec = nlm.trace(Transformer(), torch.randint(11, (2, 7)))
    assert interchanged(spec) == [4, 4]
    assert spec.permutation_count == 1 + 2 * (1 + 2 * 4)
