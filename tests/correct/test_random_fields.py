"""Random fields: their spectrum, and refit without data."""

import math

import pytest
import torch
from _networks import convnet, images
from torch.nn import functional

import nlm
from nlm.correct import random_fields


@pytest.mark.parametrize("size", [(64,), (32, 32), (16, 16, 16)])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_power_falls_with_the_frequency(size, exponent):
    fields = torch.cat(random_fields((2, *size), 600, exponent=exponent, batch=250))
    assert fields.shape == (600, 2, *size) and fields.dtype == torch.float32
    torch.testing.assert_close(fields.flatten(1).square().mean(1), torch.ones(600))
    # Along the first axis, at the others' lowest frequency.
    lowest = fields.flatten(3).mean(3) if len(size) > 1 else fields
    spectrum = torch.fft.fft(lowest, dim=2).abs().square().mean((0, 1))
    one, eight = 1, size[0] // 4
    slope = math.log(spectrum[one] / spectrum[eight]) / math.log(eight / one)
    assert slope == pytest.approx(exponent, abs=0.15)


def test_a_seed_says_it_all():
    first, again, other = (torch.cat(random_fields((1, 9), 5, seed=n)) for n in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert [len(batch) for batch in random_fields((1, 4), 5, batch=2)] == [2, 2, 1]


@pytest.mark.parametrize("exponent", [-500.0, 80.0, 1e300])
def test_any_finite_exponent(exponent):
    fields = torch.cat(random_fields((1, 64, 64), 3, exponent=exponent))
    assert fields.isfinite().all()
    torch.testing.assert_close(fields.square().mean((1, 2, 3)), torch.ones(3))


def test_refit_without_data_comes_nearer_to_the_experts():
    own = {"a": convnet(1), "b": convnet(2)}
    model = convnet(0)
    model.load_state_dict(nlm.merge(own, method="linear"))
    real = images(64)
    fields = random_fields(real.shape[1:], 512)
    solved = nlm.refit(model, own, dict.fromkeys(own, fields), outputs=True, max_samples=None)
    with torch.no_grad():
        aim = (own["a"](real) + own["b"](real)) / 2
        before, after = (functional.mse_loss(each(real), aim) for each in (model, solved))
    assert after < 0.5 * before


@pytest.mark.parametrize(
    ("shape", "options", "told"),
    [
        ((3,), {}, r"one to three axes of space, each at least 1, got \(3,\)"),
        ((3, 0, 4), {}, r"each at least 1, got \(3, 0, 4\)"),
        ((1, 2, 2, 2, 2), {}, "one to three axes"),
        ((1, 4), {"samples": 0}, "samples and batch are at least 1, got 0 and 256"),
        ((1, 4), {"batch": 0}, "got 1024 and 0"),
        ((1, 4), {"exponent": math.nan}, "the exponent is finite, got nan"),
    ],
)
def test_what_is_no_field(shape, options, told):
    with pytest.raises(ValueError, match=told):
        random_fields(shape, **options)
