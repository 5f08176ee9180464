"""Every example in a docstring of the package runs, and shows what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nlm"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module(module: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(module)
    result = doctest.testmod(found)
    assert result.failed == 0
    assert result.attempted > 0 or "+SKIP" in Path(str(found.__file__)).read_text()


def test_the_operations_have_examples() -> None:
    assert sum(module.startswith("nlm.ops.") for module in MODULES) >= 12
