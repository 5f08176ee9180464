"""cross_moments_ where the distance of two finite float32 values is not a float32."""

import pytest
import torch
from torch import Tensor

from nlm._registry import operations
from nlm.ops import cross_moments_

LARGEST = torch.finfo(torch.float32).max


def empty_state(channels: int) -> list[Tensor | None]:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    count = torch.zeros((), dtype=torch.int64)
    return [count, zeros(channels), zeros(channels), None, None, zeros(channels, channels)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3e38, LARGEST])
def test_largest_values(dtype: torch.dtype, size: float) -> None:
    """A channel of the largest values beside one of the smallest: both keep their digits."""
    size = min(size, torch.finfo(dtype).max)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    small = torch.tensor([1e-30, 3e-30, -2e-30, 0.0, 5e-30])
    x = torch.stack([signs * size, signs * size, small], dim=1).to(dtype)
    state, truth = empty_state(3), empty_state(3)
    for batch in (x, x.flip(0)):
        cross_moments_(*state, batch)
        operations()["cross_moments_"].reference(*truth, batch, None, 1, None)
    comoment, exact = state[-1], truth[-1]
    assert exact.isfinite().all() and exact[0, 1] > 1e77
    size_of = exact.diagonal().sqrt()
    assert ((comoment - exact).abs() / size_of.outer(size_of)).max() <= 2e-6


def test_smallest_values() -> None:
    """Channels of subnormal values: their products are far below float32."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 4.0]]) * 2.0**-149
    state = empty_state(2)
    cross_moments_(*state, x)
    deviations = x.double() - x.double().mean(0)
    torch.testing.assert_close(state[-1], deviations.T @ deviations, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinity_is_no_large_value(value: float) -> None:
    x = torch.tensor([[1.0, 2.0], [value, 3.0], [LARGEST, -1.0]])
    state = empty_state(2)
    cross_moments_(*state, x)
    assert state[-1][0].isnan().all() and state[-1][1, 1].isfinite()
