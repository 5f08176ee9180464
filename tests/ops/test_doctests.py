"""The examples in the docstrings of the operations run as they are written."""

import doctest
import sys

import pytest

from nlm._registry import operations

STEMS = sorted({operation.stem for operation in operations().values()})


@pytest.mark.parametrize("stem", STEMS)
def test_examples(stem: str) -> None:
    results = doctest.testmod(sys.modules[f"nlm.ops.{stem}"])
    assert results.attempted > 0
    assert results.failed == 0
