"""The Triton kernel in the interpreter, against the reference."""

import pytest
from _triton_interpreter import interpreted

pytest.importorskip("triton", reason="triton is not installed")

# Relative to the standard deviation, and relative: what the operation promises for float32 about a
# mean of 1e4, and float64's rounding there.
MEAN = {"torch.float64": 1e-11}
M2 = {"torch.float64": 1e-13}


def test_interpreted() -> None:
    results = interpreted("channel_moments")
    assert len(results) > 50
    for result in results:
        assert result["count"] and result["specials"], result
        assert result["mean"] <= MEAN.get(result["dtype"], 1e-6), result
        assert result["m2"] <= M2.get(result["dtype"], 1e-6), result
