"""What gpu_suite.py times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


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
