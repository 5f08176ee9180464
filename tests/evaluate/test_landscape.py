"""Landscapes against places and values that are known or computed otherwise."""

import math

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

import nlm
from nlm.evaluate import Landscape, landscape, loss_landscape

U, V, W = torch.linalg.qr(torch.randn(7, 3, generator=torch.Generator().manual_seed(0))).Q.T


def state(vector: torch.Tensor, variance: float = 1.0, count: int = 5) -> dict[str, torch.Tensor]:
    return {
        "a.weight": vector[:4].reshape(2, 2).clone(),
        "b.bias": vector[4:].clone(),
        "norm.running_var": torch.full((2,), variance),
        "norm.num_batches_tracked": torch.tensor(count),
    }


ORIGIN = torch.arange(7.0)
STATES = {
    "start": state(ORIGIN, 1.0, 3),
    "first": state(ORIGIN + 4 * U, 2.0),
    "second": state(ORIGIN + 2 * U + 5 * V, 3.0),
    "merged": state(ORIGIN + U + 2 * V + 3 * W),
}


def test_a_quadratic_has_the_values_that_it_has() -> None:
    seen = []

    def measure(at: dict[str, torch.Tensor]) -> dict[str, float]:
        seen.append(at)
        away = torch.cat([at["a.weight"].flatten(), at["b.bias"]]) - ORIGIN
        return {"square": float(away @ away), "along": float(away @ U), "off": float(away @ W)}

    steps = []
    found = landscape(
        STATES, measure, points=5, margin=0.5, progress=lambda done, every: steps.append(done)
    )
    for name, place in {
        "start": (0, 0, 0), "first": (4, 0, 0), "second": (2, 5, 0), "merged": (1, 2, 3),
    }.items():  # fmt: skip
        assert found.models[name] == pytest.approx(place, abs=1e-5)
    assert found.x == pytest.approx([-2, 0, 2, 4, 6], abs=1e-5)
    assert found.y == pytest.approx([-2.5, 0, 2.5, 5, 7.5], abs=1e-5)
    for i, y in enumerate(found.y):
        for j, x in enumerate(found.x):
            assert found.values["square"][i][j] == pytest.approx(x**2 + y**2, abs=1e-3)
            assert found.values["along"][i][j] == pytest.approx(x, abs=1e-4)
            assert found.values["off"][i][j] == pytest.approx(0, abs=1e-4)
    assert steps == list(range(1, 26))
    for at in seen:
        assert 1 <= float(at["norm.running_var"].min()) <= float(at["norm.running_var"].max()) <= 3
        assert int(at["norm.num_batches_tracked"]) == 3
    torch.testing.assert_close(seen[6], STATES["start"], rtol=0, atol=1e-5)  # at (0, 0)


def test_batch_norm_is_estimated_anew_at_every_place() -> None:
    states = {name: convnet(seed).state_dict() for seed, name in enumerate("abc")}
    x = images(48)
    data = [(x, torch.arange(48) % 5)]
    network = convnet(7)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    options = {"points": 2, "margin": 0.1}
    plain = loss_landscape(network, states, data, **options)
    reset = loss_landscape(
        network, states, data, prepare=lambda model: nlm.reset_batch_norm(model, data), **options
    )
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    place = _by_hand(states, plain.x[1], plain.y[0])
    model = convnet(0)
    model.load_state_dict({**states["a"], **place}, strict=True)
    nlm.reset_batch_norm(model, data)
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(model(x), data[0][1]))
    assert reset.values["loss"][0][1] == pytest.approx(expected, rel=1e-4)
    assert plain.values["loss"][0][1] != pytest.approx(expected, rel=1e-3)


def _by_hand(states, x: float, y: float) -> dict[str, torch.Tensor]:
    """The weights at a place, by unit vectors of the whole weights."""
    names = [name for name, _ in convnet(0).named_parameters()]
    a, b, c = (torch.cat([s[n].double().flatten() for n in names]) for s in states.values())
    u = (b - a) / (b - a).norm()
    v = c - a - ((c - a) @ u) * u
    parts = (a + x * u + y * v / v.norm()).split([states["a"][n].numel() for n in names])
    shaped = zip(names, parts, strict=True)
    return {name: part.reshape(states["a"][name].shape).float() for name, part in shaped}


def test_bad_planes() -> None:
    def nothing(at: dict[str, torch.Tensor]) -> dict[str, float]:
        raise AssertionError("measured before the check")

    two = dict(list(STATES.items())[:2])
    with pytest.raises(ValueError, match="three models span a plane, got 2"):
        landscape(two, nothing)
    line = {**two, "mean": state(ORIGIN + 2 * U)}
    with pytest.raises(ValueError, match="not on a line, got 'start', 'first', 'mean'"):
        landscape(line, nothing)
    with pytest.raises(ValueError, match="not on a line"):
        landscape({**two, "first again": two["first"]}, nothing)
    for points, margin in ((1, 0.2), (3, -0.1), (3, math.nan)):
        with pytest.raises(ValueError, match=f"got {points} and {margin}"):
            landscape(STATES, nothing, points=points, margin=margin)
    with pytest.raises(ValueError, match="the models have the same entries"):
        landscape({**STATES, "other": {"a.weight": torch.ones(2, 2)}}, nothing)
    states = {name: mlp(seed).state_dict() for seed, name in enumerate("abc")}
    with pytest.raises(ValueError, match=r"entries of the network, got '1\.bias'"):
        loss_landscape(convnet(), states, [(images(), torch.zeros(32).long())])


def test_a_loss_is_that_of_its_model() -> None:
    states = {name: mlp(seed).state_dict() for seed, name in enumerate("abc")}
    data = [(vectors(30), torch.arange(30) % 5)]
    found = loss_landscape(mlp(9), states, data, points=3)
    assert isinstance(found, Landscape) and [len(row) for row in found.values["loss"]] == [3, 3, 3]
    reach = 0.25 * max(x for x, _, _ in found.models.values())
    assert found.x[0] == pytest.approx(-reach) and found.models["a"] == (0, 0, 0)
