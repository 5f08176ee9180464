"""inner_products beyond the rules of all operators: exact sums, chunks, many tensors."""

import math

import numpy as np
import pytest
import torch

from nlm.ops import inner_products


def test_norms_and_angles() -> None:
    x, y = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])
    assert inner_products([x, y, -x]).tolist() == [[25, 0, -25], [0, 25, 0], [-25, 0, 25]]
    assert inner_products([x + 7, y + 7], base=torch.full((3,), 7.0)).tolist() == [[25, 0], [0, 25]]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 13, 128])
def test_against_numpy(count: int) -> None:
    make = np.random.default_rng(count)
    base, vectors = make.normal(size=1300), make.normal(size=(count, 1300))
    tensors = [torch.from_numpy(x) for x in vectors]
    for start, each in ((None, vectors), (torch.from_numpy(base), vectors - base)):
        found = inner_products(tensors, start).numpy()
        assert np.array_equal(found, found.T)
        np.testing.assert_allclose(found, each @ each.T, rtol=1e-12, atol=1e-11)


def test_integers_are_exact_in_any_type_and_size() -> None:
    make = torch.Generator().manual_seed(0)
    numbers = torch.randint(-9, 10, (4, 150_011), generator=make)
    expected = (numbers @ numbers.T).double()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(inner_products(list(numbers.to(dtype))), expected)
    shifted = list((numbers + 100).double())
    assert torch.equal(inner_products(shifted, torch.full((150_011,), 100.0)), expected)


def test_products_that_float32_cannot_hold() -> None:
    for value in (3e38, 1e-38):
        x = torch.full((10,), value)
        expected = 10 * float(x[0]) ** 2
        assert math.isclose(inner_products([x]).item(), expected, rel_tol=1e-15)


def test_chunks_add_up() -> None:
    x, y, base = torch.randn(3, 9001, generator=torch.Generator().manual_seed(0))
    parts = sum(
        inner_products([x[i : i + 1000], y[i : i + 1000]], base[i : i + 1000])
        for i in range(0, 9001, 1000)
    )
    torch.testing.assert_close(parts, inner_products([x, y], base), rtol=1e-14, atol=0)


def test_no_gradient_reaches_the_tensors() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not inner_products([2 * x], base=x).requires_grad
