"""What gpu_suite.py times, and what it concludes about tensor descriptors (NLM_TMA=1)."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NOISE = 1.02


@dataclass(frozen=True)
class Workload:
    """Providers of one result; ``amount`` is the bytes, or the flops for "gemm", that it needs.

    ``other`` is the flops, or the bytes for "gemm", which docs/roofline.md sets beside them.
    ``error`` takes a provider's first result.
    """

    op: str
    name: str
    dtype: torch.dtype
    providers: dict[str, Callable[[], Any]]
    amount: float
    limit: str
    other: float = 0.0
    error: Callable[[Any], float] | None = None


def nlm_seconds(measured: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """nlm's seconds by (operation, workload, type), of a report's "measure" or "measure_tma"."""
    return {
        (row["op"], row["workload"], row["dtype"]): row["median_s"]
        for row in measured.get("result", {"rows": []})["rows"]
        if row["provider"] == "nlm" and "median_s" in row
    }


def tma_defaults(report: dict[str, Any]) -> dict[str, Any]:
    """Per operation the speed with descriptors over that with pointers, and the better default.

    That is "descriptors" where all that was timed with pointers was timed with them too, none of it
    slower by more than 2 % and the median faster by more than that.
    """
    pointers, descriptors = (nlm_seconds(report[name]) for name in ("measure", "measure_tma"))
    defaults: dict[str, Any] = {}
    for op in sorted({key[0] for key in descriptors}):
        keys = [key for key in pointers if key[0] == op]
        speedups = {
            f"{name} {dtype}": pointers[op, name, dtype] / descriptors[op, name, dtype]
            for _, name, dtype in keys
            if (op, name, dtype) in descriptors
        }
        ratios = list(speedups.values())
        better = (
            len(ratios) == len(keys) > 0
            and min(ratios) >= 1 / NOISE
            and statistics.median(ratios) > NOISE
        )
        defaults[op] = {"default": "descriptors" if better else "pointers", "speedups": speedups}
    return defaults
