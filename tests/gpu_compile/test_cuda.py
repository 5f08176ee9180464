"""The CUDA files compile for every architecture, without warnings and without spills."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gpu_compile._sass import WIDE_LOAD, WIDE_STORE, tool

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = (80, 90, 100)
STEMS = sorted(path.stem for path in CSRC.glob("*.cu"))
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v", f"-I{CSRC}"]

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def compile_file(source: Path, folder: Path) -> tuple[Path, str]:
    """The object file, and what ptxas reports."""
    assert NVCC is not None
    target = folder / f"{source.stem}.o"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    done = subprocess.run(
        [NVCC, *FLAGS, *codes, "-c", str(source), "-o", str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return target, done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("cuda")
    sources = sorted(CSRC.glob("*.cu"))
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda source: compile_file(source, folder), sources))
    return {source.stem: result for source, result in zip(sources, results, strict=True)}


def test_no_spills_on_any_architecture(compiled: dict[str, tuple[Path, str]]) -> None:
    assert set(compiled) == set(STEMS)
    for stem, (_, report) in compiled.items():
        targets = re.findall(r"for '(sm_\d+)'", report)
        assert set(targets) == {f"sm_{a}" for a in ARCHITECTURES}, stem
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", report
        )
        assert len(frames) >= len(targets), stem
        assert set(frames) == {("0", "0", "0")}, stem


def test_every_thread_fits_full_blocks(compiled: dict[str, tuple[Path, str]]) -> None:
    """At most 80 registers: three blocks of 256 threads on a multiprocessor."""
    for stem, (_, report) in compiled.items():
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
        assert registers and max(registers) <= 80, stem


@pytest.mark.parametrize("stem", STEMS)
def test_runs_move_in_16_bytes(stem: str, compiled: dict[str, tuple[Path, str]]) -> None:
    command = [tool("cuobjdump"), "-sass", "-arch", "sm_90", str(compiled[stem][0])]
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    code = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    ).stdout
    assert re.search(WIDE_LOAD, code)
    few = {"inner_products", "magnitude_threshold"}  # numbers are written
    assert re.search(WIDE_STORE, code) or stem in few


def test_module_imports_without_a_driver() -> None:
    module = pytest.importorskip("nlm._C_cuda", reason="nlm._C_cuda was not built")
    tokens = (0, 2, 1 << 16, 768, 1, 768, 1, 1)  # float32 [65536, 768]
    assert module.scale_shift_partial_rows(tokens, 8) == 33  # by 12 blocks of channels
