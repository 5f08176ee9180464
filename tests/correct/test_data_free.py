"""Corrections from weights alone: what they match, per task and for all."""

import pytest
import torch
from _networks import convnet, images, mlp, vectors

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
