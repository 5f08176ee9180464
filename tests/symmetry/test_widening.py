"""Widening: what can be made wider, where units are written, and what is refused and why."""

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from _structured import attention
from torch import Tensor, nn
from torch.nn import functional as F

import nlm
from nlm.symmetry import Widening
from nlm.symmetry.widening import kept_apart


def group_of(spec: nlm.PermutationSpec, name: str, dim: int = 0) -> str:
    """The group that stands on a dimension of an entry."""
    [group] = [group for group in spec.groups if (name, dim) in spec.carriers(group)]
    return group


def found(model: nn.Module, inputs: Tensor) -> tuple[nlm.PermutationSpec, Widening]:
    spec = nlm.trace(model, inputs)
    return spec, Widening.find(model, spec, inputs)


class Heads(nn.Module):
    """Attention that counts its heads itself, and a branch with a norm, on [n, t, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 4 * 5) for _ in range(3))
        self.out = nn.Linear(4 * 5, 6)
        self.up, self.norm, self.down = nn.Linear(6, 10), nn.RMSNorm(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, 5)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.down(self.norm(F.gelu(self.up(x))))


class Depthwise(nn.Module):
    """Depthwise convolutions, one with a multiplier, and one in groups that are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
        self.twice = nn.Conv2d(6, 12, 3, groups=6)
        self.back = nn.ConvTranspose2d(12, 12, 3, groups=12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depth(F.gelu(self.stem(x))))
        return self.head(F.relu(self.back(F.gelu(self.twice(x)))).mean((2, 3)))


def test_units_are_written_in_rows_biases_and_norms_and_read_in_columns():
    spec, widening = found(convnet(), images(8))
    assert not widening.refused and set(widening.written) == set(spec.groups)
    written = {place for places in widening.written.values() for place in places}
    norms = [(f"{n}.{e}", 0) for n in (1, 5) for e in ("weight", "bias", "running_mean")]
    rows = [(f"{n}.{e}", 0) for n in (0, 4, 8) for e in ("weight", "bias")]
    assert written == {*norms, *rows, ("1.running_var", 0), ("5.running_var", 0)}
    carried = {place for group in spec.groups for place in spec.carriers(group)}
    assert carried - written == {("4.weight", 1), ("8.weight", 1), ("10.weight", 1)}


def test_heads_are_widened_as_wholes_where_the_model_counts_them():
    model = Heads()
    spec, widening = found(model, torch.randn(5, 4, 6))
    heads = next(group for group, of in spec.free.items() if of.size == 4 and not of.parents)
    assert set(widening.written) == {heads}
    assert widening.written[heads] == {
        (f"{name}.{entry}", 0) for name in "qkv" for entry in ("weight", "bias")
    }
    inside = [group for group, of in spec.free.items() if of.parents]
    assert inside and all("go with them" in widening.refused[group] for group in inside)
    normed = group_of(spec, "norm.weight")
    assert "a norm, a softmax or a mean over them" in widening.refused[normed]


@pytest.mark.parametrize(("order", "fused"), [
    ("thirds", "s:3 x h:4 x s<d:5 | d:5 | e:5>"), ("heads", "h:4 x (d:5 + d:5 + e:5)"),
])  # fmt: skip
def test_a_fixed_number_of_heads_and_a_norm_are_refused(order, fused):
    model, spec, inputs = attention(order, fused)
    spec.verify(model, inputs)
    widening = Widening.find(model, spec, inputs)
    assert set(widening.written) == {"f"}
    assert "a norm, a softmax or a mean" in widening.refused["r"]
    why = "has other groups for each index" if order == "thirds" else "does not run with more"
    assert why in widening.refused["h"]


def test_depthwise_convolutions_get_more_groups():
    model = Depthwise()
    spec, widening = found(model, images(4))
    assert set(widening.written) == {g for g, of in spec.free.items() if not of.parents}
    assert not any(spec.groups[group].parents == () for group in widening.refused)
    group = group_of(spec, "depth.weight")
    units = {group: kept_apart(torch.tensor([True] * 2 + [False] * 4))}
    state = model.state_dict()
    wide = widening.resize(model, {**state, **widening.apply({0: state, 1: state}, units)}, units)
    assert [wide.depth.groups, wide.depth.in_channels, wide.depth.out_channels] == [8, 8, 8]
    assert [wide.twice.groups, wide.twice.in_channels, wide.twice.out_channels] == [8, 8, 16]
    assert wide.back.groups == 16 and wide.stem.out_channels == 8


def test_recurrent_units_are_refused_where_the_module_knows_their_number():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.cells(x)[0][:, -1])

    spec, widening = found(Recurrent(), torch.randn(5, 3, 4))
    assert spec.free and not widening.written
    assert all("does not run with more of its units" in why for why in widening.refused.values())


def test_experts_are_modules():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5)) for _ in range(3)
            )

        def forward(self, x):
            return sum(branch(x) for branch in self.branches)

    spec, widening = found(Branches(), torch.randn(6, 4))
    assert spec.stacks and not widening.written
    assert any("its units are modules: branches." in why for why in widening.refused.values())


def test_the_polynomial_of_the_parameters_counts_them():
    for model, inputs in ((convnet(), images(4)), (mlp(), vectors(4)), (Depthwise(), images(4))):
        _, widening = found(model, inputs)
        assert widening.growth({}) == 1.0
        units = {
            group: kept_apart(torch.arange(widening.spec.groups[group].size) < 3)
            for group in widening.written
        }
        state = model.state_dict()
        wide = widening.apply({0: state, 1: state}, units)
        names = dict(model.named_parameters())
        counts = [
            sum(tensor.numel() for name, tensor in each.items() if name in names)
            for each in ({**state, **wide}, state)
        ]
        assert widening.growth(units) == counts[0] / counts[1] > 1


def test_bad_units_are_named():
    model = mlp()
    spec, widening = found(model, vectors(8))
    group, size = next((group, of.size) for group, of in spec.groups.items())
    line = torch.arange(size)
    with pytest.raises(ValueError, match=r"can be widened are .*, got 'x' \(unknown\)"):
        widening.check({"x": line}, 2)
    with pytest.raises(ValueError, match=rf"int64 of shape \[2, {size}\], got torch.int64 of"):
        widening.check({group: line}, 2)
    with pytest.raises(ValueError, match=r"counted from 0 and each is some model's, got \[1, 2"):
        widening.check({group: torch.stack([line + 1, line + 1])}, 2)
    assert widening.check({group: torch.stack([line, line])}, 2) == {}
    spec.verified = None
    with pytest.raises(nlm.SymmetryError, match="proven before layers are widened"):
        Widening.find(model, spec, vectors(8))
