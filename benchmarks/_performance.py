"""The committed timings as tables: README's, and all of them for docs/performance.md."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    def most_threads(self) -> int:
        return max(threads for runs in self.rows.values() for threads in runs)


def load(folder: Path = RESULTS) -> Timings:
    """The timings of the machine with the most of them; a timing in two files is an error."""
    found = [timings for each in sorted(folder.iterdir()) for timings in _of_machine(each)]
    return max(found, key=lambda timings: len(timings.rows))


def _of_machine(folder: Path) -> Iterator[Timings]:
    reports = []
    rows: dict[Key, dict[int, dict[str, Row]]] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if "op" not in report["rows"][0] or report.get("quick"):
            continue
        reports.append(report)
        for row in report["rows"]:
            runs = rows.setdefault((row["op"], row["workload"], row["dtype"]), {})
            providers = runs.setdefault(row["threads"], {})
            if row["provider"] in providers:
                raise ValueError(f"{path}: a timing is in one file, got {row} again")
            providers[row["provider"]] = row
    if reports:
        first = reports[0]
        commits = tuple(sorted({report["commit"] for report in reports}))
        yield Timings(
            first["machine"], first["instruction set"], first["versions"]["torch"], commits, rows
        )


def readme_table(timings: Timings) -> str:
    """One type of each workload, at the most threads."""
    threads = timings.most_threads
    lines = [
        "| operation | workload | nlm | of the limit | natural PyTorch | fastest stock found |",
        "|---|---|--:|--:|--:|---|",
    ]
    shown: set[tuple[str, str]] = set()
    for (op, workload, dtype), runs in timings.rows.items():
        if (op, workload) in shown or threads not in runs:
            continue
        shown.add((op, workload))
        name = workload if dtype == "float32" else f"{workload}, {dtype}"
        ours, natural, fastest = _peers(runs[threads])
        lines.append(
            f"| `{op}` | {name} | {_milliseconds(ours)} | {_part(ours)} | "
            f"{_ratio(natural, ours)} | {_named(fastest, ours)} |"
        )
    lines += [
        "",
        f"{_where(timings)}; {threads} threads, float32 where nothing else is said, medians. "
        "The limit is what the same run measured for a read, a copy or a float32 matrix product. "
        "A peer's column says how many times nlm's time it takes. "
        "[All types, one thread, errors](docs/performance.md).",
    ]
    return "\n".join(lines)


def page(timings: Timings) -> str:
    """docs/performance.md."""
    lines = [
        "# Performance",
        "",
        f"Made by `benchmarks/readme.py` from the committed results. {_where(timings)}. Medians of "
        "providers that took turns on the same data, after a check of each against float64.",
        "",
        "Per number of threads: nlm's time, what part of the limit of the same run that is (a "
        "read, a copy or a float32 matrix product), and how many times as long the natural PyTorch "
        "expression and the fastest stock composition take. Errors are the largest of any entry, "
        "relative to the largest entry.",
    ]
    counts = sorted({threads for runs in timings.rows.values() for threads in runs}, reverse=True)
    header = ["workload", "type"]
    for threads in counts:
        header += [f"nlm, {threads} thr.", "limit", "natural", "fastest stock"]
    header += ["error, nlm", "error, natural"]
    for op in dict.fromkeys(key[0] for key in timings.rows):
        lines += ["", f"## {op}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
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
    return "\n".join(lines) + "\n"


def _peers(providers: dict[str, Row]) -> tuple[Row, Row | None, Row | None]:
    """nlm, the natural expression, and the fastest of all peers."""
    peers = [row for name, row in providers.items() if name != "nlm"]
    natural = peers[0] if peers else None
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


def _ratio(peer: Row | None, ours: Row) -> str:
    if peer is None:
        return "-"
    ratio = peer["median_s"] / ours["median_s"]
    return f"x {ratio:.2f}" if ratio < 10 else f"x {ratio:.0f}"


def _named(peer: Row | None, ours: Row) -> str:
    return "-" if peer is None else f"{_ratio(peer, ours)}, {peer['provider']}"
