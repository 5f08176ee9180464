"""Accuracies, barriers and layer statistics against numbers computed otherwise."""

import math

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

import nlm
from nlm.correct import default_points
from nlm.evaluate import (
    BarrierCurve,
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
    with pytest.raises(ValueError, match="no task is called average or worst, got a, worst"):
        normalized_accuracy({"a": 0.4, "worst": 0.3}, {"a": 0.5, "worst": 0.5})


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
    x, y = vectors(8), torch.zeros(8).long()
    for score in (accuracy, loss):
        with pytest.raises(ValueError, match=r"a batch is \(inputs, labels\), got tuple of 3"):
            score(mlp(), [(x, y, y)])
        with pytest.raises(TypeError, match="labels are a tensor, got list"):
            score(mlp(), [(x, y.tolist())])
    with pytest.raises(ValueError, match=r"one label per row of outputs \[8, 5\], got .* \[8, 1\]"):
        accuracy(mlp(), [(x, y[:, None])])
    with pytest.raises(TypeError, match=r"labels are integers, got torch.float32"):
        accuracy(mlp(), [(x, y.float())])
    with pytest.raises(ValueError, match="at least one model, got none"):
        ensemble_accuracy([], [(x, y)])
    with pytest.raises(ValueError, match=r"the same classes, got outputs .* \[8, 5\], \[8, 7\]"):
        ensemble_accuracy([mlp(), mlp(classes=7)], [(x, y)])


def loss(model, data):
    state = model.state_dict()
    return loss_barrier(model, state, state, data, points=2).losses


def test_tokens_are_counted_one_by_one():
    model = mlp()
    x = vectors(24).reshape(6, 4, 12)
    with torch.no_grad():
        labels = model(x).argmax(-1)
    labels[0, 0] = (labels[0, 0] + 1) % 5
    assert accuracy(model, [(x, labels)]) == 23 / 24


def test_the_contract_of_forward():
    model = mlp()
    [(x, y), _] = labelled(model)
    seen = []

    def forward(network, batch):
        seen.append(batch)
        inputs, _ = batch
        return network(inputs["x"])

    data = [({"x": x}, y)]
    assert accuracy(model, data, forward=forward) == 1.0
    state = model.state_dict()
    found = loss_barrier(model, state, state, data, points=2, forward=forward).losses[0]
    with torch.no_grad():
        assert found == pytest.approx(float(nn.functional.cross_entropy(model(x), y)))
    same = layer_statistics(model, model, {"0": 1}, data, forward=forward)
    assert same.relative_distance == {"0": 0.0}
    assert len(seen) == 5 and all(isinstance(batch, tuple) for batch in seen)


def test_keywords_reach_forward():
    model = mlp()
    [(x, y), _] = labelled(model)

    def forward(network, batch, sign=1):
        return sign * network(batch[0])

    assert accuracy(model, [(x, y)], forward=forward) == 1.0
    assert accuracy(model, [(x, y)], forward=forward, sign=-1) < 0.5


def test_a_loss_that_is_not_finite_is_seen():
    assert math.isnan(BarrierCurve([0, 0.5, 1], [1.0, math.nan, 1.0]).barrier)
    model = mlp()
    [(x, y), _] = labelled(model)
    state = model.state_dict()
    with pytest.raises(ValueError, match="losses are finite, got nan at 0"):
        loss_barrier(model, state, state, [(x * math.inf, y)], points=2)


def test_barriers_of_networks_with_unsaved_buffers_and_shared_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.second.weight = self.first.weight
            self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

        def forward(self, x):
            return self.second(self.first(x).relu()) * self.scale

    a, b = Tied(), Tied()
    before = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    x, y = vectors(16), torch.zeros(16).long()
    losses = loss_barrier(a, a.state_dict(), b.state_dict(), [(x, y)], points=3).losses
    with torch.no_grad():
        for model, value in ((a, losses[0]), (b, losses[2])):
            assert value == pytest.approx(float(nn.functional.cross_entropy(model(x), y)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in a.state_dict().items())
    assert a.second.weight is a.first.weight
    with pytest.raises(ValueError, match=r"entries of the network, got .*'0.bias'"):
        loss_barrier(a, mlp().state_dict(), mlp(1).state_dict(), [(x, y)])


def test_masked_positions_count_in_nothing():
    a, b = mlp(0), mlp(1)
    x = vectors(24).reshape(6, 4, 12)
    keep = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    poisoned = torch.where(keep[..., None], x, torch.nan)
    found = layer_statistics(a, b, {"0": -1, "2": 2}, [poisoned], mask=lambda batch: keep)
    expected = layer_statistics(a, b, {"0": 1, "2": 1}, [x[keep]])
    for name in ("0", "2"):
        assert found.variance_ratio[name] == pytest.approx(expected.variance_ratio[name])
        assert found.relative_distance[name] == pytest.approx(expected.relative_distance[name])
    with pytest.raises(ValueError, match=r"activations are finite, got .* at '0'"):
        layer_statistics(a, b, {"0": -1}, [poisoned])
    with pytest.raises(ValueError, match=r"a mask is bool .* \[6, 4\], got torch.bool \[4\]"):
        layer_statistics(a, b, {"0": -1}, [x], mask=lambda batch: keep[0])


def test_layer_statistics_against_a_constant_expert():
    zero = mlp(1)
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    found = layer_statistics(mlp(), zero, {"0": 1}, [vectors(8)])
    assert found.variance_ratio == {"0": math.inf} and found.relative_distance == {"0": math.inf}
    found = layer_statistics(zero, zero, {"0": 1}, [vectors(8)])
    assert math.isnan(found.variance_ratio["0"]) and math.isnan(found.relative_distance["0"])
    with pytest.raises(ValueError, match=r"both models' outputs have one shape, got \[8, 5\]"):
        layer_statistics(mlp(), mlp(classes=7), {"4": 1}, [vectors(8)])
    spare = mlp()
    spare[0].spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="runs once in a forward pass, got 0 runs"):
        layer_statistics(spare, spare, {"0.spare": 1}, [vectors(8)])


@pytest.mark.parametrize("score", ["accuracy", "barrier", "layers"])
def test_a_device_is_where_batches_go(score):
    model = mlp()
    state = model.state_dict()
    data = [(vectors(8), torch.zeros(8).long())]

    def forward(network, batch):
        assert all(part.device.type == "meta" for part in batch)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        if score == "accuracy":
            accuracy(model, data, forward=forward, device="meta")
        elif score == "barrier":
            loss_barrier(model, state, state, data, forward=forward, device="meta")
        else:
            layer_statistics(model, model, {"0": 1}, data, forward=forward, device="meta")
