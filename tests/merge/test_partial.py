"""Partial merging: exact where nothing or everything is merged, and closer with every unit kept."""

import copy

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import Tensor, nn
from torch.nn import functional as F

import nlm
from nlm.merge import merge_partial
from nlm.symmetry import Widening


class Attention(nn.Module):
    """Heads of five units on [n, t, 6], as many as its weights have."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v = (nn.Linear(6, 4 * 5) for _ in range(3))
        self.out, self.head = nn.Linear(4 * 5, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, 5)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.gelu(self.out(mixed)))


def sequences(count: int = 8) -> Tensor:
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(0))


CASES = {
    "mlp": (mlp, vectors, "4"),
    "convnet": (convnet, images, "10"),
    "attention": (Attention, sequences, "head"),
}


def pair(case: str) -> tuple[dict[str, nn.Module], Widening, Tensor]:
    """Two models of one architecture in float64, and what can be widened in them."""
    build, inputs, _ = CASES[case]
    models = {task: build(seed).double() for seed, task in enumerate("ab")}
    spec = nlm.trace(models["a"], inputs(8).double())
    return models, Widening.find(models["a"], spec, inputs(8).double()), inputs(32).double()


def split(widening: Widening, share: float, models: int = 2) -> dict[str, Tensor]:
    """Units of which a share is merged, the first ones."""
    units = {}
    for group in widening.written:
        size = widening.spec.groups[group].size
        lines, merged = [torch.arange(size)], round(share * size)
        for number in range(1, models):
            line = torch.arange(size) + number * (size - merged)
            lines.append(torch.where(torch.arange(size) < merged, torch.arange(size), line))
        units[group] = torch.stack(lines)
    return units


@pytest.mark.parametrize("case", CASES)
def test_nothing_merged_is_both_models_side_by_side(case):
    models, widening, x = pair(case)
    units, (*_, head) = split(widening, 0.0), CASES[case]
    apart = merge_partial(models, widening, units, heads=head)
    mean = merge_partial(models, widening, units)
    with torch.no_grad():
        outputs = {task: model(x) for task, model in models.items()}
        for task, expected in outputs.items():
            torch.testing.assert_close(apart(x, task=task), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                mean(x, task=task), (outputs["a"] + outputs["b"]) / 2, rtol=1e-12, atol=1e-12
            )
            plain = apart.for_task(task)
            torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_head", [False, True])
def test_everything_merged_is_the_ordinary_merge_to_the_bit(case, with_head):
    models, widening, _ = pair(case)
    heads = (CASES[case][2],) if with_head else ()
    found = merge_partial(models, widening, split(widening, 1.0), heads=heads)
    expected = nlm.merge(models, method="linear", heads=heads)
    for task in models:
        state = expected.for_task(task)
        assert all(torch.equal(t, state[n]) for n, t in found.for_task(task).state_dict().items())
    # the formula of partial merging says the same where it is asked for all entries
    states = {number: model.state_dict() for number, model in enumerate(models.values())}
    everything = nlm.merge(models, method="linear")
    for name, tensor in widening.apply(states, split(widening, 1.0)).items():
        assert torch.equal(tensor, everything[name])


def test_a_unit_that_models_share_reads_both_and_one_of_its_own_reads_its_own():
    """Three hidden units of [x, y]; the first is shared."""

    def build(rows: list[list[float]], columns: list[float]) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(rows))
            model[2].weight.copy_(torch.tensor([columns]))
        return model

    a = build([[1.0, 2], [3, 4], [5, 6]], [1.0, 2, 3])
    b = build([[3.0, 0], [7, 8], [9, 10]], [5.0, 6, 7])
    spec = nlm.trace(a, torch.randn(8, 2))
    widening = Widening.find(a, spec, torch.randn(8, 2))
    [group] = widening.written
    units = {group: torch.tensor([[0, 1, 2], [0, 3, 4]])}
    state = merge_partial({"a": a, "b": b}, widening, units).for_task("a").state_dict()
    assert state["0.weight"].tolist() == [[2, 1], [3, 4], [5, 6], [7, 8], [9, 10]]
    assert state["2.weight"].tolist() == [[3, 1, 1.5, 3, 3.5]]
    own = merge_partial({"a": a, "b": b}, widening, units, heads="2")
    assert own.for_task("a")[2].weight.tolist() == [[1, 2, 3, 0, 0]]
    assert own.for_task("b")[2].weight.tolist() == [[5, 0, 0, 6, 7]]


@pytest.mark.parametrize("case", CASES)
def test_the_more_is_kept_apart_the_closer_the_outputs(case):
    models, widening, x = pair(case)
    models["b"].load_state_dict(models["a"].state_dict())
    with torch.no_grad():
        for parameter in models["b"].parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape)
    distances = []
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        model = merge_partial(models, widening, split(widening, share), heads=CASES[case][2])
        with torch.no_grad():
            distances.append(
                max(float((model(x, task=t) - m(x)).norm()) for t, m in models.items())
            )
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-10 < distances[-2]


def test_three_models_and_heads_of_other_sizes():
    models = {task: mlp(seed, classes=seed + 3).double() for seed, task in enumerate("abc")}
    x = vectors(16).double()
    spec = nlm.trace(models["a"], x)
    widening = Widening.find(models["a"], spec, x)
    apart = merge_partial(models, widening, split(widening, 0.0, 3), heads="4")
    with torch.no_grad():
        for task, model in models.items():
            torch.testing.assert_close(apart(x, task=task), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_copies_within_a_model_merge_without_loss(case):
    build, inputs, _ = CASES[case]
    narrow, x = build().double(), inputs(16).double()
    spec = nlm.trace(narrow, x[:8])
    widening = Widening.find(narrow, spec, x[:8])
    state, units = narrow.state_dict(), {}
    for group in widening.written:
        size = spec.groups[group].size
        units[group] = torch.stack([torch.arange(size), torch.arange(size) + size])
    doubled = {**state, **widening.apply({0: state, 1: state}, units)}
    wide = widening.resize(narrow, doubled, units)
    wide_spec = nlm.trace(wide, x[:8])
    in_wide = Widening.find(wide, wide_spec, x[:8])
    back = {
        group: torch.arange(size)[None] % (size // 2)
        for group in in_wide.written
        for size in [wide_spec.groups[group].size]
    }
    small = merge_partial({"a": wide}, in_wide, back).for_task("a")
    assert {n: t.shape for n, t in small.state_dict().items()} == {
        n: t.shape for n, t in state.items()
    }
    with torch.no_grad():
        torch.testing.assert_close(wide(x), narrow(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(small(x), narrow(x), rtol=1e-12, atol=1e-12)


def test_models_are_left_alone_and_other_shapes_are_named():
    models, widening, _ = pair("mlp")
    before = copy.deepcopy(models["a"].state_dict())
    merged = merge_partial(models, widening, split(widening, 0.5))
    for tensor in merged.states.tensors().values():
        tensor.zero_()
    assert all(torch.equal(t, before[n]) for n, t in models["a"].state_dict().items())
    with pytest.raises(ValueError, match="must have the shape of its layout"):
        merge_partial({"a": models["a"], "b": mlp(1, width=20)}, widening, {})
