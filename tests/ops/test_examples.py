"""The examples in the docstrings of the operations."""

import doctest
from importlib import import_module

import pytest

from nlm._registry import operations

STEMS = sorted({operation.stem for operation in operations().values()})


@pytest.mark.parametrize("module", [*(f"nlm.ops.{stem}" for stem in STEMS), "nlm._info"])
def test_examples(module: str) -> None:
    result = doctest.testmod(import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
