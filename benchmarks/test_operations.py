"""The workloads of all operations under pytest-benchmark: checked, then timed one by one.

    pytest benchmarks/ [-k OP] [--benchmark-disable] [--benchmark-json FILE]

A group of its table is a workload. Unlike ``nlm bench`` it gives each provider its time in one
piece, so compare on a quiet machine.
"""

import copy
import functools
from typing import Any

import pytest
from _bench import check, limit_beside, source, speed, stems


@pytest.mark.parametrize("stem", stems())
def test_operation(stem: str, benchmark: Any) -> None:
    benchmark.skipped = True  # it is the pattern of those that are used
    for work in source(stem)():
        errors = check(stem, work)
        if benchmark.disabled:
            continue
        for name, call in work.providers.items():
            timing = copy.copy(benchmark)
            timing.group = f"{stem}, {work.name}, {work.dtype_name}"
            timing.name = name
            timing.fullname = f"{timing.group}, {name}"
            _, limit = limit_beside(work, functools.partial(timing, call))
            seconds = timing.stats.stats.median
            timing.extra_info = {"error": errors[name], **speed(work, seconds, limit)}
