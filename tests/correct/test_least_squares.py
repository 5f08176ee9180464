"""Least squares, channel by channel, of the experts' activations: one set for all tasks."""

import numpy as np
import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import Tensor, nn

import nlm
from nlm.correct import LeastSquares, correct
from nlm.correct.by_name import load_correction


def networks(kind=mlp) -> tuple[nn.Module, dict[str, nn.Module]]:
    own = {"a": kind(1).double(), "b": kind(2).double()}
    model = kind(0).double()
    model.load_state_dict(nlm.merge(own, method="linear"))
    return model, own


def samples(shape=vectors) -> dict[str, list[Tensor]]:
    return {"a": [shape(60, 0).double()], "b": [shape(40, 1).double() * 2 + 1]}


def outputs(network: nn.Module, point: str, batches: list[Tensor], run: nn.Module) -> np.ndarray:
    """What a module gives, channels first and flat."""
    found: list[Tensor] = []
    handle = network.get_submodule(point).register_forward_hook(
        lambda *all: found.append(all[2].clone())
    )
    with torch.no_grad():
        for batch in batches:
            run(batch)
    handle.remove()
    return torch.cat([each.movedim(1, 0).flatten(1) for each in found], 1).numpy()


@pytest.mark.parametrize(("kind", "shape"), [(mlp, vectors), (convnet, images)])
def test_each_channel_is_numpys_least_squares_of_the_experts(kind, shape):
    model, own = networks(kind)
    data = samples(shape)
    fitted = LeastSquares.fit(model, own, data)
    assert set(fitted.rows.values()) == {0}
    plain, read = fitted.fold(), nlm.Repair.fit(model, own, data).points
    assert fitted.points == read
    for point in fitted.points:
        scale, shift = (part[0].numpy() for part in fitted.correction(point))
        after = np.concatenate([outputs(plain, point, data[task], plain) for task in own], 1)
        before = (after - shift[:, None]) / scale[:, None]  # with the earlier corrections in place
        wanted = np.concatenate([outputs(own[t], point, data[t], own[t]) for t in own], 1)
        for channel, (x, y) in enumerate(zip(before, wanted, strict=True)):
            slope, intercept = np.polyfit(x, y, 1)
            np.testing.assert_allclose([scale[channel], shift[channel]], [slope, intercept], 1e-7)


def test_a_model_that_is_its_experts_is_left_as_it_is():
    model = mlp(0).double()
    fitted = LeastSquares.fit(model, {"a": model, "b": model}, samples())
    for point in fitted.points:
        scale, shift = fitted.correction(point)
        torch.testing.assert_close(scale, torch.ones_like(scale))
        torch.testing.assert_close(shift, torch.zeros_like(shift), atol=1e-9, rtol=0)


def test_the_passes_do_not_matter():
    model, own = networks(convnet)
    found = [
        LeastSquares.fit(model, own, samples(images), **options)
        for options in ({}, {"micro_batch": 7}, {"micro_batch": 7, "recompute": True})
    ]
    for other in found[1:]:
        for point in other.points:
            for a, b in zip(found[0].correction(point), other.correction(point), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_channels_that_do_not_vary_are_moved_to_the_experts_mean():
    model, own = networks()
    with torch.no_grad():
        model[0].weight[0] = 0
    fitted = LeastSquares.fit(model, own, samples())
    scale, shift = (part[0, 0] for part in fitted.correction("0"))
    wanted = np.concatenate([outputs(own[t], "0", samples()[t], own[t]) for t in own], 1)[0]
    assert scale == 1
    assert abs(float(model[0].bias[0].detach() + shift) - wanted.mean()) < 1e-12


def test_mask():
    model, own = networks(convnet)
    data = {task: [batch[:20]] for task, [batch] in samples(images).items()}
    spoilt = {task: [torch.cat([batch, batch * 100])] for task, [batch] in data.items()}

    def mask(batch: Tensor) -> Tensor:
        counted = torch.zeros(len(batch), 8, 8, dtype=torch.bool)
        counted[:20] = True
        return counted

    points = {"0": 1}
    one = LeastSquares.fit(model, own, data, points=points)
    two = LeastSquares.fit(model, own, spoilt, points=points, mask=mask)
    for a, b in zip(one.correction("0"), two.correction("0"), strict=True):
        torch.testing.assert_close(a, b)


def test_by_name_and_from_a_file(tmp_path):
    _, own = networks()
    model = nlm.merge(own, mlp(0).double(), scale=0.5).model(own["a"])
    fitted = correct(model, own, samples(), "least_squares")
    assert isinstance(fitted, LeastSquares)
    fitted.save(tmp_path / "c.safetensors")
    again = load_correction(tmp_path / "c.safetensors", model)
    assert isinstance(again, LeastSquares)
    x = vectors(4).double()
    assert torch.equal(again(x, task="a"), fitted(x, task="a"))


def test_mistakes():
    model, own = networks()
    with torch.no_grad():
        own["b"][0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="activations are finite, got NaN or inf from an expert"):
        LeastSquares.fit(model, own, samples())
    wider = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6)).double()
    with pytest.raises(ValueError, match="have the merged model's channels, got 20 and"):
        LeastSquares.fit(model, {"a": wider}, {"a": samples()["a"]})
