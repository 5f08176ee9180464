"""magnitude_threshold beyond the rules of all operators."""

import math

import numpy as np
import pytest
import torch

from nlm._registry import operations
from nlm.ops import magnitude_threshold


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 1000, 65_536, 65_537, 300_001])
def test_against_numpys_partition(size: int) -> None:
    x, base = random(size), random(size, seed=1)
    magnitudes = np.abs(x.numpy() - base.numpy())
    for k in sorted({1, (size + 4) // 5, (size + 1) // 2, size}):
        expected = np.partition(magnitudes, size - k)[size - k]
        assert magnitude_threshold([x], k, [base]).item() == expected


def test_a_list_is_one_vector() -> None:
    x = random(150_000)
    pieces = list(x.split([1, 0, 2, 99_997, 50_000]))
    for k in (1, 30_000, 150_000):
        assert torch.equal(magnitude_threshold(pieces, k), magnitude_threshold([x], k))


def _hidden(size: int, share: float) -> torch.Tensor:
    """Small numbers, and in one stretch that no sample expects a share of large ones."""
    x = 1e-6 * random(size)
    x[: int(share * size)] *= 1e9
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "x",
    [
        _hidden(200_000, 0.003),
        torch.arange(200_000.0).remainder(4096),  # a sample at even steps sees few of the values
        torch.arange(200_000.0).remainder(7),
        torch.where(torch.arange(200_000) % 2 == 0, 0.0, random(200_000)),
        torch.full((200_000,), -0.0),
        torch.tensor([5e-324, 1e-310, 0.0, 1e-45]).double().repeat(50_000),
    ],
    ids=["hidden", "ramp", "seven values", "half zero", "minus zero", "subnormal"],
)
def test_where_a_sample_misleads(x: torch.Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    ordered = x.abs().sort(descending=True).values
    for k in (1, 599, 601, 40_000, 99_999, 100_001, 150_000, 200_000):
        assert magnitude_threshold([x], k).item() == ordered[k - 1].item()


def test_nan_is_the_largest() -> None:
    x = random(100_000)
    x[::10] = math.nan
    assert magnitude_threshold([x], 10_000).isnan()
    assert magnitude_threshold([x], 10_001) == x.nan_to_num(0).abs().max()
    x[1], x[2] = math.inf, -math.inf
    assert magnitude_threshold([x], 10_002) == math.inf
    assert magnitude_threshold([x], 10_003) < math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_differences_are_taken_in_float32(dtype: torch.dtype) -> None:
    x, base = torch.tensor([1.0], dtype=dtype), torch.tensor([1e-3], dtype=dtype)
    expected = 1 - base.item()
    assert magnitude_threshold([x], 1, [base]).item() == pytest.approx(expected, rel=1e-7)


def test_result_types() -> None:
    x = random(9)
    assert magnitude_threshold([x.half()], 1).dtype == torch.float32
    assert magnitude_threshold([x, x.double()], 1).dtype == torch.float64
    assert magnitude_threshold([x], 1, [x.double()]).dtype == torch.float64


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="between 1 and the number of entries, got 1 of 0"):
        magnitude_threshold([], 1)
    with pytest.raises(TypeError, match="tensor 0 must be a tensor, got list"):
        magnitude_threshold([[1.0]], 1)


def test_the_result_needs_no_gradient() -> None:
    assert not magnitude_threshold([random(9).requires_grad_()], 3).requires_grad


def test_the_kernel_is_alive_where_the_core_is() -> None:
    operation = operations()["magnitude_threshold"]
    assert ("cpu" in operation.kernels) != ("cpu" in operation.missing)
