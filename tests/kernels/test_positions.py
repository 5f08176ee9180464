"""Where the Triton kernels read, in the interpreter, against Python's integers."""

import pytest
from _triton_interpreter import interpreted

pytest.importorskip("triton", reason="triton is not installed")


def test_interpreted() -> None:
    results = interpreted("positions")
    assert len(results) == 9
    for result in results:
        assert result["right"], result
