"""cross_moments_ against one-shot float64 sums, and the properties of its running state."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from _compare import ROUNDINGS
from torch import Tensor

from nlm.ops import cross_moments_


@dataclass
class State:
    """The tensors that cross_moments_ adds to."""

    count: Tensor
    mean_x: Tensor
    m2_x: Tensor
    mean_y: Tensor | None
    m2_y: Tensor | None
    comoment: Tensor

    @classmethod
    def empty(cls, channels_x: int, channels_y: int | None = None) -> "State":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        count = torch.zeros((), dtype=torch.int64)
        if channels_y is None:
            square = zeros(channels_x, channels_x)
            return cls(count, zeros(channels_x), zeros(channels_x), None, None, square)
        return cls(
            count, zeros(channels_x), zeros(channels_x), zeros(channels_y), zeros(channels_y),
            zeros(channels_x, channels_y),
        )  # fmt: skip

    @classmethod
    def one_shot(cls, x: Tensor, y: Tensor | None = None) -> "State":
        """Of samples [n, c], by two passes in float64."""
        mean_x, centred_x = _centred(x)
        count, m2_x = torch.tensor(len(x)), centred_x.square().sum(0)
        if y is None:
            return cls(count, mean_x, m2_x, None, None, centred_x.T @ centred_x)
        mean_y, centred_y = _centred(y)
        m2_y = centred_y.square().sum(0)
        return cls(count, mean_x, m2_x, mean_y, m2_y, centred_x.T @ centred_y)

    def add(
        self,
        x: Tensor,
        y: Tensor | None = None,
        dim: int = 1,
        mask: Tensor | None = None,
        precision: str = "float32",
    ) -> "State":
        state = (self.count, self.mean_x, self.m2_x, self.mean_y, self.m2_y, self.comoment)
        cross_moments_(*state, x, y, dim, mask, precision)
        return self

    def correlation_error(self, truth: "State") -> float:
        """The largest error of a co-moment, relative to sqrt(m2_x m2_y)."""
        m2_y = truth.m2_x if truth.m2_y is None else truth.m2_y
        size = truth.m2_x.sqrt().outer(m2_y.sqrt())
        return float(((self.comoment - truth.comoment).abs() / size).max())


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.double().mean(0)
    return mean, x.double() - mean


def _relative(value: Tensor, truth: Tensor) -> float:
    return float(((value - truth).abs() / truth.abs()).max())


def _normal(*shape: int, seed: int = 0, mean: float = 0.0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


@pytest.mark.parametrize("second_stream", [False, True])
def test_streamed_equals_one_shot_at_a_large_mean(second_stream: bool) -> None:
    x = _normal(5000, 33, mean=1e4)
    y = 0.5 * x[:, :20] + _normal(5000, 20, seed=1) if second_stream else None
    state = State.empty(33, 20 if second_stream else None)
    for begin, end in ((0, 1), (1, 700), (700, 700), (700, 4100), (4100, 5000)):
        state.add(x[begin:end], None if y is None else y[begin:end])
    truth = State.one_shot(x, y)
    assert state.count == 5000
    assert _relative(state.mean_x, truth.mean_x) < 1e-12
    assert _relative(state.m2_x, truth.m2_x) < 1e-6
    assert state.correlation_error(truth) < 2e-6
    if y is not None:
        assert _relative(state.mean_y, truth.mean_y) < 1e-12
        assert _relative(state.m2_y, truth.m2_y) < 1e-6


def test_float64_keeps_float64_accuracy() -> None:
    x, y = _normal(3000, 17, mean=1e4, dtype=torch.float64), _normal(3000, 9, dtype=torch.float64)
    y = y + x[:, :9]
    state, truth = State.empty(17, 9).add(x, y), State.one_shot(x, y)
    assert _relative(state.m2_x, truth.m2_x) < 1e-12
    assert state.correlation_error(truth) < 1e-13


def test_agrees_with_numpy_cov() -> None:
    x = _normal(400, 6, dtype=torch.float64)
    state = State.empty(6).add(x)
    np.testing.assert_allclose(state.comoment / 399, np.cov(x.T), rtol=0, atol=1e-14)


def test_equal_products_do_not_drift() -> None:
    """All products of one size: every float32 addition may round in the same direction."""
    sign = torch.where(torch.arange(4096) % 2 == 0, 1.0, -1.0)
    x = sign[:, None] * torch.linspace(1.0, 2.0, 64)
    assert State.empty(64).add(x).correlation_error(State.one_shot(x)) < 2e-6


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e25, 1e37])
def test_products_neither_underflow_nor_overflow(scale: float) -> None:
    x = _normal(600, 8) * torch.tensor([1.0, scale]).repeat(4)
    state, truth = State.empty(8).add(x), State.one_shot(x)
    assert truth.m2_x.min() > 0 and truth.m2_x.isfinite().all()
    assert state.correlation_error(truth) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("precision", "apart", "alike"), [("bf16x3", 1e-6, 5e-6), ("bf16", 5e-4, 2e-3)]
)
def test_less_precise_products_err_as_promised(
    precision: str, apart: float, alike: float, dtype: torch.dtype
) -> None:
    """Of independent channels at means and scales of any size, and of channels that are alike."""
    scale = torch.tensor([1e-3, 1.0, 1e2]).repeat(15)
    x, y = ((_normal(5000, 45, seed=seed, mean=3.0) * scale).to(dtype) for seed in (0, 1))
    state, exact = State.empty(45, 45).add(x, y, precision=precision), State.empty(45, 45).add(x, y)
    assert torch.equal(state.m2_x, exact.m2_x) and torch.equal(state.mean_y, exact.mean_y)
    assert state.correlation_error(State.one_shot(x, y)) < apart
    same = State.empty(45, 45).add(x, x, precision=precision)
    assert same.correlation_error(State.one_shot(x, x)) < alike


@pytest.mark.parametrize(("precision", "most"), [("bf16x3", 4e-6), ("bf16", 2e-3)])
def test_less_precise_products_bear_any_float32(precision: str, most: float) -> None:
    x = _normal(600, 12) * torch.tensor([1.0, 1e-37, 1e37]).repeat(4) + torch.tensor(
        [1e4, 0, 0.0]
    ).repeat(4)
    once, truth = State.empty(12).add(x, precision=precision), State.one_shot(x)
    assert once.correlation_error(truth) < most
    assert torch.equal(once.comoment, once.comoment.T)
    x[3, 1], x[4, 5], x[5, 5] = torch.nan, torch.inf, -torch.inf
    spoilt = State.empty(12).add(x[:100], precision=precision).add(x[100:], precision=precision)
    assert torch.equal(spoilt.comoment.isnan(), State.one_shot(x).comoment.isnan())
    fine = torch.tensor([0, 2, 3, 4, 6, 7, 8, 9, 10, 11])
    size = truth.m2_x.sqrt().outer(truth.m2_x.sqrt())
    assert ((spoilt.comoment - truth.comoment).abs() / size)[fine][:, fine].max() < most


@pytest.mark.parametrize(("precision", "most"), [("bf16x3", 3e-5), ("bf16", 8e-3)])
def test_less_precise_products_at_their_worst(precision: str, most: float) -> None:
    """All deviations of a channel are of one size, so that their roundings do not cancel."""
    sign = torch.where(torch.arange(4096) % 2 == 0, 1.0, -1.0)
    x = sign[:, None] * torch.linspace(1.0, 2.0, 64)
    state = State.empty(64).add(x, precision=precision)
    assert state.correlation_error(State.one_shot(x)) < most


def test_same_stream_is_symmetric_with_m2_on_the_diagonal() -> None:
    state = State.empty(101)
    for seed in range(3):
        state.add(_normal(300, 101, seed=seed, mean=float(seed)))
    assert torch.equal(state.comoment, state.comoment.T)
    assert torch.equal(state.comoment.diagonal(), state.m2_x)


def test_same_stream_equals_the_stream_given_twice() -> None:
    x = _normal(900, 70)
    once, twice = State.empty(70).add(x), State.empty(70, 70).add(x, x)
    assert once.correlation_error(twice) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_channels_have_no_moments(dtype: torch.dtype) -> None:
    x = _normal(5000, 5, dtype=dtype)
    x[:, 2] = 0.1
    state = State.empty(5).add(x[:200]).add(x[200:])
    assert state.mean_x[2] == x[0, 2]
    assert state.m2_x[2] == 0
    assert (state.comoment[2] == 0).all() and (state.comoment[:, 2] == 0).all()


@pytest.mark.parametrize("second_stream", [False, True])
def test_mask_selects_samples(second_stream: bool) -> None:
    x, y = _normal(6, 29, 50), _normal(6, 11, 50, seed=1) if second_stream else None
    mask = torch.rand(6, 50, generator=torch.Generator().manual_seed(2)) < 0.6
    x.transpose(1, 2)[~mask] = torch.nan
    state = State.empty(29, 11 if second_stream else None).add(x, y, 1, mask)
    selected_y = None if y is None else y.transpose(1, 2)[mask]
    truth = State.one_shot(x.transpose(1, 2)[mask], selected_y)
    assert state.count == mask.sum()
    assert _relative(state.m2_x, truth.m2_x) < 1e-6
    assert state.correlation_error(truth) < 2e-6


def test_nothing_counted_changes_nothing() -> None:
    state = State.empty(4, 3).add(_normal(10, 4), _normal(10, 3, seed=1))
    before = [tensor.clone() for tensor in vars(state).values()]
    state.add(torch.empty(0, 4), torch.empty(0, 3))
    state.add(_normal(7, 4), _normal(7, 3), 1, torch.zeros(7, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(before, vars(state).values(), strict=True))


def test_layouts_agree_in_every_bit() -> None:
    """[N, C, L] is transposed while it is packed; the sums see the samples in the same order."""
    x, y = _normal(7, 37, 53), _normal(7, 18, 53, seed=1)
    rows = State.empty(37, 18).add(x.transpose(1, 2).contiguous(), y.transpose(1, 2), 2)
    for dim, first, second in (
        (1, x, y),
        (2, x.transpose(1, 2), y.transpose(1, 2).contiguous()),
        (1, x.transpose(1, 2).reshape(-1, 37), y.transpose(1, 2).reshape(-1, 18)),
        (0, x.transpose(0, 1).contiguous(), y.transpose(0, 1)),
    ):
        other = State.empty(37, 18).add(first, second, dim)
        for a, b in zip(vars(rows).values(), vars(other).values(), strict=True):
            assert torch.equal(a, b)


def test_batches_may_be_merged_in_any_order() -> None:
    x = _normal(1000, 12, mean=3.0) * torch.linspace(0.1, 10, 12)
    batches = x.split([1, 299, 500, 200])
    forward, backward = State.empty(12), State.empty(12)
    for batch in batches:
        forward.add(batch)
    for batch in reversed(batches):
        backward.add(batch)
    assert _relative(forward.mean_x, backward.mean_x) < 1e-13
    assert _relative(forward.m2_x, backward.m2_x) < 1e-13
    assert forward.correlation_error(backward) < 1e-6


def test_infinite_and_nan_channels_spoil_only_themselves() -> None:
    x = _normal(5000, 6)
    x[0, 1], x[4900, 4] = torch.inf, torch.nan
    state, truth = State.empty(6).add(x[:100]).add(x[100:]), State.one_shot(x)
    assert state.mean_x[1] == torch.inf and state.mean_x[4].isnan()
    assert torch.equal(state.comoment.isnan(), truth.comoment.isnan())
    fine = torch.tensor([0, 2, 3, 5])
    error = (state.comoment - truth.comoment)[fine][:, fine].abs().max()
    assert error < 2e-6 * truth.m2_x[fine].max()


def test_strides_beyond_two_to_the_31() -> None:
    stride = 2**30 + 48  # the last row begins behind element 2^31; untouched pages take no memory
    storage = torch.empty(2 * stride + 16, dtype=torch.float16)
    x = storage.as_strided((3, 16), (stride, 1))
    x.copy_(_normal(3, 16))
    assert State.empty(16).add(x).correlation_error(State.one_shot(x)) < 2e-6


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (TypeError, {"x": torch.ones(4, 2, dtype=torch.int32)}, "x must be float16"),
        (ValueError, {"dim": 2}, r"dim must be a dimension of x, got dim 2 for shape \(4, 2\)"),
        (TypeError, {"y": torch.ones(4, 3).double()}, "y must have the dtype of x, torch.float32"),
        (ValueError, {"y": torch.ones(5, 3)}, r"except along dim 1, \(4, 2\), got \(5, 3\)"),
        (ValueError, {"y": None}, "must be given if and only if y is, got mean_y without y"),
        (ValueError, {"mean_y": None}, "if and only if y is, got mean_y missing for y"),
        (TypeError, {"mean_x": torch.zeros(2)}, "mean_x must be torch.float64"),
        (ValueError, {"count": torch.zeros(1, dtype=torch.int64)}, r"count must have shape \(\)"),
        (ValueError, {"comoment": torch.zeros(3, 2).double().T}, "comoment must be contiguous"),
        (
            ValueError,
            {"comoment": torch.zeros(3, 2).double()},
            r"comoment must have shape \(2, 3\)",
        ),
        (TypeError, {"mask": torch.ones(4)}, "mask must be bool, got torch.float32"),
        (ValueError, {"mask": torch.ones(5, dtype=torch.bool)}, "mask must have the shape of x"),
    ],
)
def test_errors_name_the_rule_and_the_values(
    error: type[Exception], change: dict, message: str
) -> None:
    arguments = vars(State.empty(2, 3)) | {
        "x": torch.ones(4, 2), "y": torch.ones(4, 3), "dim": 1, "mask": None
    }  # fmt: skip
    with pytest.raises(error, match=r"nlm\.cross_moments_: .*" + message):
        cross_moments_(**(arguments | change))


def test_state_that_shares_memory_is_refused() -> None:
    square = torch.zeros(2, 2, dtype=torch.float64)
    for change, overlap in (
        ({"m2_x": square[0], "comoment": square}, "m2_x with comoment|comoment with m2_x"),
        ({"mean_x": square[0], "m2_x": square[0]}, "mean_x with m2_x|m2_x with mean_x"),
        ({"comoment": square, "x": square}, "comoment with x"),
    ):
        state = State(**(vars(State.empty(2)) | {k: v for k, v in change.items() if k != "x"}))
        with pytest.raises(ValueError, match="must not share memory .* overlap of " + overlap):
            state.add(change.get("x", torch.ones(4, 2)))
    assert (square == 0).all()


def test_autograd_knows_that_the_state_has_changed() -> None:
    state, leaf = State.empty(2, 3), torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    product = leaf * state.comoment
    state.add(_normal(5, 2), _normal(5, 3, seed=1))
    assert all(tensor._version == 1 for tensor in vars(state).values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_no_gradient_reaches_the_streams() -> None:
    state = State.empty(2).add(_normal(5, 2).requires_grad_())
    assert not any(t.requires_grad for t in vars(state).values() if t is not None)
    with pytest.raises(TypeError, match=r"nlm\.cross_moments_: .* got one of shape \(5, 2\)"):
        torch.func.jvp(lambda x: state.add(x).comoment, *[(_normal(5, 2),)] * 2)
    state.mean_x.requires_grad_()
    with pytest.raises(ValueError, match=r"nlm\.cross_moments_: mean_x .*got requires_grad True"):
        state.add(_normal(5, 2))


def test_inference_tensors_can_be_written_to() -> None:
    with torch.inference_mode():
        assert State.empty(2).add(_normal(5, 2)).count == 5


def test_arguments_of_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"nlm\.cross_moments_: x must be a tensor, got list"):
        State.empty(1).add([[1.0]])
    state = State.empty(1)
    state.count = 0
    with pytest.raises(TypeError, match=r"nlm\.cross_moments_: count must be a tensor, got int"):
        state.add(torch.ones(1, 1))


@pytest.mark.parametrize("samples", [301, 2048])
def test_a_far_first_sample_costs_the_mean_nothing(samples):
    """Found by 2,000 examples: float64 is summed about the first sample: 38,000 roundings once."""
    torch.manual_seed(0)
    x = 1e-6 * torch.randn(samples, 9, dtype=torch.float64)
    x[0] = 8 + torch.rand(9, dtype=torch.float64)
    state = State.empty(9, 3).add(x, x[:, :3])
    for found, columns in ((state.mean_x, x.T), (state.mean_y, x.T[:3])):
        exact = [math.fsum(each) / samples for each in columns.tolist()]
        exact = torch.tensor(exact, dtype=torch.float64)
        torch.testing.assert_close(found, exact, rtol=ROUNDINGS[torch.float64] * 2.0**-52, atol=0)
