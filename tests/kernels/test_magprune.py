"""The Triton kernel in the interpreter, against the reference, bit for bit."""

import pytest
from _triton_interpreter import interpreted

pytest.importorskip("triton", reason="triton is not installed")


def test_interpreted() -> None:
    results = interpreted("magprune")
    assert len(results) > 60
    assert [result["name"] for result in results if not result["same"]] == []
