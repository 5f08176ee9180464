"""Tables of whole jobs for docs/performance.md, of each machine that has left results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = dict[str, Any]

FASTER = {"VGG16": 5.0, "ViT-B/16, feed-forward": 10.0}  # than the peer, to an equal objective
HEADS = 1 / 3  # of SciPy's time in a loop
BOUND, SAMPLED = 1.15, 0.2  # of the bound; on top of the passes with some of the positions


def sections(results: Path) -> list[str]:
    """The lines of all tables, from the JSON files in the folders of ``results``."""
    lines: list[str] = []
    for title, stem, text, table in _SECTIONS:
        reports = [json.loads(path.read_text()) for path in sorted(results.glob(f"*/{stem}*.json"))]
        if reports:
            lines += ["", f"## {title}", "", text]
        for report in reports:
            lines += ["", _where(report), "", *table(report)]
    return lines


def jobs(report: Report) -> list[str]:
    """What ``bench_jobs.py`` has left."""
    lines = ["| job | kernels | references | ratio |", "|---|--:|--:|--:|"]
    for row in report["rows"]:
        times = " | ".join(f"{row[key]:.3f} s" for key in ("kernels_s", "references_s"))
        lines.append(f"| {row['job']} | {times} | {_times(row['ratio'])} |")
    return lines


def weight_matching(report: Report) -> list[str]:
    """What ``bench_weight_matching.py`` has left: a line for each pair of models."""
    lines = [
        "| models | groups | nlm | sweeps | as good as the peer after | peer | sweeps "
        "| to equal objective | memory, nlm | peer |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    heads: list[str] = []
    default: list[str] = []
    goals: list[str] = []
    pairs: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        pairs.setdefault(row["workload"], []).append(row)
    for workload, rows in pairs.items():
        if "groups" not in rows[0]:
            times = ", ".join(f"{row['provider']} {1e3 * row['seconds']:.0f} ms" for row in rows)
            heads += ["", f"{workload}: {times}.{_heads_goal(rows)}"]
            continue
        ours, *peers = rows
        if peers and peers[0]["provider"] == "nlm":
            default.append(_by_default(workload, ours, peers[0]))
            continue
        for peer in peers or [None]:
            goals += _goal(workload, ours, peer)
            cells = [workload, str(ours["groups"]), f"{ours['seconds']:.1f} s", str(ours["sweeps"])]
            cells += ["-"] * 4 if peer is None else _beside(ours, peer)
            cells += [_memory(ours), "-" if peer is None else _memory(peer)]
            lines.append(f"| {' | '.join(cells)} |")
    if default:
        header = (
            "| models | one descent | sweeps | memory | by default | sweeps | memory | objective |"
        )
        default = [header, "|---|--:|--:|--:|--:|--:|--:|--:|", *default]
    told = [f"To an equal objective, of the goals: {'; '.join(goals)}."] if goals else []
    tables = [lines if len(lines) > 2 else [], default, told, heads[1:]]
    return "\n\n".join("\n".join(each) for each in tables if each).split("\n")


def _goal(workload: str, ours: Report, peer: Report | None) -> list[str]:
    """Whether nlm is as much faster than the peer as was asked for, where it was."""
    least = next((least for name, least in FASTER.items() if workload.startswith(name)), None)
    if least is None or peer is None or ours["seconds_to_equal"] is None:
        return []
    ratio = peer["seconds"] / ours["seconds_to_equal"]
    found = "met" if ratio >= least else f"missed ({_times(ratio)})"
    if ratio < least and not peer["complete"]:
        found = f"not shown, the peer was ended (> {_times(ratio)})"
    return [f"{workload}, {least:g} times: {found}"]


def _heads_goal(rows: list[Report]) -> str:
    """Whether heads take as small a part of SciPy's time as was asked for."""
    seconds = {row["provider"]: row["seconds"] for row in rows}
    if "scipy" not in seconds:
        return ""
    part = seconds["nlm"] / seconds["scipy"]
    found = "met" if part <= HEADS else "missed"
    return f" At most a third of SciPy's time: {found} ({part:.2f})."


def _by_default(workload: str, once: Report, ours: Report) -> str:
    """One descent beside what the default does, and what the objective rises by."""
    cells = [workload]
    for row in (once, ours):
        cells += [f"{row['seconds']:.1f} s", str(row["sweeps"]), _memory(row)]
    return f"| {' | '.join(cells)} | {100 * (ours['objective'] / once['objective'] - 1):+.1f} % |"


def activation_matching(report: Report) -> list[str]:
    """What ``bench_activation_matching.py`` has left."""
    lines = [
        "| models | variant | of the bound | on top of the passes | matched correlation "
        "| units as by float32 |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['workload']} | {row['variant']} | {row['of_bound']:.2f} | "
            f"{100 * row['over_forwards']:.0f} % | {row['correlation']:.4f} | "
            f"{100 * row['same_as_float32']:.1f} % |"
        )
    first = report["rows"][0]
    then = "" if "residual" in first else ", the default when this was measured"
    streams = f'Residual streams: `residual="{first.get("residual", "last")}"`{then}.'
    return [*lines, "", f"{_missed(report['rows'])} {streams}"]


def _missed(rows: list[Report]) -> str:
    """Where a bound is passed that was asked for."""
    found = []
    for row in rows:
        few = " positions" in row["variant"]
        over = row["over_forwards"] - SAMPLED if few else row["of_bound"] - BOUND
        if over > 0:
            by = f"{100 * over:.0f} points" if few else f"{over:.2f}"
            found.append(f"{row['workload']}, {row['variant']}, by {by}")
    return (
        f"At most {BOUND} of the bound, and with some of the positions {100 * SAMPLED:.0f} % on "
        f"top of the passes: {'missed: ' + '; '.join(found) if found else 'met'}."
    )


_ON_A_LINE = 0.1  # of a time, that it may be off


def scale(report: Report) -> list[str]:
    """What ``host_scale.py`` has left."""
    lines = [
        "| method | parameters | whole process | bytes moved | a copy of as many | of its speed "
        "| own memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['method']} | {row['parameters'] / 1e6:.0f} M | {row['seconds']:.2f} s | "
            f"{row['gb_per_s']:.2f} GB/s | {row['copy_s']:.2f} s | {100 * row['fraction']:.0f} % | "
            f"{row['own'] / 2**20:.0f} MiB |"
        )
    told = "; ".join(
        f"{method}: {line['start_s']:.2f} s and {line['gb_per_s']:.2f} GB/s, no size further than "
        f"{100 * line['worst']:.0f} % from that"
        for method, line in report["lines"].items()
    )
    if max(line["worst"] for line in report["lines"].values()) <= _ON_A_LINE:
        return [*lines, "", f"Time is linear in bytes: {told}."]
    return [
        *lines, "", "That time is linear in bytes these runs do not show, in which seconds differ "
        f"by more than the sizes explain; the nearest lines: {told}.",
    ]  # fmt: skip


def _beside(ours: Report, peer: Report) -> list[str]:
    equal = ours["seconds_to_equal"]
    more = "" if peer["complete"] else "> "
    return [
        "not reached" if equal is None else f"{equal:.1f} s",
        f"{peer['provider']} {peer['seconds']:.1f} s",
        f"{peer['sweeps']}{'' if peer['complete'] else ', ended'}",
        "-" if equal is None else f"{more}{_times(peer['seconds'] / equal)}",
    ]


def _memory(row: Report) -> str:
    return f"{row['added_bytes'] / row['state_bytes']:.2f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x" if ratio < 10 else f"{ratio:.0f} x"


def _where(report: Report) -> str:
    threads = report.get("threads", report["rows"][0].get("threads"))
    return (
        f"{report['machine']} ({report['instruction set']}), {threads} threads, PyTorch "
        f"{report['versions']['torch']}, nlm at {report['commit']}:"
    )


_SECTIONS: tuple[tuple[str, str, str, Callable[[Report], list[str]]], ...] = (
    (
        "Whole jobs",
        "jobs",
        "What a user calls, on the kernels and, in the same process, with every operation on its "
        "PyTorch reference (`assignment`'s is SciPy's); both give the same result.",
        jobs,
    ),
    (
        "Large checkpoints",
        "host_scale",
        "Three Llama-like models in bfloat16, sharded, merged by `nlm merge` into a flushed and "
        "hashed folder, beside a program that copies as many bytes; the files lie in the system's "
        "cache, as far as other work on the machine leaves it room; the copy comes after the merge "
        "and finds what that has read.",
        scale,
    ),
    (
        "Weight matching",
        "weight_matching",
        "Two models with random weights of full size, drawn apart or a permuted copy with noise, "
        "from the identity on, beside `rebasin` 0.0.47's own loop over the same groups: with each "
        "parameter once, or as often as its tracer lists it. A peer that was ended had run its "
        "time, and its ratio is a bound. Memory is what is allocated beside the models, in their "
        "size: costs that are kept take at most as much as the models, and the largest cost matrix "
        "that is solved comes on top. `rebasin` knows no groups inside others (heads). Beside "
        "peers nlm runs one descent (`layerwise=False`); its default starts a second one where the "
        "first end is not clear, which no noisy copy here has, and random pairs have.",
        weight_matching,
    ),
    (
        "Activation matching",
        "activation_matching",
        "Time of `nlm.align(method=\"activations\")` as a part of its bound (a forward pass of "
        "each model and the products of all activations that are compared, as bare matrix "
        "products), and how much it adds to the two passes alone.",
        activation_matching,
    ),
)  # fmt: skip
