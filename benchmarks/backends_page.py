"""Writes the tables of docs/backends.md from the committed results.

    python benchmarks/backends_page.py

A test fails where the page is not what this script would write.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "backends.md"
RESULTS = ROOT / "benchmarks" / "results"


def load(host: str) -> list[dict[str, Any]]:
    """The results of all machines."""
    files = sorted(RESULTS.glob(f"*/host_{host}.json"))
    return [json.loads(file.read_text()) for file in files]


def table(report: dict[str, Any]) -> str:
    """Whole processes: seconds and peak memory of the host, and of the host on nlm."""
    if report["host"].startswith("rebasin "):
        return alignments(report)
    stock = report["host"].partition(" ")[0].replace("-", "_")
    lines = [
        "| method | stock | on nlm | times faster | peak, stock | on nlm | entries that differ |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| `{row['method']}` | {row[f'{stock}_s']:.1f} s | {row['nlm_s']:.1f} s "
        f"| {row['ratio']:.1f} | {row[f'{stock}_bytes'] / 1e9:.2f} GB "
        f"| {row['nlm_bytes'] / 1e9:.2f} GB | {_part(row['differing'])} |"
        for row in report["rows"]
    ]
    if runs := [row for row in report["rows"] if "nlm_run_s" in row]:
        lines += [
            "",
            "The algorithm's `run` alone, without the host's start, reading and writing:",
            "",
            "| method | stock | on nlm | times faster |",
            "|---|--:|--:|--:|",
        ]
        lines += [
            f"| `{row['method']}` | {row[f'{stock}_run_s']:.2f} s | {row['nlm_run_s']:.2f} s "
            f"| {row['run_ratio']:.1f} |"
            for row in runs
        ]
    if alone := [row for row in report["rows"] if "merge_s" in row]:
        lines += [
            "",
            "The same configurations by `nlm merge`, without the host:",
            "",
            "| method | stock | `nlm merge` | not flushed, no digest | times faster | own memory, "
            "stock | `nlm merge` | entries that differ |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        lines += [
            f"| `{row['method']}` | {row[f'{stock}_s']:.1f} s | {row['merge_s']:.1f} s "
            f"| {row['merge_unsafe_s']:.1f} s | {row['mergekit_s'] / row['merge_s']:.1f}, "
            f"{row['mergekit_s'] / row['merge_unsafe_s']:.1f} "
            f"| {row['mergekit_own'] / 2**20:.0f} MiB | {row['merge_own'] / 2**20:.0f} MiB "
            f"| {_part(row['merge_differing'])} |"
            for row in alone
        ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        "",
        f"{report['host']}, a foundation and two experts of {report['parameters'] / 1e6:.0f} M "
        f"float32 parameters, {report['threads']} threads; medians of {report['repeat']} runs in "
        f"turns, of which the host needs {report['start_s']:.1f} s to start. {report['machine']}, "
        f"{versions}, nlm at {report['commit']}.",
    ]
    return "\n".join(lines)


def alignments(report: dict[str, Any]) -> str:
    """Two networks of random weights, one brought into the other's order, by rebasin and by nlm."""
    lines = [
        "| network | parameters | stock | on nlm | times faster | peak, stock | on nlm "
        "| inner product, stock | on nlm |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['method']} | {row['parameters'] / 1e6:.1f} M | {row['rebasin_s']:.1f} s "
        f"| {row['nlm_s']:.1f} s | {row['ratio']:.1f} | {row['rebasin_bytes'] / 1e9:.2f} GB "
        f"| {row['nlm_bytes'] / 1e9:.2f} GB | {row['rebasin_objective']:.5g} "
        f"| {row['nlm_objective']:.5g} |"
        for row in report["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        "",
        f"{report['host']}, two networks of random weights drawn apart, {report['threads']} "
        f"threads; medians of {report['repeat']} runs in turns, of which the host needs "
        f"{report['start_s']:.1f} s to start. {report['machine']}, {versions}, nlm at "
        f"{report['commit']}.",
    ]
    return "\n".join(lines)


def _part(share: float) -> str:
    if share > 1e-4:
        return f"{100 * share:.2g} %"
    return f"{1e9 * share:.0f} of 10^9" if share else "none"


def filled(page: str) -> str:
    """The page with its tables as the results say."""

    def section(match: re.Match[str]) -> str:
        tables = "\n\n".join(table(report) for report in load(match[2]))
        return f"{match[1]}{tables or 'No run is committed.'}\n{match[3]}"

    return re.sub(r"(<!-- results of (\w+) -->\n).*?(<!-- end -->)", section, page, flags=re.DOTALL)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
