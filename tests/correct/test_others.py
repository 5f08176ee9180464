"""REPAIR, BatchNorm reset and linear probes."""

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

import nlm
from nlm.correct import fit_logistic, linear_probe
from nlm.evaluate import accuracy
from nlm.statistics import collect_moments


def test_repair_reaches_the_experts_average_statistics():
    own = {"a": mlp(1), "b": mlp(2)}
    model = mlp(0)
    model.load_state_dict(nlm.merge(own, method="linear"))
    data = {"a": [vectors(128, 0)], "b": [vectors(128, 1) * 2]}
    repair = nlm.Repair.fit(model, own, data)
    assert set(repair.rows.values()) == {0} and repair.tasks == ("a", "b")
    moments = [collect_moments(own[task], repair.points, data[task]) for task in own]
    plain = repair.fold()
    found = collect_moments(plain, repair.points, [data["a"][0], data["b"][0]])
    for point in repair.points:
        deviation = sum(of[point].variance.sqrt() for of in moments) / 2
        torch.testing.assert_close(found[point].variance.sqrt(), deviation, rtol=1e-4, atol=1e-5)
    x = vectors(5, 9)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), repair(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(repair(x), repair(x, task="b"))
        assert torch.equal(repair(x), repair(x, task=torch.tensor([0, 1, 1, 0, 0])))


@pytest.mark.parametrize("micro_batch", [None, 9])
def test_batch_norm_statistics_are_those_of_the_data(micro_batch):
    model, data = convnet(), [images(30, 1) * 3, images(34, 2) + 1]
    assert nlm.reset_batch_norm(model, data, micro_batch=micro_batch) == 2
    for norm, layer in (("1", "0"), ("5", "4")):
        moments = collect_moments(model, {layer: 1}, data)[layer]
        module = model.get_submodule(norm)
        torch.testing.assert_close(module.running_mean.double(), moments.mean, rtol=1e-5, atol=1e-5)
        unbiased = moments.m2 / (moments.count - 1)
        torch.testing.assert_close(module.running_var.double(), unbiased, rtol=1e-4, atol=1e-5)


def test_batch_norm_reset_of_a_multi_task_model():
    own = {"a": convnet(1), "b": convnet(2)}
    model = nlm.merge(own, convnet(0), scale=0.5).model(own["a"])
    before = model.states["1.running_mean"].clone()
    assert nlm.reset_batch_norm(model, {"a": [images(40)], "b": [images(40, 1)]}) == 2
    assert not torch.equal(model.states["1.running_mean"], before)
    assert torch.equal(own["a"][1].running_mean, convnet(1)[1].running_mean)
    with pytest.raises(ValueError, match="takes data per task"):
        nlm.reset_batch_norm(model, [images()])
    with pytest.raises(ValueError, match="at least one sample"):
        nlm.reset_batch_norm(convnet(), [])


def test_norms_of_the_tasks_own_are_reset_from_their_own_data():
    own = {"a": convnet(1), "b": convnet(2)}
    model = nlm.merge(own, convnet(0), scale=0.5, heads=("1", "10")).model(own["a"])
    data = {"a": [images(40)], "b": [images(40, 1) * 3 + 1]}
    calls = []
    nlm.reset_batch_norm(model, data, micro_batch=16, progress=lambda *call: calls.append(call))
    assert calls == [("1", 1, 2), ("5", 2, 2)]
    for task, batches in data.items():
        plain = model.for_task(task)
        moments = collect_moments(plain, {"0": 1}, batches)["0"]
        torch.testing.assert_close(plain[1].running_mean.double(), moments.mean)
    both = [collect_moments(model.for_task(task), {"4": 1}, data[task])["4"] for task in data]
    torch.testing.assert_close(plain[5].running_mean.double(), (both[0] + both[1]).mean)


def test_every_batch_norm_is_reset_and_in_one_order():
    model = nn.Sequential(nn.Linear(12, 6), nn.SyncBatchNorm(6)).eval()
    assert nlm.reset_batch_norm(model, [vectors() + 4]) == 1
    assert not torch.equal(model[1].running_mean, torch.zeros(6))

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(12), nn.BatchNorm1d(12)

        def forward(self, x):
            return self.first(x) if x.mean() > 5 else self.second(x)

    with pytest.raises(ValueError, match="norms in one order, got first and second at one place"):
        nlm.reset_batch_norm(Either(), [vectors(8), vectors(8) + 10], micro_batch=8)


def test_a_probe_learns_what_the_features_hold():
    torch.manual_seed(0)
    centres = torch.randn(5, 12) * 3
    labels = torch.randint(5, (400,))
    inputs = centres[labels] + torch.randn(400, 12)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    old = model[2].weight.clone()
    head = linear_probe(model, [(inputs[:300], labels[:300])], "2", classes=5)
    assert torch.equal(model[2].weight, old)
    model[2] = head
    assert accuracy(model, [(inputs[300:], labels[300:])]) > 0.9
    few = linear_probe(model, [(inputs[:300], labels[:300])], "2", max_samples=8)
    assert not torch.equal(few.weight, head.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_probe_of_other_types_and_of_tokens(dtype):
    model, x = mlp().to(dtype), vectors(60).view(12, 5, 12)
    labels = x.argmax(-1) % 5
    head = linear_probe(model, [(x.to(dtype), labels)], "4", max_samples=10)
    assert head.weight.dtype == dtype and head.weight.shape == (5, 24)
    whole = linear_probe(
        model, [(x, labels)], "4", max_samples=10, device="cpu",
        forward=lambda model, batch: model(batch[0].to(dtype)),
    )  # fmt: skip
    assert torch.equal(whole.weight, head.weight)


def test_a_probe_of_a_multi_task_model():
    own = {"a": mlp(1, classes=5), "b": mlp(2, classes=7)}
    model = nlm.merge(own, mlp(0, classes=3), scale=0.5, heads=("4",)).model(own["a"])
    data = [(vectors(), torch.arange(64) % 7)]
    head = linear_probe(model, data, "4", task="b")
    assert head.weight.shape == (7, 24)
    assert torch.equal(linear_probe(model.for_task("b"), data, "4").weight, head.weight)


def test_logistic_regression_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(200, 6, generator=generator) * 4 + 2
    labels = (features @ torch.randn(6, 3, generator=generator)).argmax(1)
    weight, bias = fit_logistic(features, labels, 3, l2=1e-2, steps=500)
    standard = (features - features.mean(0)) / (features.std(0, unbiased=False) + 1e-6)
    oracle = linear_model.LogisticRegression(C=1 / (2 * 1e-2 * 200), max_iter=5000, tol=1e-8)
    oracle.fit(standard.double().numpy(), labels.numpy())
    expected = torch.from_numpy(oracle.predict_proba(standard.double().numpy()))
    found = (features.double() @ weight.double().T + bias).softmax(-1)
    assert (found - expected).abs().max() < 1e-3


def test_bad_probes():
    with pytest.raises(ValueError, match="the head is a linear module, got ReLU at '1'"):
        linear_probe(mlp(), [(vectors(), torch.zeros(64).long())], "1")
    with pytest.raises(ValueError, match=r"a batch is \(inputs, labels\), got Tensor"):
        linear_probe(mlp(), [vectors()], "4")
    with pytest.raises(ValueError, match="at least one sample"):
        linear_probe(mlp(), [], "4")
    for labels, message in [
        (torch.zeros(64), "labels are int64, got torch.float32"),
        (torch.zeros(64, 2).long(), r"one label per row of features, got labels \[64, 2\]"),
        (torch.arange(64), "labels lie in 0 to 4, got 0 to 63"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_probe(mlp(), [(vectors(), labels)], "4")
    with pytest.raises(ValueError, match=r"nlm.linear_probe: activations are finite, got .* '4'"):
        linear_probe(mlp(), [(vectors() * float("nan"), torch.zeros(64).long())], "4")
