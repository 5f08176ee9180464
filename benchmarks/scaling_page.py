"""Writes docs/scaling.md and its pictures: how time and memory grow, and what that predicts.

    python benchmarks/scaling_page.py

makes them of the committed results of benchmarks/scaling.py and benchmarks/host_scale.py; a test
fails where the page is not what this script would write.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
PICTURES = ROOT / "docs" / "pictures"
MACHINE = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
LEAST, FITTED = 2e6, 3  # bytes that are a call's own; points that a power is fitted to
PARTS = ("operations", "models", "files")
TITLES = {
    "operations": "Operations", "models": "Tracing, aligning, correcting", "files": "Merging",
}  # fmt: skip

INTRODUCTION = """# How time and memory grow

Made by `benchmarks/scaling_page.py` of what `benchmarks/scaling.py` measured on
{machine}, with {threads} threads, in {seconds:.0f} seconds. The power is that of
the three largest sizes (least squares of logarithms): time, or memory, grows as size to that
power. Memory is what a call takes beyond its inputs at the highest, results included, in MB. What
is less than a few MB is mostly the allocator's: a power is given where all three are at least
{least:.0f} MB. A merge of files has a fixed budget, which the largest of these comes near, and
holds some KB for each tensor.

Where an operation reads each element once the power is 1, but for caches, which the smaller sizes
fit into, and for the system's zeroing of a result's new memory; away from 1 by more than 0.15 are:
{caches}. Products of all pairs grow faster, as they must: `cross_moments_` as the square of the
channels, `group_similarity_` as the cube where a unit has as many entries as there are units.
A trace runs the model for the proof of each group, alone and with a control that has to change its
outputs: of many layers it takes their square.
"""


def load() -> dict[str, dict[str, Any]]:
    return {part: json.loads((MACHINE / f"scaling_{part}.json").read_text()) for part in PARTS}


def page(reports: dict[str, dict[str, Any]], merged: dict[str, Any]) -> str:
    first = reports["operations"]
    away = [
        f"`{curve['subject']}` {curve['time_power']:.2f}"
        for curve in first["curves"]
        if curve["grows"] == "elements" and abs(curve["time_power"] - 1) > 0.15
    ]
    text = INTRODUCTION.format(
        machine=first["machine"], threads=first["threads"],
        seconds=sum(report["seconds"] for report in reports.values()), least=LEAST / 1e6,
        caches=", ".join(away) if away else "none",
    )  # fmt: skip
    parts = [text.strip()]
    for part in PARTS:
        parts += [
            f"## {TITLES[part]}", f"![seconds and MB by size](pictures/scaling_{part}.svg)",
            "\n".join(_table(reports[part]["curves"])),
        ]  # fmt: skip
    return "\n\n".join([*parts, _prediction(reports, merged)]) + "\n"


def _table(curves: Iterable[dict[str, Any]]) -> list[str]:
    lines = [
        "| what | grows with | sizes | seconds | time grows as | MB | memory grows as |",
        "|---|---|---|---|--:|---|--:|",
    ]
    for curve in curves:
        points = curve["points"]
        times = ", ".join(_seconds(point["seconds"]) for point in points)
        sizes = ", ".join(f"{point['size']:,}" for point in points)
        lines.append(
            f"| {curve['subject']} | {curve['grows']} | {sizes} | {times} | "
            f"n^{curve['time_power']:.2f} | {', '.join(_megabytes(p['bytes']) for p in points)} | "
            f"{_memory_power(curve)} |"
        )
    return lines


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _megabytes(value: float) -> str:
    return f"{max(value, 0) / 1e6:,.1f}" if value < 1e7 else f"{value / 1e6:,.0f}"


def _memory_power(curve: dict[str, Any]) -> str:
    is_seen = all(point["bytes"] >= LEAST for point in curve["points"][-FITTED:])
    return f"n^{curve['memory_power']:.2f}" if is_seen else "-"


def _bytes(value: float) -> str:
    return (
        "-" if value < 1e6 else f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.1f} GB"
    )


def _curve(report: dict[str, Any], subject: str, grows: str) -> dict[str, Any]:
    return next(
        each
        for each in report["curves"]
        if each["subject"].startswith(subject) and each["grows"].startswith(grows)
    )


def _predicted(curve: dict[str, Any], size: float) -> float:
    """Seconds at a size beyond those measured, along the fitted power from the largest."""
    last = curve["points"][-1]
    return last["seconds"] * (size / last["size"]) ** curve["time_power"]


#: A Llama of 70 B parameters: layers, width, units of a feed-forward layer.
LAYERS, WIDTH, INNER = 80, 8192, 28672
PARAMETERS, EXPERTS = 70.6e9, 2
SAMPLES, TOKENS = 128, 512  # what a correction is fitted to, of each task


def _prediction(reports: dict[str, dict[str, Any]], merged: dict[str, Any]) -> str:
    operations = reports["operations"]
    rows = [row for row in merged["rows"] if row["method"] == "ties"]
    largest = max(rows, key=lambda row: row["parameters"])
    rate, own = largest["gb_per_s"], max(row["own"] for row in merged["rows"])
    moved = PARAMETERS * 2 * (EXPERTS + 2)  # bfloat16: experts, base and output
    merging = moved / rate / 1e9
    similar = _curve(operations, "group_similarity_", "units")["points"][-1]
    flops = 2 * similar["size"] ** 3 / similar["seconds"]
    needed = LAYERS * 2 * INNER**2 * 3 * WIDTH
    matching = _curve(reports["models"], "align (weights)", "units of one group")
    solving = LAYERS * _predicted(matching, INNER)
    costs = 8 * INNER**2
    passes = 2 * EXPERTS * 2 * PARAMETERS * SAMPLES * TOKENS  # of each expert and of the merged
    held = 2 * PARAMETERS * (EXPERTS + 1)
    lines = [
        "## A model of 70 B",
        f"What these numbers say of {EXPERTS} experts and a base of {PARAMETERS / 1e9:.1f} B "
        f"parameters in bfloat16 ({LAYERS} layers, width {WIDTH:,}, {INNER:,} feed-forward units). "
        "Extrapolated, not run: no machine here holds such a model.",
        "| step | bound by | one machine like this one | 64 of them |",
        "|---|---|--:|--:|",
        f"| merge of files (TIES) | {moved / 1e12:.2f} TB read and written at {rate:.2f} GB/s "
        f"(`host_scale.json`, 1.1 B, flushed and hashed) | {_hours(merging)} | "
        f"{_hours(merging / 64)} |",
        f"| memory of that merge, beside pages of files | a fixed budget, whatever the model | "
        f"{_bytes(own)} | {_bytes(own)} each |",
        f"| similarities of all feed-forward groups, one sweep | {needed / 1e15:.1f} PFLOP at "
        f"{flops / 1e9:.0f} GFLOP/s | {_hours(needed / flops)} | {_hours(needed / flops / 64)}, "
        "if it were divided |",
        "| their assignments, of a copy with noise | all of align's "
        f"n^{matching['time_power']:.2f} from {matching['points'][-1]['size']:,} units on | "
        f"{_hours(solving)} | {_hours(solving / 64)}, if divided |",
        f"| memory of one of them | costs in float64 | {_bytes(costs)} | {_bytes(costs)} each |",
        f"| correct (TACT), {SAMPLES} samples of {TOKENS} tokens a task | "
        f"{passes / 1e15:.0f} PFLOP of passes at the same rate, were the models in memory | "
        f"{_hours(passes / flops)} | {_hours(passes / flops / 64)} |",
        f"| memory of that | the merged model and its experts, which `Tact.fit` is given | "
        f"{_bytes(held)} | {_bytes(held)} each |",
    ]
    told = (
        "A merge of files is divided among processes by files (`torchrun`), so that 64 machines "
        "take a 64th where each has its own disk or the shared one is as fast as all of them "
        "together. Statistics of activations are summed over processes too, each of which holds "
        "whole models: such a correction is for machines of more memory than this one's. **Weight "
        "matching is not divided**: one process visits the groups in turn, and the last column of "
        "its rows only says what there would be to gain. Copies with noise are easier to assign "
        "than models that were trained apart: a factor of some units either way."
    )
    return "\n\n".join([*lines[:2], "\n".join(lines[2:]), told])


def _hours(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def draw(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds, and MB below them, over size: all by powers of ten."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "nlm", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot as plt

    figure, (times, sizes) = plt.subplots(2, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for number, curve in enumerate(curves):
        name = f"{curve['subject']}, {curve['grows']}"
        line = {"marker": "os^Dv"[number % 5], "markersize": 4, "linewidth": 1.2}
        points = [(point["size"], point["seconds"]) for point in curve["points"]]
        told = f"{name}: n^{curve['time_power']:.2f}"
        times.loglog(*zip(*points, strict=True), color=f"C{number % 10}", label=told, **line)
        held = [(p["size"], p["bytes"] / 1e6) for p in curve["points"] if p["bytes"] >= LEAST]
        if held:
            told = f"{name}: {_memory_power(curve)}".removesuffix(": -")
            sizes.loglog(*zip(*held, strict=True), color=f"C{number % 10}", label=told, **line)
    sizes.set_xlabel("size")
    for axes, told in ((times, "seconds"), (sizes, "MB")):
        axes.set_ylabel(told)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    reports = load()
    for part, report in reports.items():
        draw(report["curves"], PICTURES / f"scaling_{part}.svg")
    merged = json.loads((MACHINE / "host_scale.json").read_text())
    PAGE.write_text(page(reports, merged))


if __name__ == "__main__":
    main()
