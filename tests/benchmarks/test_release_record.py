"""What .ci/release keeps of its trials: one of a kind, in order, whatever versions are called."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / ".ci" / "keep_release.py"
VERSIONS = (
    "2.9.1", "2.14.0", "2.15.0.dev20261101+cu130", "2.15.0a0+git1a2b3c4", "2.15.0rc2", "2.15.0",
)  # fmt: skip


@pytest.fixture(scope="module")
def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("keep_release", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(torch: str, first: str = "torch", python: str = "3.12.1", **more) -> dict:
    return {"python": python, "versions": {"torch": torch}, "first": first, **more}


def test_versions_of_the_night_are_in_order(record: ModuleType) -> None:
    """PyTorch's own development versions and candidates, before their release."""
    rows = [row(each, first) for each in reversed(VERSIONS) for first in ("nlm._C", "torch")]
    rows.append(row("2.9.1", python="3.10.13", least={"torch": "2.9.1"}))
    rows.append(row("2.9.1", python="3.15.0rc1"))
    found = record.joined({"files": {}, "rows": []}, rows, {})["rows"]
    order = [VERSIONS[i] for i in (0, 1, 2, 3, 4, 5)]
    assert [each["versions"]["torch"] for each in found[1:-1:2]] == order
    assert [each["first"] for each in found[1:-1]] == ["torch", "nlm._C"] * len(VERSIONS)
    assert "least" in found[0] and found[-1]["python"] == "3.15.0rc1"


def test_a_trial_takes_the_place_of_its_like(record: ModuleType) -> None:
    old = {"files": {}, "rows": [row("2.14.0+cu126", at=1), row("2.9.1", python="3.11.7", at=1)]}
    found = record.joined(old, [row("2.14.0", at=2), row("2.14.0", "nlm._C", at=2)], {})["rows"]
    assert [each["at"] for each in found] == [1, 2, 2]
    least = row("2.9.1", python="3.10.13", least={"torch": "2.9.1"})
    raised = row("2.10.0", python="3.10.13", least={"torch": "2.10.0"})
    assert record.joined({"files": {}, "rows": [least]}, [raised], {})["rows"] == [raised]


def test_older_wheels_go(record: ModuleType) -> None:
    """One for each Python, and one sdist; those of a Python that was not built stay."""
    end = "manylinux_2_34_x86_64.whl"
    files = {
        f"nlm-0.1.0-cp310-cp310-{end}": 1, f"nlm-0.1.0-cp311-cp311-{end}": 2, "nlm-0.1.0.tar.gz": 3,
        f"nlm-0.1.0-1-cp312-cp312-{end}": 4,
    }  # fmt: skip
    made = {
        f"nlm-0.2.0-cp310-cp310-{end}": 5, "nlm-0.2.0-cp312-cp312-manylinux_2_38_x86_64.whl": 6,
        "nlm-0.2.0.tar.gz": 7,
    }  # fmt: skip
    found = record.joined({"files": files, "rows": []}, [], made)["files"]
    assert found == made | {f"nlm-0.1.0-cp311-cp311-{end}": 2}
