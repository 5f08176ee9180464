"""The Triton kernels as they ship, compiled for GPUs that are not here: facts of their code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# Of one multiprocessor: bytes of shared memory for blocks, bytes that each block takes besides.
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10}
SHARED_PER_BLOCK = 1 << 10
REGISTERS, MOST_WARPS = 64 << 10, 64


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    script = Path(__file__).with_name("_compile_triton.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def label(facts: dict) -> str:
    return f"{facts['name']} for {facts['target']}"


def resident_warps(facts: dict) -> int:
    """Warps of the kernel that one multiprocessor holds at a time."""
    registers = -(-facts["registers"] // 8) * 8 * 32 * facts["warps"]
    shared = facts["shared"] + SHARED_PER_BLOCK
    blocks = min(REGISTERS // registers, SHARED_MEMORY[facts["target"]] // shared)
    return min(blocks * facts["warps"], MOST_WARPS)


def test_all_targets_compile_without_spills(compiled: list[dict]) -> None:
    assert {facts["target"] for facts in compiled} == {"sm_80", "sm_90", "gfx942"}
    assert [label(facts) for facts in compiled if facts["spills"]] == []


def test_products_run_on_tensor_cores(compiled: list[dict]) -> None:
    products = [facts for facts in compiled if "product" in facts["name"]]
    assert len(products) > 10
    for facts in products:
        assert facts["mma"] > 0, label(facts)
        if facts["target"] != "gfx942":
            assert facts["mma_in_loops"] == facts["mma"], label(facts)


def test_inputs_are_read_in_16_bytes(compiled: list[dict]) -> None:
    kinds = ("channel_moments", "centre", "product")
    readers = [f for f in compiled if "registers" in f and any(kind in f["name"] for kind in kinds)]
    assert len(readers) > 20
    for facts in readers:
        found = "wide_loads" if "centre" in facts["name"] else "wide_loads_in_loops"
        assert facts[found] > 0, label(facts)


def test_descriptors_are_copied_by_tma(compiled: list[dict]) -> None:
    asked = [facts for facts in compiled if "TMA" in facts["name"]]
    assert [facts["target"] for facts in asked] == ["sm_90"] * 2
    for facts in compiled:
        if "registers" in facts:
            assert (facts["bulk_copies"] > 0) == ("TMA" in facts["name"]), label(facts)


def test_occupancy(compiled: list[dict]) -> None:
    for facts in compiled:
        if "registers" in facts:
            floor = 8
            assert resident_warps(facts) >= floor, label(facts)
