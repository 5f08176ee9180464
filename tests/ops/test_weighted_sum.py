"""weighted_sum beyond the rules of all operators: mergekit's arithmetic, chunks, conversion."""

import math

import numpy as np
import pytest
import torch

from nlm.ops import weighted_sum


def randoms(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=make).to(dtype) for _ in range(count)]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize(
    ("count", "shape"),
    [(1, (1,)), (2, (5,)), (3, (1,)), (3, (3, 7)), (3, (300, 257)), (8, (7, 32)), (17, (64,))],
)
def test_the_bits_of_mergekit(count: int, shape: tuple[int, ...]) -> None:
    """mergekit 0.1.5's task_arithmetic, written once more; its linear fuses products and sums."""
    base, *models = randoms(count + 1, *shape)
    weights = torch.rand(count, generator=torch.Generator().manual_seed(1))
    factors = weights.reshape(-1, *[1] * len(shape))

    deltas = torch.stack([x - base for x in models]).mul_(factors)
    moved = deltas.sum(0)
    moved /= factors.sum(0)
    moved *= 0.7
    divisor = float(factors.sum(0))
    found = weighted_sum(models, weights.tolist(), base, divisor, 0.7)
    assert torch.equal(bits(found), bits(base + moved))

    mean = torch.zeros_like(base)
    for x, weight in zip(models, weights, strict=True):
        mean.addcmul_(x, weight.reshape([1] * len(shape)))
    divisor = float(weights.sum())
    mean.div_(divisor)
    found = weighted_sum(models, weights.tolist(), None, divisor)
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_chunks_give_the_same_bits(dtype: torch.dtype) -> None:
    base, *models = randoms(4, 5001, dtype=dtype)
    whole = weighted_sum(models, [0.3, 0.5, -2.0], base, 1.1, 0.9)
    parts = [
        weighted_sum(
            [x[i : i + 617] for x in models], [0.3, 0.5, -2.0], base[i : i + 617], 1.1, 0.9
        )
        for i in range(0, 5001, 617)
    ]
    assert torch.equal(bits(torch.cat(parts)), bits(whole))


def test_it_converts_between_types() -> None:
    values = [0.0, -0.0, 1.0, 1 + 2**-8, 65519.0, 65520.0, 3e38, 1e-40, math.inf, -math.inf]
    numbers = torch.tensor(values * 7, dtype=torch.float64)
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for given in types:
        for wanted in types:
            x = numbers.to(given)
            found = weighted_sum([], base=x, dtype=wanted)
            assert torch.equal(bits(found), bits(x.to(wanted)))
            one = weighted_sum([x], dtype=wanted)
            assert torch.equal(one, x.to(wanted)) and not bits(one)[1].any()  # the sum begins at +0


def test_narrow_types_are_summed_in_float32_and_rounded_once() -> None:
    models = randoms(8, 3000, dtype=torch.bfloat16)
    truth = sum(x.double() for x in models)
    found = weighted_sum(models)
    assert torch.equal(found, sum(x.float() for x in models).bfloat16())
    step = np.spacing(truth.abs().float().numpy()) * 2.0**16  # of bfloat16
    assert ((found.double() - truth).abs() <= torch.from_numpy(step) * 0.501).all()


def test_against_numpy() -> None:
    base, *models = randoms(5, 9, 111, dtype=torch.float64)
    weights = np.array([0.1, 2.0, -0.4, 1.0])
    vectors = np.stack([(x - base).numpy() for x in models])
    expected = base.numpy() + 0.3 * np.tensordot(weights, vectors, 1) / 2.7
    found = weighted_sum(models, weights, base, 2.7, 0.3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-14)


def test_the_type_is_the_bases_or_the_first_tensors() -> None:
    half, wide = torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.float64)
    assert weighted_sum([half, wide]).dtype == torch.float16
    assert weighted_sum([half], base=wide).dtype == torch.float64
    assert weighted_sum([half], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_no_gradient_reaches_the_tensors() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not weighted_sum([2 * x], base=x).requires_grad
