"""The house keeps its order: one stem, five rooms; arrows run one way; the core knows no torch."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nlm._registry import operations

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nlm"
STEMS = sorted({operation.stem for operation in operations().values()})
LONGEST_FILE = 400

# What a room may import besides itself. Leaves are open to every room above ops, and import leaves;
# `_registry` and `_native` belong to ops, `_core` to them and to streaming; `_info` reports on all.
# Rooms that are not listed (pipeline, cli, ...) stand above all of these.
LEAVES = {
    "checkpoint", "_coefficients", "_functions", "_least_squares", "_methods",
    "_modules", "_multitask", "_names", "_random", "_results", "_sparse", "_state_dict",
}  # fmt: skip
BELOW: dict[str, set[str]] = {
    **{leaf: {"_core"} for leaf in LEAVES},
    "kernels": set(),
    "_core": set(),
    "_native": {"_core"},
    "_registry": {"ops", "_core"},
    "ops": {"_registry", "_core", "_native", "_random", "kernels"},
    "_info": {"_registry", "_native"},
    "streaming": {"_core", "symmetry"},
    "symmetry": {"ops"},
    "statistics": {"ops", "symmetry"},
    "evaluate": {"ops", "symmetry", "statistics"},
    "gauge": {"ops", "symmetry"},
    "align": {"ops", "symmetry", "statistics", "gauge"},
    "merge": {"ops", "symmetry", "statistics"},
    "correct": {"ops", "symmetry", "statistics"},
}
CORE = {"kernels", "_core", "_native", "_registry", "ops", "_info"}
FEW_KNOW = {"torch.library": "_registry", "nlm._C": "_core", "nlm._C_cuda": "_core"}


def python_files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def room_of(path: Path) -> str:
    """First part of a module's name below nlm: "ops" for nlm/ops/permute.py."""
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_five_rooms(stem: str) -> None:
    rooms = {
        "front room": [f"nlm/ops/{stem}.py"],
        "CPU kernel": [f"csrc/{stem}.cpp"],
        "CPU kernel's header": [f"csrc/{stem}.h"],
        "test": [f"tests/ops/test_{stem}.py"],
        "conformance samples": [f"tests/ops/samples_{stem}.py"],
        "benchmark": [f"benchmarks/bench_{stem}.py"],
    }
    operators = [each for each in operations().values() if each.stem == stem]
    if not all(operation.cpu_only for operation in operators):
        rooms["GPU kernel"] = [f"kernels/{stem}.py", f"csrc/{stem}.cu"]
    for room, places in rooms.items():
        found = [place for place in places if (ROOT / place).is_file()]
        assert len(found) == 1, f"{stem}: {room} must be one of {places}, found {found}"


def test_every_room_belongs_to_an_operation() -> None:
    kernels = [path for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_")]
    front = [path for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_")]
    sources = [path for path in (ROOT / "csrc").glob("*.c*") if not path.stem.startswith("bind")]
    samples = {
        path.stem.removeprefix("samples_") for path in (ROOT / "tests/ops").glob("samples_*.py")
    }
    assert {path.stem for path in [*kernels, *front, *sources]} | samples == set(STEMS)


@pytest.mark.parametrize(
    "path", python_files(PACKAGE, ROOT / "kernels"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_arrows_run_one_way(path: Path) -> None:
    room = room_of(path)
    for name in imported(path):
        for secret, keeper in FEW_KNOW.items():
            assert not (f"{name}.").startswith(f"{secret}.") or room == keeper, (
                f"only nlm/{keeper}.py knows {secret}"
            )
        if room not in BELOW or not name.startswith("nlm."):
            continue
        target = name.split(".")[1]
        leaves = set() if room in CORE else LEAVES
        assert target in BELOW[room] | leaves | {room}, f"{room} imports {name}"


def test_nobody_imports_integrations() -> None:
    for path in python_files(PACKAGE, ROOT / "kernels"):
        if room_of(path) != "integrations":
            assert not any(name.startswith("nlm.integrations") for name in imported(path)), path


def test_operations_know_no_model() -> None:
    for path in python_files(PACKAGE / "ops", ROOT / "kernels"):
        assert not any(f"{name}.".startswith("torch.nn.") for name in imported(path)), path


def test_only_bind_files_know_python() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu"} and not path.stem.startswith("bind"):
            assert not re.search(r"pybind11|Python\.h", path.read_text()), path


def test_core_includes_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu"}:
            includes = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text())
            assert not any(re.match(r"torch|ATen|c10", name) for name in includes), path


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        *((f"nlm{room}", "torch") for room in ("", ".checkpoint", ".streaming", "._coefficients")),
        ("nlm", "numpy"),
    ],
)
def test_import_is_light(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_are_short() -> None:
    folders = [PACKAGE, *(ROOT / name for name in ("kernels", "csrc", "tests", "benchmarks"))]
    for folder in folders:
        for path in folder.rglob("*"):
            if path.suffix in {".py", ".h", ".cpp", ".cu"}:
                lines = len(path.read_text().splitlines())
                assert lines <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {lines} lines"
