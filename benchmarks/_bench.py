"""The one place for timing: checks, times, compares with what the machine can do, writes JSON.

A benchmark file ``bench_<stem>.py`` yields :class:`Workload` objects and ends in
``main("<stem>", workloads)``. Each workload names its providers: "nlm", the natural PyTorch
expression, and then the stock compositions of which the fastest is the peer that counts. All
providers of a workload see the same data, are checked against the same truth before any of them is
timed, and take turns, so that a noisy machine is noisy for all. Times are medians; speeds count the
bytes or flops that the operation needs, not those that a provider happens to move, and are given as
a fraction of a read, a copy or a float32 GEMM, measured right before and after the workload.

"nlm" must keep the error that it promises. A peer works in the precision it has, and must be near
enough (``PEER_ERROR``) to be computing the same thing.

The "copy" that fractions refer to goes into memory that was written before. An operation that
returns a new large tensor has its memory zeroed by the system first, and is still held to that
copy; the report's "fresh copy", into new memory in large pages, says how much of it is then in
reach.

Three ways to run the same workloads:

    nlm bench [OP] [--peers] [--workload PART] [--threads N] [--quick] [--json FILE]
    pytest benchmarks/ [-k OP]          (under pytest-benchmark; --benchmark-disable only checks)
    python benchmarks/bench_<stem>.py   (one operation with its peers)
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import nlm
from nlm._native import fresh
from nlm._registry import operations

RESULTS = Path(__file__).parent / "results"
LIMIT_ELEMENTS = 1 << 26  # 256 MiB of float32: beyond every cache
LIMIT_ROUNDS = 3
MOST_ROUNDS = 50
PEER_ERROR = 0.05  # bfloat16 sums of uncentred products err by 0.017
SECONDS = 3.0  # for all providers of a workload together

Source = Callable[[], "Iterable[Workload]"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workload:
    """One input of an operation and everyone who computes it.

    Attributes
    ----------
    providers : mapping of str to callable
        Take nothing and return tensors in the form of ``truth``: "nlm", then the natural
        expression, then others; "nlm ..." is another way through nlm, no peer.
    truth : sequence of Tensor, or callable
        float64 results, or what makes them where that takes long and the workload may not be run.
    most_error : float
        What "nlm" may err, relative to the largest entry of each result; more stops the benchmark,
        as do more than ``PEER_ERROR`` of another and a NaN of any.
    amount : float
        Bytes, or flops where ``limit`` is "gemm", that the operation needs.
    limit : str, optional
        "read", "copy" or "gemm"; None for work that none of them bounds.
    """

    name: str
    dtype: torch.dtype
    providers: Mapping[str, Callable[[], Any]]
    truth: tuple[Tensor, ...] | Callable[[], tuple[Tensor, ...]]
    most_error: float
    amount: float
    limit: str | None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def only(self, names: Iterable[str]) -> "Workload":
        return replace(self, providers={name: self.providers[name] for name in names})


def error(results: Any, truth: tuple[Tensor, ...]) -> float:
    """The largest of all entries, relative to the largest of each result; inf for a NaN."""
    given = (results,) if isinstance(results, Tensor) else tuple(results)
    worst = 0.0
    for result, exact in zip(given, truth, strict=True):
        difference = (result.double() - exact).abs().max().item()
        relative = difference / (exact.abs().max().item() or 1.0)
        worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def check(op: str, work: Workload) -> dict[str, float]:
    """Errors by provider; a SystemExit where one is too large to be worth a time."""
    truth = work.truth() if callable(work.truth) else work.truth
    errors = {name: error(call(), truth) for name, call in work.providers.items()}
    for name, err in errors.items():
        most = work.most_error if name == "nlm" else PEER_ERROR
        if not err <= most:
            raise SystemExit(
                f"{op}, {work.name}: {name} errs by {err:.1e}, allowed is {most:.1e}; "
                "nothing is timed"
            )
    return errors


def time_in_turns(providers: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds per call of each provider; ``seconds`` is spent on all of them together.

    With 0 seconds each is called once, unwarmed.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    if seconds > 0:
        for call in providers.values():
            call()
    end = time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        if turn > 0 and time.perf_counter() >= end:
            break
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


@cache
def _limits() -> dict[str, tuple[float, Callable[[], Any]]]:
    """Limit -> the bytes or flops of a call, and the call; the tensors are kept."""
    x = torch.ones(LIMIT_ELEMENTS)
    y = torch.empty_like(x)
    a = torch.ones(2048, 2048)
    return {
        "read": (4.0 * x.numel(), x.sum),
        "copy": (8.0 * x.numel(), lambda: y.copy_(x)),
        "fresh copy": (8.0 * x.numel(), lambda: fresh(torch.empty_like(x)).copy_(x)),
        "gemm": (2.0**34, lambda: a @ a),
    }


def measure_limits(seconds: float) -> dict[str, float]:
    """GB/s of a read and of copies (both directions counted), GFLOP/s of a float32 GEMM."""
    medians = time_in_turns({name: call for name, (_, call) in _limits().items()}, 3 * seconds)
    return {name: amount / medians[name] / 1e9 for name, (amount, _) in _limits().items()}


def limit_beside(
    work: Workload, run: Callable[[], Result], rounds: int = LIMIT_ROUNDS
) -> tuple[Result, float | None]:
    """What ``run`` returns, and the rate of the workload's limit right before and after it.

    Other work on the machine comes and goes within minutes and slows the limit down too.
    """
    if work.limit is None:
        return run(), None
    amount, call = _limits()[work.limit]

    def seconds() -> float:
        return statistics.median(timeit.repeat(call, number=1, repeat=rounds))

    before = seconds()
    result = run()
    return result, amount / statistics.mean((before, seconds())) / 1e9


def rows_of(op: str, work: Workload, seconds: float) -> list[dict[str, Any]]:
    """Checks and times one workload; prints and returns a row for each provider."""
    errors = check(op, work)
    rounds = LIMIT_ROUNDS if seconds > 0 else 1
    medians, limit = limit_beside(work, lambda: time_in_turns(work.providers, seconds), rounds)
    rows = []
    for name, median in medians.items():
        row = {
            "op": op,
            "workload": work.name,
            "dtype": work.dtype_name,
            "threads": torch.get_num_threads(),
            "provider": name,
            "median_s": median,
            **speed(work, median, limit),
            "error": errors[name],
        }
        rows.append(row)
        print(line(row, work.limit, median / medians["nlm"]), flush=True)
    return rows


def speed(work: Workload, seconds: float, limit: float | None) -> dict[str, float]:
    """The rate, in GB/s or GFLOP/s, and the fraction that it is of such a limit."""
    if limit is None:
        return {}
    rate = work.amount / seconds / 1e9
    unit = "gflops" if work.limit == "gemm" else "gbps"
    return {unit: rate, "limit": limit, "fraction_of_limit": rate / limit}


HEADER = (
    f"{'workload':<38} {'type':<9} {'provider':<26} {'time':>12} {'rate':>16} "
    f"{'of the limit':>14} {'x nlm':>8} {'error':>8}"
)


def line(row: Mapping[str, Any], limit: str | None, ratio: float) -> str:
    rate = f"{row['gbps']:.2f} GB/s" if "gbps" in row else ""
    rate = f"{row['gflops']:.1f} GFLOP/s" if "gflops" in row else rate
    part = f"{100 * row['fraction_of_limit']:.0f} % {limit}" if limit else ""
    return (
        f"{row['workload']:<38} {row['dtype']:<9} {row['provider']:<26} "
        f"{1e3 * row['median_s']:9.3f} ms {rate:>16} {part:>14} {ratio:8.2f} {row['error']:8.1e}"
    )


def stems() -> list[str]:
    """The operations, each of which has a benchmark file."""
    return sorted({operation.stem for operation in operations().values()})


def source(stem: str) -> Source:
    """The workloads of ``bench_<stem>.py``."""
    return import_module(f"bench_{stem}").workloads


def run(
    sources: Mapping[str, Source],
    *,
    threads: Sequence[int] = (),
    part: str = "",
    peers: bool = True,
    seconds: float = SECONDS,
    quick: bool = False,
) -> dict[str, Any]:
    """Checks and times all workloads whose name contains ``part``; returns the report.

    Parameters
    ----------
    sources : mapping of str to callable
        Workloads by operation; called after the threads are set.
    threads : sequence of int
        Numbers of threads, one after the other. Default: PyTorch's number.
    peers : bool
        Time the peers too, not "nlm" alone.
    quick : bool
        One round of the first workload of each operation: whether it runs, not how fast. Peers
        that would have to be compiled first are left out.
    """
    report = {**facts(), "quick": quick, "limits": {}, "rows": []}
    before = torch.get_num_threads()
    try:
        for count in threads or (before,):
            torch.set_num_threads(count)
            limits = measure_limits(0.0 if quick else min(seconds, 1.0))
            report["limits"][str(count)] = limits
            rates = ", ".join(f"{name} {rate:.1f}" for name, rate in limits.items())
            print(f"\nthreads: {count}; limits: {rates} (GB/s, GFLOP/s)")
            for op, workloads in sources.items():
                print(f"\n{op}\n{HEADER}", flush=True)
                chosen = (work for work in workloads() if part in work.name)
                for work in islice(chosen, 1) if quick else chosen:
                    names = list(work.providers) if peers else ["nlm"]
                    if quick:
                        names = [name for name in names if "torch.compile" not in name]
                    given = work.only(names)
                    report["rows"] += rows_of(op, given, 0.0 if quick else seconds)
    finally:
        torch.set_num_threads(before)
    return report


def write(path: Path, report: Mapping[str, Any]) -> None:
    """``report`` as JSON, and where it went."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


def facts() -> dict[str, Any]:
    """What a report says of where it was made."""
    known = nlm.info()
    return {
        "machine": machine(),
        "instruction set": known["instruction set"],
        "versions": known["versions"],
        "commit": commit(),
    }


def machine() -> str:
    """A folder name: the processor and its number of cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        model = found.group(1)
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {os.cpu_count()} cores".lower()).strip("-")


def commit() -> str:
    """Of the checkout that holds this file; "unknown" for an installed copy."""
    checkout = RESULTS.parents[1]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, text=True, capture_output=True).stdout.strip() or "unknown"


def main(op: str, workloads: Source) -> None:
    """Command line of a benchmark file."""
    parser = argparse.ArgumentParser(description=f"Times nlm.ops.{op} beside its peers.")
    parser.add_argument("--workload", default="", help="only workloads whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=())
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for each workload")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = run(
        {op: workloads}, threads=options.threads, part=options.workload, seconds=options.seconds
    )
    if options.json is not None:
        write(options.json, report)
