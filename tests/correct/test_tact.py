"""TACT: the statistics it promises, whatever the micro-batches; its switch, folding and file."""

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

import nlm
from nlm.correct import default_points, expert_moments
from nlm.correct.matching import match
from nlm.statistics import Moments, collect_moments

TASKS = ("a", "b")


def experts(build=convnet) -> dict[str, nn.Module]:
    return {task: build(seed) for seed, task in enumerate(TASKS, start=1)}


def averaged(build=convnet) -> nn.Module:
    model = build(0)
    merged = nlm.merge(experts(build), method="linear")
    model.load_state_dict(merged)
    return model


def calibration(data=images, count: int = 128) -> dict[str, list[torch.Tensor]]:
    return {task: [data(count, seed) * (1 + seed)] for seed, task in enumerate(TASKS)}


def corrected_moments(tact, task, points, batch):
    found: dict[str, Moments] = {}
    handles = []
    for name, dim in points.items():

        def collect(module, args, output, name=name, dim=dim):
            found[name] = Moments.of(output, dim)

        handles.append(tact.model.get_submodule(name).register_forward_hook(collect))
    with torch.no_grad():
        tact(batch, task=task)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("build", "data"), [(convnet, images), (mlp, vectors)])
def test_every_channel_has_its_experts_mean_and_variance(build, data):
    model, own, samples = averaged(build), experts(build), calibration(data)
    tact = nlm.Tact.fit(model, own, samples)
    for task in TASKS:
        target = collect_moments(own[task], tact.points, samples[task])
        found = corrected_moments(tact, task, tact.points, samples[task][0])
        for point in tact.points:
            scale = target[point].variance.sqrt()
            torch.testing.assert_close(found[point].variance.sqrt(), scale, rtol=1e-4, atol=1e-5)
            assert ((found[point].mean - target[point].mean).abs() < 1e-4 * scale.max()).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_micro_batch_size_does_not_matter(dtype):
    model = averaged().to(dtype)
    own = {task: expert.to(dtype) for task, expert in experts().items()}
    data = {task: [batch.to(dtype) for batch in batches] for task, batches in calibration().items()}
    fits = {
        size: nlm.Tact.fit(model, own, data, micro_batch=size) for size in (None, 1, 7, 32, 128)
    }
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for size, tact in fits.items():
        for point in tact.points:
            for found, whole in zip(
                tact.correction(point), fits[None].correction(point), strict=True
            ):
                error = (found - whole).abs().max() / whole.abs().max()
                assert error < tolerance, (size, point)
    assert fits[7].correction("1")[0].dtype == dtype


def test_the_loaders_batches_do_not_matter():
    model, own, data = averaged(), experts(), calibration()
    cut = {task: list(batches[0].split(13)) for task, batches in data.items()}
    whole, pieces = nlm.Tact.fit(model, own, data), nlm.Tact.fit(model, own, cut)
    for point in whole.points:
        assert torch.equal(whole.correction(point)[0], pieces.correction(point)[0])


def test_moments_found_before_give_the_same():
    model, own, data = averaged(), experts(), calibration()
    moments = expert_moments(own, data)
    strangers = {task: convnet(9) for task in TASKS}
    known = nlm.Tact.fit(model, strangers, data, moments=moments)
    whole = nlm.Tact.fit(model, own, data)
    for point in whole.points:
        assert torch.equal(whole.correction(point)[1], known.correction(point)[1])
    with pytest.raises(ValueError, match="moments are given for every point, got none of 'a' at 1"):
        nlm.Tact.fit(model, own, data, moments={"a": {}})


def test_sequential_sees_corrected_inputs_and_at_once_does_not():
    model, own, data = averaged(mlp), experts(mlp), calibration(vectors)
    sequential = nlm.Tact.fit(model, own, data)
    at_once = nlm.Tact.fit(model, own, data, mode="at_once")
    first, *_, last = sequential.points
    torch.testing.assert_close(sequential.correction(first), at_once.correction(first))
    assert not torch.allclose(
        sequential.correction(last)[0], at_once.correction(last)[0], rtol=0.01
    )


@pytest.mark.parametrize(
    ("merged_dead", "target_dead", "expected"),
    [
        (False, False, (2.0, 5.0)),
        (False, True, (0.0, 7.0)),
        (True, False, (1.0, 6.0)),
        (True, True, (1.0, 6.0)),
    ],
)
@pytest.mark.parametrize("kind", ["zero", "rounding noise", "below the layer"])
def test_the_four_cases_of_dead_channels(merged_dead, target_dead, expected, kind):
    mean = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    if kind == "rounding noise":
        mean[1] = 1e7
        expected = (expected[0], 7.0 - expected[0] * 1e7)
    small = {"zero": 0.0, "rounding noise": 0.5, "below the layer": 1e-9}[kind]
    variance = torch.tensor([1.0, small if merged_dead else 1.0, 1.0], dtype=torch.float64)
    if kind == "rounding noise" and not merged_dead:
        variance[1], mean[1], expected = 1.0, 1.0, (expected[0], 7.0 - expected[0])
    elif kind != "rounding noise":
        expected = (expected[0], 7.0 - expected[0])
    target_variance = torch.tensor([4.0, 0.0 if target_dead else 4.0, 4.0], dtype=torch.float64)
    moments = Moments(torch.tensor(10), mean, variance * 10)
    scale, shift = match(
        moments, torch.tensor([0.0, 7.0, 0.0]).double(), target_variance, torch.float32
    )
    assert torch.isfinite(scale).all() and torch.isfinite(shift).all()
    assert (float(scale[1]), float(shift[1])) == pytest.approx(expected)


def test_a_channel_that_never_varies_is_left_without_nan():
    model, own = averaged(mlp), experts(mlp)
    with torch.no_grad():
        for network in (model, *own.values()):
            network[0].weight[3] = 0
    tact = nlm.Tact.fit(model, own, calibration(vectors))
    scale, shift = tact.correction("0")
    assert (
        torch.isfinite(scale).all()
        and torch.isfinite(shift).all()
        and bool((scale[:, 3] == 1).all())
    )


@pytest.mark.parametrize(("build", "data"), [(convnet, images), (mlp, vectors)])
def test_folding_is_exact(build, data):
    tact = nlm.Tact.fit(averaged(build), experts(build), calibration(data))
    x = data(50, 77)
    with torch.no_grad():
        for task in TASKS:
            expected, plain = tact(x, task=task), tact.fold(task)
            assert type(plain) is nn.Sequential
            assert not any(module._forward_hooks for module in plain.modules())
            torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)


def test_one_task_or_one_per_sample():
    tact = nlm.Tact.fit(averaged(), experts(), calibration())
    x = images(10, 5)
    ids = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1, 1])
    with torch.no_grad():
        mixed = tact(x, task=ids)
        for number, task in enumerate(TASKS):
            rows = ids == number
            torch.testing.assert_close(mixed[rows], tact(x, task=task)[rows], rtol=1e-5, atol=1e-5)
            assert torch.equal(tact(x, task=task), tact(x, task=number))
        assert torch.equal(mixed, tact(x, task=[TASKS[number] for number in ids]))


def test_multi_task_models_keep_their_heads():
    own = {"a": mlp(1, classes=5), "b": mlp(2, classes=7)}
    model = nlm.merge(own, mlp(0, classes=3), scale=0.5, heads=("4",)).model(own["a"])
    tact = nlm.Tact.fit(model, own, calibration(vectors))
    assert list(tact.points) == ["0", "2"] and tact.unfoldable() == {}
    x = vectors(9, 4)
    with torch.no_grad():
        for task, classes in (("a", 5), ("b", 7)):
            found = tact(x, task=task)
            assert found.shape == (9, classes)
            torch.testing.assert_close(tact.fold(task)(x), found, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"outputs have one shape, got 2 tasks .*\[5\].*\[7\]"):
        tact(x, task=["a"] * 4 + ["b"] * 5)


def test_files(tmp_path):
    model, own = averaged(), experts()
    tact = nlm.Tact.fit(model, own, calibration())
    path = tmp_path / "tact.safetensors"
    tact.save(path)
    again = nlm.Tact.load(path, model)
    x = images(4, 3)
    with torch.no_grad():
        assert torch.equal(again(x, task="b"), tact(x, task="b"))
    assert tact.parameter_bytes == 2 * 2 * 4 * (8 + 12 + 20)
    with pytest.raises(FileExistsError):
        tact.save(path)
    with pytest.raises(ValueError, match="a file of Repair is read, got Tact"):
        nlm.Repair.load(path, model)
    with pytest.raises(ValueError, match="the points are modules of the model, got 5, 8"):
        nlm.Tact.load(path, mlp())


def test_points_are_found_and_chosen():
    model = convnet()
    points = default_points(model, lambda: model(images(2)))
    assert points == {"1": 1, "5": 1, "8": -1}  # the norms stand in for their layers; no head
    tact = nlm.Tact.fit(averaged(), experts(), calibration(), points=["8", "5"])
    assert list(tact.points) == ["5", "8"]


def test_a_point_runs_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spare = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.layer(self.layer(x).relu()).relu()

    own = {"a": Twice()}
    for point, runs in (("layer", 2), ("spare", 0)):
        with pytest.raises(ValueError, match=f"runs once in a forward pass, got {runs} runs of"):
            nlm.Tact.fit(Twice(), own, {"a": [vectors()]}, points=[point])


def test_models_come_back_as_they_were():
    model, own = averaged().train(), experts()
    own["a"].train()
    nlm.Tact.fit(model, own, calibration(), micro_batch=32)
    bad = calibration()
    bad["b"][0][3] = float("nan")
    with pytest.raises(ValueError, match=r"nlm.Tact: activations are finite, got .* at '1'"):
        nlm.Tact.fit(model, own, bad)
    assert model.training and own["a"].training and not own["b"].training
    assert not any(m._forward_hooks for net in (model, *own.values()) for m in net.modules())


def test_progress_can_cancel():
    def stop(task, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nlm.Tact.fit(averaged(), experts(), calibration(), progress=stop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("b"), "data for every expert, got experts for a, b and data for a"),
        (
            lambda data: data.update(b=[]),
            r"nlm.Tact \(b\): data holds at least one sample, got none",
        ),
        (lambda data: data.update(b=[vectors(1)]), "at least two values per channel, got 1"),
    ],
)
def test_bad_data(change, message):
    data = calibration(vectors)
    change(data)
    with pytest.raises(ValueError, match=message):
        nlm.Tact.fit(averaged(mlp), experts(mlp), data)


def test_bad_calls():
    tact = nlm.Tact.fit(averaged(mlp), experts(mlp), calibration(vectors))
    x = vectors(3)
    for task, message in [
        (None, "the task is one of a, b, got none"),
        ("c", "the task is one of a, b, got 'c'"),
        (2, "task ids lie in 0 to 1, got 2 to 2"),
        (torch.tensor([0, 1, -1]), "task ids lie in 0 to 1, got -1 to 1"),
        (torch.tensor([0.0, 1.0, 1.0]), "task ids are integers, got torch.float32"),
        (torch.tensor([[0], [1], [1]]), r"one task id for all samples or one for each, got .*3, 1"),
        (torch.tensor([0, 1]), "one id per sample"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            tact(x, task=task)
    with pytest.raises(ValueError, match="the mode is one of sequential, at_once, got 'both'"):
        nlm.Tact.fit(averaged(mlp), experts(mlp), calibration(vectors), mode="both")
    with pytest.raises(ValueError, match="a micro-batch has at least one sample, got 0"):
        nlm.Tact.fit(averaged(mlp), experts(mlp), calibration(vectors), micro_batch=0)
    with pytest.raises(ValueError, match="one task is folded at a time"):
        tact.fold(torch.tensor([0, 1]))
