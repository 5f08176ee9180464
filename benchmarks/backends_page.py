"""Writes the tables of docs/backends.md from the committed results.

    python benchmarks/backends_page.py

A test fails where the page is not what this script would write.
"""

import json
import re
from pathlib import Path
from typing import Any

from _pages import table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "backends.md"
RESULTS = ROOT / "benchmarks" / "results"


def load(host: str) -> list[dict[str, Any]]:
    """The results of all machines, and of all ways to run a host."""
    files = sorted(RESULTS.glob(f"*/host_{host}*.json"))
    return [json.loads(file.read_text()) for file in files]


def tables(report: dict[str, Any]) -> str:
    """All that a report says, and where it was measured."""
    parts = [alignments(report) if _reached(report["rows"][0], "nlm") else merges(report)]
    rows = report["rows"]
    if runs := [row for row in rows if "nlm_run_s" in row]:
        parts += [alone(report, runs)]
    if streamed := [row for row in rows if "merge_s" in row]:
        parts += [without_host(report, streamed)]
    return "\n\n".join([*parts, *goals(report), caption(report)])


def merges(report: dict[str, Any]) -> str:
    """Whole processes: seconds and peak memory of the host, and of the host on nlm."""
    stock = _stock(report)
    header = ("method", *_COSTS, "entries that differ")
    rows = [(f"`{row['method']}`", *_costs(row, stock), _part(row["differing"]))
            for row in report["rows"]]  # fmt: skip
    return table(header, rows)


def alone(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """An algorithm without the rest of its process."""
    stock = _stock(report)
    cells = [
        (f"`{row['method']}`", f"{row[f'{stock}_run_s']:.2f} s", f"{row['nlm_run_s']:.2f} s",
         f"{row['run_ratio']:.1f}")
        for row in rows
    ]  # fmt: skip
    text = "The algorithm's `run` alone, without the host's start, reading and writing:"
    return f"{text}\n\n{table(('method', 'stock', 'on nlm', 'times faster'), cells)}"


def without_host(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The same by nlm's own command."""
    stock = _stock(report)
    header = (
        "method", "stock", "`nlm merge`", "not flushed, no digest", "times faster",
        "own memory, stock", "`nlm merge`", "entries that differ",
    )  # fmt: skip
    cells = []
    for row in rows:
        times = row[f"{stock}_s"], row["merge_s"], row["merge_unsafe_s"]
        faster = ", ".join(f"{times[0] / each:.1f}" for each in times[1:])
        own = (f"{row[f'{each}_own'] / 2**20:.0f} MiB" for each in (stock, "merge"))
        seconds = (f"{each:.1f} s" for each in times)
        differing = _part(row["merge_differing"])
        cells.append((f"`{row['method']}`", *seconds, faster, *own, differing))
    text = "The same configurations by `nlm merge`, without the host:"
    return f"{text}\n\n{table(header, cells)}"


def alignments(report: dict[str, Any]) -> str:
    """What was brought into another's order, and how well."""
    stock, what = _stock(report), _REACHED.get(report["host"].partition(" ")[0], _REACHED[""])
    first = ("network", "parameters")
    if "units" in report["rows"][0]:
        first = ("function", "units of each")
    header = (*first, *_COSTS, f"{what}, stock", "on nlm")
    rows = [
        (row["method"], _size(row), *_costs(row, stock),
         f"{_reached(row, stock):.5g}", f"{_reached(row, 'nlm'):.5g}")
        for row in report["rows"]
    ]  # fmt: skip
    return table(header, rows)


def goals(report: dict[str, Any]) -> list[str]:
    """What was asked of whole processes, what is there, and what bounds it."""
    rows = {row["method"]: row for row in report["rows"]}
    stock = _stock(report)
    found = []
    for method, goal in GOALS.get(stock, {}).items():
        if method not in rows:
            continue
        row = rows[method]
        text = f"`{method}` was to be {goal:g} times as fast: {_met(row['ratio'], goal)}."
        if row["ratio"] < goal:
            text += f" That would be {row[f'{stock}_s'] / goal:.1f} s as a whole"
            if (start := _start(report, row)) is not None:
                text += f", of which the host's start alone takes {start:.1f} s"
            text += "."
            if (adds := rows.get("task_arithmetic")) and stock == "mergekit":
                text += f" A merge that only adds takes {adds['nlm_s']:.1f} s here."
        found.append(text)
    if stock == "fusion_bench":
        share = max(row["nlm_bytes"] / row[f"{stock}_bytes"] for row in rows.values())
        met = "met" if share <= 1 / 3 else "missed"
        found.append(f"Its peak memory was to be a third of the stock run's: {share:.2f}, {met}.")
    return [" ".join(found)] if found else []


def _start(report: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Seconds of the host's start in the run of a row; None where those of another are kept."""
    is_of_run = row.get("commit", report["commit"]) == report["commit"]
    found = row.get("start_s", report["start_s"] if is_of_run else None)
    return None if found is None else float(found)


def _met(value: float, goal: float) -> str:
    return f"{value:.2f}, {'met' if value >= goal else 'missed'}"


#: Times as fast as the stock run, by host and method.
GOALS = {"mergekit": {"ties": 5, "dare_ties": 2.5}, "fusion_bench": {"ties, sum": 4}}


def caption(report: dict[str, Any]) -> str:
    """Where, when, and how often."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    repeats = sorted({row.get("repeat", report["repeat"]) for row in report["rows"]})
    commits = sorted({row.get("commit", report["commit"]) for row in report["rows"]})
    of = ", two networks of random weights drawn apart"
    if "units" in report["rows"][0]:
        of = ", units that are the same but for noise"
    if "parameters" in report:
        millions = f"{report['parameters'] / 1e6:.0f} M"
        of = f", a foundation and two experts of {millions} float32 parameters"
    by = ""
    if any("worked_ratio" in row for row in report["rows"]):
        by = "; the second ratio is that of processor time"
    if loads := [row["load"] for row in report["rows"] if "load" in row]:
        by += f" (other work ran: a load of up to {max(loads):.1f})"
    if untold := [row["method"] for row in report["rows"] if "peak" not in row]:
        which = "" if len(untold) == len(report["rows"]) else f" of {', '.join(untold)}"
        by += (
            f"; no peak{which} is told that is less than that of the program that wrote the "
            "inputs, which may be above the process's own"
        )
    run = f" in the run at {report['commit']}" if len(commits) > 1 else ""
    return (
        f"{report['host']}{of}, {report['threads']} threads; medians of "
        f"{' and '.join(map(str, repeats))} runs in turns, of which the host needs "
        f"{report['start_s']:.1f} s to start{run}{by}. {report['machine']}, {versions}, nlm at "
        f"{' and '.join(commits)}."
    )


_COSTS = ("stock", "on nlm", "times faster", "peak, stock", "on nlm")
_REACHED = {"ZipIt": "mean correlation", "": "inner product"}


def _costs(row: dict[str, Any], stock: str) -> tuple[str, ...]:
    faster = [row[each] for each in ("ratio", "worked_ratio") if each in row]
    return (
        f"{row[f'{stock}_s']:.1f} s", f"{row['nlm_s']:.1f} s",
        ", ".join(f"{each:.1f}" for each in faster),
        f"{row[f'{stock}_bytes'] / 1e9:.2f} GB", f"{row['nlm_bytes'] / 1e9:.2f} GB",
    )  # fmt: skip


def _stock(report: dict[str, Any]) -> str:
    """The stock program of a report's rows."""
    row = report["rows"][0]
    others = ("nlm", "merge", "merge_unsafe")
    names = [key.removesuffix("_bytes") for key in row if key.endswith("_bytes")]
    return next(name for name in names if name not in others)


def _reached(row: dict[str, Any], program: str) -> float | None:
    of = "nlm" if program == "nlm" else "stock"
    return row.get(f"{of}_objective", row.get(f"{program}_objective"))


def _size(row: dict[str, Any]) -> str:
    return str(row["units"]) if "units" in row else f"{row['parameters'] / 1e6:.1f} M"


def _part(share: float) -> str:
    if share > 1e-4:
        return f"{100 * share:.2g} %"
    return f"{1e9 * share:.0f} of 10^9" if share else "none"


def filled(page: str) -> str:
    """The page with its tables as the results say."""

    def section(match: re.Match[str]) -> str:
        found = "\n\n".join(map(tables, load(match[2])))
        return f"{match[1]}{found or 'No run is committed.'}\n{match[3]}"

    return re.sub(r"(<!-- results of (\w+) -->\n).*?(<!-- end -->)", section, page, flags=re.DOTALL)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
