"""Symmetry between modules: which siblings are interchangeable, and specifications with stacks."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nlm
from nlm.symmetry import AxisGroup, PermutationSpec, SymmetryError, parse
from nlm.symmetry.discover import discover

WIDTH, HIDDEN, EXPERTS = 8, 6, 4


def expert(hidden: int = HIDDEN) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH))


class Mixture(nn.Module):
    """``leave(x + mix(self, x))`` with x = enter(inputs), experts, a router and further modules."""

    def __init__(self, mix: Callable[["Mixture", Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(5, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        for name, module in more.items():
            self.add_module(name, module)
        self.leave = nn.Linear(WIDTH, 3)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        return self.leave(x + self.mix(self, x))

    def gates(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1)


def several(make: Callable[[], nn.Module], count: int = EXPERTS) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(count))


INPUT = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


def interchanged(spec: PermutationSpec) -> list[int]:
    """How many modules may be exchanged for one another, for each of their groups."""
    first = dict.fromkeys(spec.params[name][0] for name in spec.stacks)
    return [layout.size for layout in first if str(layout).startswith("g")]


# --- siblings that are alike ----------------------------------------------------------------------


def softmax(model: Mixture, x: Tensor) -> Tensor:
    gates = model.gates(x)
    return sum(gates[:, i : i + 1] * each(x) for i, each in enumerate(model.experts))


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


def branches(model: Mixture, x: Tensor) -> Tensor:
    return sum(each(x) for each in model.experts)


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


# --- siblings that are not ------------------------------------------------------------------------


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


# --- specifications with stacks -------------------------------------------------------------------


def written(**changes: list[str]) -> PermutationSpec:
    """A hand-written specification of the softmax mixture."""
    params = {
        "enter.weight": ["d:8", "5"],
        "enter.bias": ["d:8"],
        "router.weight": ["e:4", "d:8"],
        "router.bias": ["e:4"],
        "experts.*.0.weight": ["e:4", "f:6", "d:8"],
        "experts.*.0.bias": ["e:4", "f:6"],
        "experts.*.2.weight": ["e:4", "d:8", "f:6"],
        "experts.*.2.bias": ["e:4", "d:8"],
        "leave.weight": ["3", "d:8"],
        "leave.bias": ["3"],
    } | {name.replace("__", "."): layouts for name, layouts in changes.items()}
    groups = [AxisGroup("d", 8), AxisGroup("e", 4), AxisGroup("f", 6, ("e",))]
    stacks = {
        name: tuple(name.replace("*", str(i)) for i in range(4)) for name in params if "*" in name
    }
    layouts = {name: tuple(map(parse, dims)) for name, dims in params.items()}
    return PermutationSpec({group.id: group for group in groups}, layouts, stacks=stacks)


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_hand_written_stacks_are_proven_and_kept(tmp_path: Path, ending: str) -> None:
    spec = written()
    spec.verify(Mixture(softmax), INPUT)
    spec.save(tmp_path / f"spec.{ending}")
    read = PermutationSpec.load(tmp_path / f"spec.{ending}")
    assert read.proven
    assert read == spec
    assert "experts.*.0.weight" in read.show()


def test_a_wrong_stack_is_refuted() -> None:
    with pytest.raises(SymmetryError, match=r"'e'.*'router\.bias'"):
        written(router__bias=["4"]).verify(Mixture(softmax), INPUT)
    with pytest.raises(SymmetryError, match="'e'"):
        written().verify(Mixture(weighted), INPUT)


def test_applying_is_undone_by_the_inverse() -> None:
    spec, state = written(), Mixture(softmax).state_dict()
    permutation = spec.random(3)
    moved = spec.apply(permutation, state)
    back = spec.apply(spec.inverse(permutation), moved)
    assert not torch.equal(moved["experts.0.0.weight"], state["experts.0.0.weight"])
    assert all(torch.equal(back[name], state[name]) for name in state)
    places = {tensor.untyped_storage().data_ptr() for tensor in moved.values()}
    assert len(places) == len(moved)


def test_errors() -> None:
    spec, state = written(), Mixture(softmax).state_dict()
    with pytest.raises(ValueError, match=r"missing 'experts\.2\.0\.bias'"):
        spec.apply({}, {name: t for name, t in state.items() if name != "experts.2.0.bias"})
    with pytest.raises(ValueError, match=r"one shape, got \[6\] for .* \[7\]"):
        spec.apply({}, state | {"experts.2.0.bias": torch.zeros(7)})
    with pytest.raises(ValueError, match="two or more members"):
        PermutationSpec({}, {"w.*": (parse("1"),)}, stacks={"w.*": ("w.0",)})
    with pytest.raises(ValueError, match=r"no parameter beside it, got 'w\.1'"):
        PermutationSpec(
            {},
            {"w.*": (parse("2"),), "w.1": (parse("1"),)},
            stacks={"w.*": ("w.0", "w.1")},
        )
    with pytest.raises(ValueError, match="got a stack"):
        spec.to_axes_to_perm()
    model = Mixture(softmax)
    model.experts[1] = model.experts[0]
    with pytest.raises(SymmetryError, match="a member of a stack is not shared"):
        spec.verify(model, INPUT)


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_planted_experts_come_back(method: str) -> None:
    torch.manual_seed(0)
    model, other = Mixture(softmax), Mixture(softmax)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    spec = nlm.trace(model, INPUT)
    planted = spec.random(5)
    other.load_state_dict(spec.apply(planted, model.state_dict()))
    data = [torch.randn(256, 5)] if method == "activations" else None
    found = nlm.align(model, other, spec, method, data=data)
    undone = spec.compose(planted, found.permutation)
    assert all(torch.equal(undone[name], own) for name, own in spec.identity().items())
