"""Corrections from weights alone: what they match, per task and for all."""

import copy

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

import nlm
from nlm.correct import DataFree
from nlm.statistics import collect_moments


def averaged(own, build):
    model = build(0)
    model.load_state_dict(nlm.merge(own, method="linear"))
    return model


@pytest.mark.parametrize("build", [mlp, convnet])
def test_rows_are_as_long_as_the_experts(build):
    own = {"a": build(1), "b": build(2)}
    fixed = DataFree.fit(averaged(own, build), own)
    for task, expert in own.items():
        plain = fixed.fold(task)
        for point in fixed.points:
            found, aim = (network.get_submodule(point) for network in (plain, expert))
            lengths = [layer.weight.flatten(1).norm(dim=1) for layer in (found, aim)]
            torch.testing.assert_close(*lengths)
            torch.testing.assert_close(found.bias, aim.bias)
    x = vectors(5) if build is mlp else images(5)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), fixed(x, task="b"), rtol=1e-4, atol=1e-4)


def test_one_set_for_all_tasks():
    own = {"a": mlp(1), "b": mlp(2)}
    model = averaged(own, mlp)
    apart, shared = DataFree.fit(model, own), DataFree.fit(model, own, shared=True)
    assert set(shared.rows.values()) == {0} and shared.points == apart.points
    for one, both in zip(shared.correction("2"), apart.correction("2"), strict=True):
        torch.testing.assert_close(one[0], both.mean(0))
    assert torch.equal(shared(vectors(4)), shared(vectors(4), task="b"))


def test_the_collapse_on_data_is_undone_in_part():
    own = {"a": mlp(1), "b": mlp(2)}
    model = averaged(own, mlp)
    fixed = DataFree.fit(model, own).fold("a")
    aim, before, after = (
        collect_moments(net, {"2": -1}, [vectors(256)])["2"].variance.log().mean()
        for net in (own["a"], model, fixed)
    )
    assert abs(after - aim) < 0.5 * abs(before - aim)


def test_heads_dead_rows_and_bad_points():
    own = {"a": mlp(1, classes=5), "b": mlp(2, classes=7)}
    for expert in own.values():
        expert[0].weight.data[3] = 0
    model = nlm.merge(own, method="linear", heads=("4",)).model(own["a"])
    fixed = DataFree.fit(model, own)
    assert list(fixed.points) == ["0", "2"]
    scale, shift = fixed.correction("0")
    assert (scale[:, 3] == 1).all() and torch.isfinite(shift).all()
    plain = mlp(0)
    for experts, points, message in [
        ({}, None, "at least one expert and one point, got 0 and 3"),
        ({"a": mlp(1)}, ["1"], "a linear or convolution module, got ReLU and ReLU at '1'"),
        ({"a": mlp(1, width=9)}, ["0"], "the merged model's channels, got 9 and 24 at '0'"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataFree.fit(plain, experts, points=points)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.l, self.o = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.at = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.i(x.transpose(0, 1)))
        h = self.l(h + self.at(h, h, h, need_weights=False)[0])
        return self.o(torch.relu(h)).mean(0)


def test_ids_are_those_of_samples_and_an_attention_is_left_alone():
    torch.manual_seed(0)
    one, two = SequenceFirst().eval(), SequenceFirst().eval()
    merged = copy.deepcopy(one)
    merged.load_state_dict(nlm.merge({"a": one, "b": two}, method="linear"))
    x, ids = torch.randn(8, 8, 4), torch.arange(8) % 2
    experts = {"A": one, "B": two}
    free = DataFree.fit(merged, experts)
    tact = nlm.Tact.fit(
        merged, experts, {"A": [torch.randn(32, 32, 4)], "B": [torch.rand(9, 9, 4)]}
    )
    assert "at.out_proj" not in free.points
    for model in (free, tact):
        single = torch.cat([model(x[i : i + 1], task=int(ids[i])) for i in range(8)])
        assert torch.allclose(model(x, task=ids), single, atol=1e-6)
    assert torch.allclose(free.fold("A")(x), free(x, task="A"), atol=1e-6)
