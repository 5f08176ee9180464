"""Pool and select: whole networks from the units of two, what is left alone, and mistakes."""

import copy

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from gauge import _transformers as transformers
from torch import Tensor, nn

import nlm
from nlm.correct import Selection

ALL = {"ridge": 1e-9, "max_samples": None}


def convolutions(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 4, 7), nn.ReLU(), nn.Linear(7, 3),
    ).eval()  # fmt: skip


def through_a_flatten(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 7),
        nn.ReLU(), nn.Linear(7, 3),
    ).eval()  # fmt: skip


def two_transformers() -> dict[str, nn.Module]:
    """Two networks that have nothing to do with one another."""
    found = {}
    for seed, task in enumerate("ab"):
        torch.manual_seed(seed)
        network, _ = transformers.gpt()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
        found[task] = network.double().eval()
    return found


def words(count: int = 100) -> Tensor:
    return torch.randint(3, 40, (count, 12), generator=torch.Generator().manual_seed(0))


def logits(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return transformers.logits(network, x)


def mean_of(experts: dict[str, nn.Module]) -> nn.Module:
    mean = copy.deepcopy(next(iter(experts.values())))
    mean.load_state_dict(nlm.merge(experts, method="linear"))
    return mean


NETWORKS = {
    "mlp": (mlp, vectors(200), {"2"}),
    "convolutions": (convolutions, images(120), {"2"}),
    "flatten": (through_a_flatten, images(120), {"4"}),
    "gpt": (
        lambda: transformers.made(transformers.gpt)[0].eval(),
        words(),
        {f"blocks.{n}.{layer}" for n in range(2) for layer in ("o", "down")},
    ),
    "gpt2": (
        lambda: transformers.made(transformers.gpt2)[0].eval(),
        words(),
        {f"transformer.h.{n}.{layer}.c_proj" for n in range(2) for layer in ("attn", "mlp")},
    ),
    "grouped queries, rotated, gated": (
        lambda: transformers.made(transformers.llama)[0].eval(),
        words(),
        {
            f"model.layers.{n}.{layer}"
            for n in range(2)
            for layer in ("self_attn.o_proj", "mlp.down_proj")
        },
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_found_again_among_its_units_and_those_of_a_reordered_copy(name):
    build, x, selected = NETWORKS[name]
    first, second = build().double(), build().double()
    x = x.double() if x.is_floating_point() else x
    selection = Selection()
    nlm.refit(first, {"a": first}, [x[:20]], select=selection, max_samples=20)
    assert set(selection.kept) == selected
    spec = selection.spec
    inner = spec.restrict(group for group in spec.free if group not in selection.left)
    second.load_state_dict(inner.apply(inner.random(3), first.state_dict()))
    torch.testing.assert_close(logits(second, x), logits(first, x))
    own = {"a": first, "b": second}
    average = mean_of(own)
    bare = nlm.refit(average, own, [x], **ALL)
    chosen = nlm.refit(average, own, [x], select=selection, **ALL)
    errors = [(logits(each, x) - logits(first, x)).abs().max() for each in (chosen, bare)]
    assert errors[0] < 1e-4 * errors[1]


def halfway(network: nn.Module, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = network.blocks[0].register_forward_hook(lambda *args: found.append(args[2]))
    logits(network, x)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("layers", ["qkvo", ("up", "down")])
def test_units_are_never_worse_than_their_means(layers):
    own = two_transformers()
    average, x = mean_of(own), words(60)
    points = [f"blocks.0.{name}" for name in layers]
    if "o" in layers:  # what attention gives is what the block gives then
        for network in (average, *own.values()):
            nn.init.zeros_(network.blocks[0].down.weight)
            nn.init.zeros_(network.blocks[0].down.bias)
    target = sum(halfway(each, x) for each in own.values()) / 2
    errors = [
        (halfway(nlm.refit(average, own, [x], points=points, select=s, **ALL), x) - target)
        .square()
        .sum()
        for s in (True, False)
    ]
    assert errors[0] < errors[1]


def test_the_passes_do_not_matter():
    own = two_transformers()
    average, x = mean_of(own), words(60)
    spec = nlm.trace(average, x[:2])
    found = []
    for options in ({}, {"micro_batch": 17}, {"micro_batch": 40, "recompute": True}):
        selection = Selection(spec)
        fitted = nlm.refit(average, own, [x], select=selection, **options)
        found.append((fitted.state_dict(), selection.kept))
    whole, kept = found[0]
    for other, also_kept in found[1:]:
        assert also_kept == kept
        for name, weight in whole.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-8, atol=1e-9)
    for units in kept.values():
        numbers = [number for each in units.values() for number in each]
        assert len(numbers) in (3, 48) and max(numbers) < len(numbers)


class Together(nn.Module):
    """Units that share a mean, units beside others, grouped channels, a norm behind."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 6)
        self.beside, self.third = nn.Linear(6, 10), nn.Linear(6, 10)
        self.fourth, self.fifth = nn.Linear(10, 7), nn.Linear(10, 7)
        self.norm, self.head = nn.BatchNorm1d(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).softmax(-1))
        x = self.fourth(self.beside(x).relu()) * self.fifth(self.third(x).tanh())
        return self.head(self.norm(x))


def test_what_is_left_alone_is_told():
    selection = Selection()
    model, own = Together().eval(), {"a": Together(1).eval(), "b": Together(2).eval()}
    nlm.refit(model, own, [vectors(60)], select=selection)
    groups = {
        name: group
        for group in selection.left
        for name, dim in selection.spec.carriers(group)
        if dim == 0
    }
    assert set(selection.kept) == {"beside, third"}
    reasons = {name: selection.left[groups[f"{name}.weight"]] for name in ("first", "third")}
    assert reasons["first"] == "its units depend on one another"
    assert reasons["third"] == "what makes it is no whole step: third"
    selection = Selection()
    nlm.refit(convnet(), {"a": convnet(1)}, [images(40)], select=selection)
    assert "1.weight is not refitted" in selection.left.values()


def test_mistakes():
    own = {"a": mlp(1), "b": mlp(2)}
    with pytest.raises(ValueError, match="on data for all experts, got data per task"):
        nlm.refit(mlp(), own, {task: [vectors()] for task in own}, select=True)
    with pytest.raises(ValueError, match=r"by a specification, got none: select=Selection\(spec\)"):
        nlm.refit(mlp(), own, [vectors()], select=True, forward=lambda model, x: model(x))
    spec = nlm.trace(mlp(), vectors(4))
    options = {"forward": lambda model, x: model(x), "select": Selection(spec)}
    given, traced = (
        nlm.refit(mlp(), own, [vectors()], **each) for each in (options, {"select": True})
    )
    assert all(map(torch.equal, given.state_dict().values(), traced.state_dict().values()))
