"""Writes docs/roofline.md: the time that data sheets allow for each workload of gpu_suite.py.

    python benchmarks/roofline.py

The time is that of the bytes at the memory's rate or of the flops at the arithmetic's, whichever is
longer; beside it stands what results/gpu_suite.json measured, where that exists. A test fails where
the page is not what this script would write.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_suite
from _gpu import nlm_seconds
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "roofline.md"
MEASURED = ROOT / "benchmarks" / "results" / "gpu_suite.json"
#: Products of float16 numbers that cross_moments_ makes one of, by the type of its streams.
SPLIT_INTO = {"float32": 3, "bfloat16": 1, "float16": 1}


@dataclass(frozen=True)
class Gpu:
    """Of the maker's data sheet: GB/s of memory, TFLOP/s per type without sparsity."""

    name: str
    memory: float
    vector: float  # float32, no tensor cores
    tensor: dict[str, float]


GPUS = (
    Gpu("H100 SXM 80 GB", 3350, 66.9, {"float32": 494.7, "bfloat16": 989.4, "float16": 989.4}),
    Gpu("A100 SXM 80 GB", 2039, 19.5, {"float32": 156.0, "bfloat16": 312.0, "float16": 312.0}),
)


@dataclass(frozen=True)
class Need:
    """What a workload moves and computes."""

    op: str
    workload: str
    dtype: str
    bytes: float
    flops: float
    multiplies: bool

    def seconds(self, gpu: Gpu) -> tuple[float, float]:
        """Of its bytes, and of its flops."""
        rate = gpu.tensor["float16"] / SPLIT_INTO[self.dtype] if self.multiplies else gpu.vector
        return self.bytes / gpu.memory / 1e9, self.flops / rate / 1e12


class MetaForCuda(TorchFunctionMode):
    """What is asked for on "cuda" is made on "meta": it has a size and a type, and no memory."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = ("meta" if isinstance(each, str) and each == "cuda" else each for each in args)
        changed = dict(kwargs or {})
        if changed.get("device") == "cuda":
            changed["device"] = "meta"
        return function(*args, **changed)


def needs() -> Iterator[Need]:
    """Of all workloads of gpu_suite.py, on a machine without a GPU too."""
    with MetaForCuda():
        for work in gpu_suite.workloads():
            multiplies = work.limit == "gemm"
            amounts = (work.other, work.amount) if multiplies else (work.amount, work.other)
            dtype = str(work.dtype).removeprefix("torch.")
            yield Need(work.op, work.name, dtype, *amounts, multiplies)


def measured() -> tuple[str, dict[tuple[str, str, str], float]]:
    """The GPU that gpu_suite.py ran on, and nlm's seconds; "" and nothing before the first run."""
    if not MEASURED.exists():
        return "", {}
    report: dict[str, Any] = json.loads(MEASURED.read_text())
    return report["gpu"], nlm_seconds(report["measure"])


def page() -> str:
    gpu, times = measured()
    header = ["operation", "workload", "type", "MB", "GFLOP", "bound by"]
    header += [each.name for each in GPUS] + ([gpu, "of the H100's"] if gpu else [])
    lines = [
        "# Roofline of the GPU kernels",
        "",
        "Made by `benchmarks/roofline.py`. The time that an operation needs at least on a GPU: that"
        " of its bytes at the memory's rate or of its flops at the arithmetic's, whichever is "
        "longer, both from the maker's data sheets. Launches, caches and clocks are left out; "
        "what fits into a cache (50 MB on an H100) may take less.",
        "",
        *(
            f"- {each.name}: {each.memory:.0f} GB/s; TFLOP/s {each.vector} float32, "
            f"{each.tensor['float32']} tf32, {each.tensor['bfloat16']} bfloat16"
            for each in GPUS
        ),
        "- `cross_moments_` makes each float32 product of three float16 products on the tensor "
        "cores, and one of bfloat16 or float16 of one where the values allow.",
        "",
        f"Measured: the median of `benchmarks/gpu_suite.py` on {gpu}."
        if gpu
        else "Nothing here was run on a GPU yet.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * 3 + "|--:|--:|---" + "|--:" * (len(header) - 6) + "|",
    ]
    for need in needs():
        bounds = [need.seconds(each) for each in GPUS]
        by = "flops" if bounds[0][1] > bounds[0][0] else "bytes"
        cells = [f"`{need.op}`", need.workload, need.dtype]
        cells += [f"{need.bytes / 1e6:.1f}", f"{need.flops / 1e9:.3g}" if need.flops else "-", by]
        cells += [_microseconds(max(each)) for each in bounds]
        if gpu:
            time = times.get((need.op, need.workload, need.dtype))
            cells += (
                ["-", "-"]
                if time is None
                else [_microseconds(time), f"{max(bounds[0]) / time:.0%}"]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.4g} us"


if __name__ == "__main__":
    PAGE.write_text(page())
