"""Accuracies, barriers and layer statistics against numbers computed otherwise."""

import pytest
import torch
from _networks import convnet, images, mlp, vectors

import nlm
from nlm.correct import default_points
from nlm.evaluate import (
    accuracy,
    ensemble_accuracy,
    layer_statistics,
    loss_barrier,
    normalized_accuracy,
)


def labelled(model, count: int = 90):
    x = vectors(count, 3)
    with torch.no_grad():
        return [(x[:50], model(x[:50]).argmax(1)), (x[50:], model(x[50:]).argmax(1))]


def test_accuracies():
    first, second = mlp(0), mlp(1)
    data = labelled(first)
    assert accuracy(first, data) == 1.0
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        right = (second(x).argmax(1) == y).float().mean()
        both = (second(x).softmax(1) + first(x).softmax(1)).argmax(1)
    assert accuracy(second, data) == pytest.approx(float(right))
    assert accuracy(second, data, max_samples=50) == pytest.approx(
        float((second(x[:50]).argmax(1) == y[:50]).float().mean())
    )
    assert ensemble_accuracy([first, second], data) == pytest.approx(
        float((both == y).float().mean())
    )


def test_normalised_accuracy():
    found = normalized_accuracy({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9})
    assert found == {"a": 0.5, "b": 1.0, "average": 0.75, "worst": 0.5}
    with pytest.raises(ValueError, match=r"an expert is right at times, got .* for a"):
        normalized_accuracy({"a": 0.4}, {"a": 0.0})
    with pytest.raises(ValueError, match="an expert's accuracy for every task"):
        normalized_accuracy({"a": 0.4}, {"b": 0.5})


def test_the_barrier_between_a_model_and_its_permuted_self():
    model = mlp()
    data = labelled(model)
    spec = nlm.trace(model, vectors(8))
    state = model.state_dict()
    moved = spec.apply(spec.random(0), state)
    curve = loss_barrier(model, state, moved, data, points=5)
    assert curve.positions == [0, 0.25, 0.5, 0.75, 1]
    assert curve.losses[0] == pytest.approx(curve.losses[-1], rel=1e-5)
    assert curve.barrier > 0.05 and max(curve.losses) == curve.losses[2]
    aligned = spec.apply(nlm.align(state, moved, spec).permutation, moved)
    assert abs(loss_barrier(model, state, aligned, data).barrier) < 1e-5
    with pytest.raises(ValueError, match="at least two points, got 1"):
        loss_barrier(model, state, moved, data, points=1)
    with pytest.raises(ValueError, match="the models have the same"):
        loss_barrier(model, state, mlp(width=8).state_dict(), data)


def test_layer_statistics_see_collapse_and_its_correction():
    own = {"a": convnet(1), "b": convnet(2)}
    model = convnet(0)
    model.load_state_dict(nlm.merge(own, method="linear"))
    x = [images(128)]
    points = default_points(model, lambda: model(x[0][:2]))
    same = layer_statistics(own["a"], own["a"], points, x)
    assert all(value == pytest.approx(1) for value in same.variance_ratio.values())
    assert all(value == pytest.approx(0) for value in same.relative_distance.values())
    plain = layer_statistics(model, own["a"], points, x)
    assert all(value < 0.9 for value in plain.variance_ratio.values())
    tact = nlm.Tact.fit(model, {"a": own["a"]}, {"a": x})
    fixed = layer_statistics(tact, own["a"], points, x, task="a")
    assert all(value == pytest.approx(1, abs=1e-3) for value in fixed.variance_ratio.values())
    folded = layer_statistics(tact.fold("a"), own["a"], points, x)
    for point in points:
        assert folded.relative_distance[point] == pytest.approx(
            fixed.relative_distance[point], rel=1e-3
        )


def test_bad_data():
    with pytest.raises(ValueError, match=r"a batch is \(inputs, labels\), got Tensor"):
        accuracy(mlp(), [vectors()])
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy(mlp(), [])
    with pytest.raises(ValueError, match="outputs are finite"):
        accuracy(mlp(), [(vectors() * float("nan"), torch.zeros(64).long())])
