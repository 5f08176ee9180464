"""The committed timings as tables: README's, and all of them for docs/performance.md."""

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _whole_jobs

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]
Key = tuple[str, str, str]  # operation, workload, type


@dataclass(frozen=True)
class Timings:
    """All timings of one machine; ``rows[key][threads][provider]``, "nlm" first."""

    machine: str
    instruction_set: str
    torch: str
    commits: tuple[str, ...]
    rows: dict[Key, dict[int, dict[str, Row]]]

    @property
    def operations(self) -> list[str]:
        return list(dict.fromkeys(op for op, _, _ in self.rows))

    @property
    def most_threads(self) -> int:
        return max(threads for runs in self.rows.values() for threads in runs)


def load(folder: Path = RESULTS) -> list[Timings]:
    """The timings of the machine with the most of them, then those of others of operations that it
    has not timed; a timing in two files is an error."""
    machines = [timings for each in sorted(folder.iterdir()) for timings in _of_machine(each)]
    first, *others = sorted(machines, key=lambda timings: -len(timings.rows))
    lacking = [_without(timings, first.operations) for timings in others]
    return [first, *(timings for timings in lacking if timings.rows)]


def _without(timings: Timings, operations: list[str]) -> Timings:
    rows = {key: row for key, row in timings.rows.items() if key[0] not in operations}
    commits = {
        row["commit"] for runs in rows.values() for by in runs.values() for row in by.values()
    }
    return replace(timings, rows=rows, commits=tuple(sorted(commits)))


def _of_machine(folder: Path) -> Iterator[Timings]:
    reports = []
    rows: dict[Key, dict[int, dict[str, Row]]] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if "op" not in report.get("rows", [{}])[0] or report.get("quick"):
            continue  # no timings of operations
        reports.append(report)
        for row in report["rows"]:
            runs = rows.setdefault((row["op"], row["workload"], row["dtype"]), {})
            providers = runs.setdefault(row["threads"], {})
            if row["provider"] in providers:
                raise ValueError(f"{path}: a timing is in one file, got {row} again")
            providers[row["provider"]] = row | {"commit": report["commit"]}
    if reports:
        first = reports[0]
        commits = tuple(sorted({report["commit"] for report in reports}))
        yield Timings(
            first["machine"], first["instruction set"], first["versions"]["torch"], commits, rows
        )


def readme_table(machines: list[Timings]) -> str:
    """A line for each operation, over all of its workloads and types, at the most threads."""
    first, *others = machines
    lines = [
        "| operation | workloads | of the limit | natural PyTorch | fastest stock found |",
        "|---|--:|--:|--:|--:|",
    ]
    for timings in machines:
        lines += _summaries(timings)
    elsewhere = "".join(
        f" {_listed(timings.operations)}: m{_where(timings)[1:]}." for timings in others
    )
    lines += [
        "",
        f"{_where(first)}; {first.most_threads} threads.{elsewhere} Worst, median and best of the "
        "workloads: the part "
        "of the limit (a read, a copy or a float32 matrix product in the same run), and how many "
        "times nlm's time the natural PyTorch expression and the fastest stock composition take. "
        "[Every workload](docs/performance.md).",
    ]
    return "\n".join(lines)


def _summaries(timings: Timings) -> Iterator[str]:
    threads = timings.most_threads
    for op in timings.operations:
        runs = [runs[threads] for key, runs in timings.rows.items() if key[0] == op]
        ours, natural, fastest = zip(*map(_peers, runs), strict=True)
        parts = [100 * row["fraction_of_limit"] for row in ours if "fraction_of_limit" in row]
        yield (
            f"| `{op}` | {len(runs)} | {_spread(parts, ' %')} | "
            f"{_spread(_ratios(natural, ours), ' x')} | {_spread(_ratios(fastest, ours), ' x')} |"
        )


def page(machines: list[Timings], folder: Path = RESULTS) -> str:
    """docs/performance.md."""
    first, *others = machines
    lines = [
        "# Performance",
        "",
        f"Made by `benchmarks/readme.py` from the committed results. {_where(first)}. Medians of "
        "providers that took turns on the same data, after a check of each against float64.",
        "",
        "Per number of threads: nlm's time, what part of the limit of the same run that is (a "
        "read, a copy or a float32 matrix product), and how many times as long the natural PyTorch "
        "expression and the fastest stock composition take. Errors are the largest of any entry, "
        "relative to the largest entry.",
    ]
    for op in first.operations:
        lines += ["", f"## {op}", "", *_table(first, op)]
    for timings in others:
        for op in timings.operations:
            lines += ["", f"## {op}", "", f"{_where(timings)}.", "", *_table(timings, op)]
    return "\n".join([*lines, *_whole_jobs.sections(folder)]) + "\n"


def _table(timings: Timings, op: str) -> list[str]:
    """All workloads of an operation, a row each."""
    counts = sorted({threads for runs in timings.rows.values() for threads in runs}, reverse=True)
    header = ["workload", "type"]
    for threads in counts:
        header += [f"nlm, {threads} thr.", "limit", "natural", "fastest stock"]
    header += ["error, nlm", "error, natural"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for (each, workload, dtype), runs in timings.rows.items():
        if each != op:
            continue
        cells = [workload, dtype]
        for threads in counts:
            if threads not in runs:
                cells += ["-"] * 4
                continue
            ours, natural, fastest = _peers(runs[threads])
            cells += [_milliseconds(ours), _part(ours), _ratio(natural, ours)]
            cells.append(_named(fastest, ours))
        ours, natural, _ = _peers(next(iter(runs.values())))
        cells += [f"{row['error']:.0e}" if row else "-" for row in (ours, natural)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _peers(providers: dict[str, Row]) -> tuple[Row, Row | None, Row | None]:
    """nlm, the natural expression (the first that is not compiled), and the fastest of all."""
    peers = [row for name, row in providers.items() if not name.startswith("nlm")]
    eager = (row for row in peers if not row["provider"].startswith("torch.compile"))
    natural = next(eager, None)
    fastest = min(peers, key=lambda row: row["median_s"], default=None)
    return providers["nlm"], natural, fastest


def _where(timings: Timings) -> str:
    return (
        f"Measured on {timings.machine} ({timings.instruction_set}), "
        f"PyTorch {timings.torch}, nlm at {', '.join(timings.commits)}"
    )


def _milliseconds(row: Row) -> str:
    return f"{1e3 * row['median_s']:.3g} ms"


def _part(row: Row) -> str:
    return f"{100 * row['fraction_of_limit']:.0f} %" if "fraction_of_limit" in row else "-"


def _ratios(peers: Iterable[Row | None], ours: Iterable[Row]) -> list[float]:
    pairs = zip(peers, ours, strict=True)
    return [peer["median_s"] / row["median_s"] for peer, row in pairs if peer is not None]


def _spread(values: list[float], unit: str) -> str:
    """Smallest, median and largest."""
    if not values:
        return "-"
    three = min(values), statistics.median(values), max(values)
    return " / ".join(map(_number, three)) + unit


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _ratio(peer: Row | None, ours: Row) -> str:
    return "-" if peer is None else f"{_number(peer['median_s'] / ours['median_s'])} x"


def _named(peer: Row | None, ours: Row) -> str:
    return "-" if peer is None else f"{_ratio(peer, ours)}, {peer['provider']}"
