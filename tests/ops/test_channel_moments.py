"""channel_moments beyond the rules of all operators: streams, merging, and what may not be read."""

import math

import pytest
import torch

from nlm._registry import operations
from nlm.ops import channel_moments


def test_stream_far_from_zero() -> None:
    """Mean 1e4 and std 1 in float32: mean to 1e-12, variance to 1e-6, batch by batch."""
    stream = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)) + 1e4
    n, mean, m2 = 0, torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    for batch in stream.split(777):
        count, batch_mean, batch_m2 = channel_moments(batch)
        total = n + count.item()
        delta = batch_mean - mean
        m2 += batch_m2 + delta.square() * (n * count.item() / total)
        mean += delta * (count.item() / total)
        n = total
    truth = stream.double()
    torch.testing.assert_close(mean, truth.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(m2 / n, truth.var(0, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("first", [1e8, -1e8, 65504.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_value_far_from_the_others(first: float, dtype: torch.dtype) -> None:
    """The shift comes from the first values; an outlier among them must not cost the variance."""
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0] = first
    _, mean, m2 = channel_moments(x)
    truth = x.double()
    torch.testing.assert_close(mean, truth.mean(0), rtol=1e-11, atol=0)
    torch.testing.assert_close(m2, (truth - truth.mean(0)).square().sum(0), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    "dtype, last_place, places", [(torch.bfloat16, 64, 156), (torch.float16, 8, 1250)]
)
@pytest.mark.parametrize("shape, dim", [((200_003, 3), 1), ((3, 200_003), 0), ((71, 3, 67), 1)])
def test_16_bit_values_close_to_each_other(
    dtype: torch.dtype, last_place: int, places: int, shape: tuple[int, ...], dim: int
) -> None:
    """A few last places apart around 1e4, against sums in integers."""
    steps = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(2))
    count, mean, m2 = channel_moments(((places + steps) * last_place).to(dtype), dim)
    n, flat = count.item(), steps.movedim(dim, 0).reshape(3, -1)
    for c in range(3):
        total, squares = flat[c].sum().item(), flat[c].square().sum().item()
        exact = last_place * (places * n + total) / n
        assert mean[c].item() == pytest.approx(exact, rel=2**-52)
        exact = last_place**2 * (n * squares - total**2) / n
        assert m2[c].item() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-7, 6e4])
def test_constant_channel_has_no_variance(dtype: torch.dtype, value: float) -> None:
    x = torch.full((1000, 5), value, dtype=dtype)
    count, mean, m2 = channel_moments(x)
    assert count.item() == 1000
    torch.testing.assert_close(mean, x[0].double(), rtol=1e-15, atol=0)
    # The kernel subtracts the value itself; the reference a mean that may miss it by roundings.
    noise = 0.0 if "cpu" in operations()["channel_moments"].kernels else 2.0**-48
    assert (m2 <= 1000 * (noise * mean).square()).all()


def test_16_bit_subnormals_count() -> None:
    """All float16 values, and bfloat16 values up to 2^33, each with its negative."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(1, 0x7C00 if dtype == torch.float16 else 0x5000, dtype=torch.int16)
        positive = values.view(dtype)
        x = torch.cat([positive, -positive])[:, None]
        _, mean, m2 = channel_moments(x)
        truth = 2 * positive.double().square().sum()
        assert abs(mean.item()) <= 1e-12 * positive.double().max().item()
        assert m2.item() == pytest.approx(truth.item(), rel=1e-12)


def test_masked_values_are_never_looked_at() -> None:
    x = torch.randn(3, 5, 70)
    mask = torch.rand(3, 70) > 0.5
    clean = channel_moments(x, 1, mask)
    x.transpose(1, 2)[~mask] = math.nan
    for dim, tensor in ((1, x), (2, x.transpose(1, 2).contiguous())):
        for kept, given in zip(clean, channel_moments(tensor, dim, mask), strict=True):
            torch.testing.assert_close(given, kept, rtol=1e-12, atol=1e-12)


def test_offsets_beyond_32_bits() -> None:
    """Two rows 2^31 elements apart; only their pages of the 4 GiB are ever touched."""
    rows = torch.empty((1 << 31) + 4, dtype=torch.float16).as_strided((2, 4), (1 << 31, 1))
    rows[0], rows[1] = 1, 3
    count, mean, m2 = channel_moments(rows)
    assert (count.item(), mean.tolist(), m2.tolist()) == (2, [2.0] * 4, [2.0] * 4)


def test_results_require_no_gradient_and_a_derivative_is_refused() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    assert not any(result.requires_grad for result in channel_moments(x))
    with pytest.raises(TypeError, match=r"nlm\.channel_moments: .* got one of shape \(4, 3\)"):
        torch.func.jvp(lambda x: channel_moments(x)[1], (x.detach(),), (x.detach(),))


def test_arguments_of_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"nlm\.channel_moments: x must be a tensor, got list"):
        channel_moments([[1.0]])
    with pytest.raises(TypeError, match=r"nlm\.channel_moments: mask must be a tensor, got list"):
        channel_moments(torch.ones(1, 1), mask=[True])
