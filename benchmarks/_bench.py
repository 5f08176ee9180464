"""The one place for timing: checks, times, compares with what the machine can do, writes JSON.

A benchmark file ``bench_<stem>.py`` yields :class:`Workload` objects and ends in
``main("<stem>", workloads)``. Each workload names its providers: "nlm", the natural PyTorch
expression, and the fastest stock composition that is known. All providers of a workload see the
same data, are checked against the same truth before any of them is timed, and take turns, so that
a noisy machine is noisy for all. Times are medians; speeds count the bytes or flops that the
operation needs, not those that a provider happens to move, and are given as a fraction of a read, a
copy or a float32 GEMM measured in the same run.

"nlm" must keep the error that it promises. A peer works in the precision it has, and must be near
enough (``PEER_ERROR``) to be computing the same thing.

    python benchmarks/bench_channel_moments.py [--workload PART] [--threads N] [--seconds S]
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nlm

RESULTS = Path(__file__).parent / "results"
LIMIT_ELEMENTS = 1 << 26  # 256 MiB of float32: beyond every cache
MOST_ROUNDS = 50
PEER_ERROR = 0.05  # bfloat16 sums of uncentred products err by 0.017


@dataclass(frozen=True)
class Workload:
    """One input of an operation and everyone who computes it.

    Attributes
    ----------
    providers : mapping of str to callable
        Take nothing and return tensors in the form of ``truth``. "nlm" is one of them.
    truth : sequence of Tensor
        float64 results.
    most_error : float
        What "nlm" may err, relative to the largest entry of each result; more stops the benchmark,
        as do more than ``PEER_ERROR`` of another and a NaN of any.
    amount : float
        Bytes, or flops where ``limit`` is "gemm", that the operation needs.
    limit : str
        "read", "copy" or "gemm".
    """

    name: str
    dtype: torch.dtype
    providers: Mapping[str, Callable[[], Any]]
    truth: tuple[Tensor, ...]
    most_error: float
    amount: float
    limit: str


def error(results: Any, truth: tuple[Tensor, ...]) -> float:
    """The largest of all entries, relative to the largest of each result; inf for a NaN."""
    given = (results,) if isinstance(results, Tensor) else tuple(results)
    worst = 0.0
    for result, exact in zip(given, truth, strict=True):
        difference = (result.double() - exact).abs().max().item()
        relative = difference / (exact.abs().max().item() or 1.0)
        worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def check_errors(op: str, work: Workload, errors: Mapping[str, float]) -> None:
    for name, err in errors.items():
        most = work.most_error if name == "nlm" else PEER_ERROR
        if not err <= most:
            raise SystemExit(
                f"{op}, {work.name}: {name} errs by {err:.1e}, allowed is {most:.1e}; "
                "nothing is timed"
            )


def time_in_turns(providers: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds per call of each provider; ``seconds`` is spent on all of them together."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for call in providers.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and len(next(iter(times.values()))) < MOST_ROUNDS:
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def measure_limits(seconds: float) -> dict[str, float]:
    """GB/s of a read and of a copy (both directions counted), GFLOP/s of a float32 GEMM."""
    x = torch.ones(LIMIT_ELEMENTS)
    y = torch.empty_like(x)
    a = torch.ones(2048, 2048)
    calls = {"read": x.sum, "copy": lambda: y.copy_(x), "gemm": lambda: a @ a}
    amounts = {"read": 4.0 * x.numel(), "copy": 8.0 * x.numel(), "gemm": 2.0 * 2048**3}
    medians = time_in_turns(calls, 3 * seconds)
    return {name: amounts[name] / medians[name] / 1e9 for name in calls}


def run(op: str, workloads: Iterable[Workload], limits: dict[str, float], seconds: float) -> list:
    rows = []
    for work in workloads:
        errors = {name: error(call(), work.truth) for name, call in work.providers.items()}
        check_errors(op, work, errors)
        medians = time_in_turns(work.providers, seconds)
        for name, median in medians.items():
            rate = work.amount / median / 1e9
            row = {
                "op": op,
                "workload": work.name,
                "dtype": str(work.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "provider": name,
                "median_s": median,
                "gflops" if work.limit == "gemm" else "gbps": rate,
                "fraction_of_limit": rate / limits[work.limit],
                "error": errors[name],
            }
            rows.append(row)
            print(
                f"{work.name:<28} {row['dtype']:<9} {name:<24} {1e3 * median:9.3f} ms {rate:8.2f} "
                f"{'GFLOP/s' if work.limit == 'gemm' else 'GB/s':<7} "
                f"{100 * row['fraction_of_limit']:5.0f} % of {work.limit}  "
                f"x{median / medians['nlm']:6.2f}  error {errors[name]:.1e}",
                flush=True,
            )
    return rows


def machine() -> str:
    """A folder name: the processor and its number of cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        model = found.group(1)
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {os.cpu_count()} cores".lower()).strip("-")


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        text=True,
        capture_output=True,
    )
    return done.stdout.strip() or "unknown"


def main(op: str, workloads: Callable[[], Iterable[Workload]]) -> None:
    """Command line of a benchmark file; ``workloads`` is called after the threads are set."""
    parser = argparse.ArgumentParser(description=f"Times nlm.ops.{op} beside its peers.")
    parser.add_argument("--workload", default="", help="only workloads whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each workload")
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / f"{op}.json")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    limits = measure_limits(min(options.seconds, 1.0))
    print(", ".join(f"{name} {rate:.1f}" for name, rate in limits.items()), "(GB/s, GFLOP/s)")
    chosen = (work for work in workloads() if options.workload in work.name)
    rows = run(op, chosen, limits, options.seconds)
    facts = nlm.info()
    report = {
        "machine": machine(),
        "instruction set": facts["instruction set"],
        "versions": facts["versions"],
        "commit": commit(),
        "limits": limits,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.json}")
