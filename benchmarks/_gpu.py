"""What gpu_suite.py times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Workload:
    """Providers of one result; ``amount`` is the bytes, or the flops for "gemm", that it needs."""

    op: str
    name: str
    dtype: torch.dtype
    providers: dict[str, Callable[[], Any]]
    amount: float
    limit: str
    error: Callable[[Any], float] | None = None
