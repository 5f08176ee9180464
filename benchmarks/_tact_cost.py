"""The section of docs/corrections.md on what TACT costs."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from _pages import counted, table

PICTURE = "tact_cost.png"
FIT, SERVE = 1.3, 1.05  # the goals, of the bare passes and of the uncorrected model's time

Rows = Sequence[Mapping[str, Any]]


def section(found: Mapping[str, Any]) -> list[str]:
    """Curves over the tasks, the large networks, and whether the goals are met."""
    small = [row for row in found["rows"] if "depth" not in row]
    large = [row for row in found["rows"] if "depth" in row]
    first, amounts = small[0], [str(each["samples"]) for each in large[0]["amounts"]]
    extra = mean((row["mixed_cpu"] - row["plain_cpu"]) / row["points"] for row in small)
    return [
        "Made of `benchmarks/experiments/tact_cost.py`, on "
        f"{counted(range(found['machine']['threads']), 'thread')}. A small vision transformer "
        f"(width 96, 4 blocks, {first['points']} points, {first['samples']} samples a task in "
        f"micro-batches of {first['micro_batch']}): processor seconds of a fit, of the bare passes "
        "of the merged model and the experts over the same samples, their ratio, the time of a "
        "batch of mixed tasks over that of the uncorrected model, and the bytes of all "
        "corrections. In brackets the ratios of the clock, on a machine that others use too.",
        curve(small),
        f"![Seconds and bytes by the number of tasks](pictures/{PICTURE})",
        f"A point takes {1e6 * extra:.0f} microseconds more in a batch of the small network, most "
        "of them for the call and not for the numbers; in large blocks that is little beside their "
        f"products. Blocks of the large sizes, two tasks: the ratio at {' and '.join(amounts)} "
        f"samples a task, and on the line through both at {large[0]['amount']:,}. Tasks are fitted "
        "one after the other, so that the ratio of eight is that of two.",
        blocks(large, amounts),
        f"The goals, by the processor: {'; '.join(goals(large))}.",
    ]


def draw(found: Mapping[str, Any]) -> dict[str, bytes]:
    """The picture of the curves over the tasks, by its file name."""
    from nlm.cli import figures

    rows = [row for row in found["rows"] if "depth" not in row]
    tasks = [row["tasks"] for row in rows]
    seconds = {
        "a fit": [row["fit_cpu"] for row in rows],
        "bare passes": [row["bare_cpu"] for row in rows],
    }
    sizes = {"corrections": [row["correction_bytes"] / 1000 for row in rows]}
    return {
        PICTURE: figures.png(
            [
                figures.curves(tasks, seconds, "tasks", "processor seconds", 0),
                figures.curves(tasks, sizes, "tasks", "kilobytes", 0),
            ],
            3.4, (), 80,
        )
    }  # fmt: skip


def both(row: Mapping[str, Any], ratio: str, digits: int = 2) -> str:
    """A ratio of processor seconds, and that of the clock."""
    return f"{row[f'{ratio}_cpu']:.{digits}f} ({row[f'{ratio}_seconds']:.{digits}f})"


def curve(rows: Rows) -> str:
    """By the number of tasks."""
    header = ["tasks", "fit, s", "bare passes, s", "ratio", "mixed batch", "bytes (of the model)"]
    return table(
        header,
        (
            [
                str(row["tasks"]), f"{row['fit_cpu']:.2f}", f"{row['bare_cpu']:.2f}",
                both(row, "fit_ratio"), both(row, "serving_ratio"),
                f"{row['correction_bytes']:,} ({row['correction_bytes'] / row['model_bytes']:.1%})",
            ]
            for row in rows
        ),
    )  # fmt: skip


def blocks(rows: Rows, amounts: Sequence[str]) -> str:
    """The large networks."""
    header = [
        "network", "blocks", *(f"fit, {count} samples" for count in amounts),
        f"fit, {rows[0]['amount']:,} samples", "mixed batch", "bytes a task",
    ]  # fmt: skip
    return table(
        header,
        (
            [
                row["network"], str(row["depth"]),
                *(both(each, "fit_ratio", 3) for each in row["amounts"]),
                both(row, "ratio_at_amount", 3), both(row, "serving_ratio", 3),
                f"{row['correction_bytes'] / row['tasks']:,.0f}",
            ]
            for row in rows
        ),
    )  # fmt: skip


def goals(rows: Rows) -> list[str]:
    """What was asked of the large networks, and what came of it."""
    found = []
    for row in rows:
        for name, goal, ratio in (
            ("statistics", FIT, "ratio_at_amount"),
            ("serving", SERVE, "serving_ratio"),
        ):
            told, clock = (_reached(row[f"{ratio}_{of}"], goal) for of in ("cpu", "seconds"))
            also = f"{told}, by the clock {'too' if clock == told else clock}"
            found.append(f"{row['network']}, {name} at most {goal} times: {also}")
    return found


def _reached(ratio: float, goal: float) -> str:
    return "met" if ratio <= goal else f"missed by {ratio - goal:.3f}"
