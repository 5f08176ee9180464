"""The Triton kernel in the interpreter, where products are exact, against the reference."""

import pytest
from _triton_interpreter import interpreted

pytest.importorskip("triton", reason="triton is not installed")

# Relative to sqrt(m2_x m2_y): what the operation promises for float32, and float64's rounding.
COMOMENT = {"torch.float64": 1e-12}


def test_interpreted() -> None:
    results = interpreted("cross_moments")
    assert len(results) > 50
    for result in results:
        assert result["count"] and result["specials"], result
        assert result["symmetric"] and result["diagonal"], result
        assert result["m2"] <= 1e-6, result
        assert result["comoment"] <= COMOMENT.get(result["dtype"], 2e-6), result
