"""Every script of the benchmarks can be imported: what it uses is still there."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(
    path.stem
    for folder in (BENCHMARKS, BENCHMARKS / "experiments")
    for path in folder.glob("*.py")
    if not path.stem.startswith("test_")
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_imported(name: str) -> None:
    importlib.import_module(name)
