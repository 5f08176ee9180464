"""What docs/questions.md says of text."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from _pages import counted, spread, table

TASKS = {
    "kind": "code, C headers or prose",
    "package": "which package",
    "order": "as it is, shuffled or reversed",
    "comment": "code or comments",
}
HOW = {
    "permuted": "permuted",
    "rotated": "rotated",
    "refitted": "rotated, refitted",
    "refitted as they are": "as they are, refitted",
}


def sections(found: Mapping[str, Any]) -> list[str]:
    [run] = found["seeds"].values()
    widths = list(run["widths"])
    steps, size = run["settings"][widths[-1]]["steps"], run["settings"][widths[-1]]["size"]
    pairs = counted(run["calibration"], "pair")
    return [
        "## Which text aligns two language models, and how much of it?",
        f"{pairs.capitalize()} of character GPTs of Python's library ({size['depth']} layers of "
        f"width {size['width']}, {steps} steps, other seeds and batches), aligned on windows of "
        f"{run['settings'][widths[-1]]['length']} characters: their feed-forward units and heads "
        "permuted, or the stream and the heads rotated too; and refitted on the same text. The "
        "loss halfway on held-out code, in nats a character, above the mean loss of both.",
        calibration_table(run),
        calibration_verdict(run),
        "## Are wider language models nearer to one another?",
        f"The same by width, aligned on {_windows(run)} windows of code.",
        width_table(run),
        width_verdict(run),
        "## Fine-tuned pairs: is the curve between them an M?",
        "![The loss between fine-tuned networks](pictures/questions_text.png)",
        f"The {pairs} fine-tuned for a task each; the foundations' rotation is what aligns the "
        "experts. *M*: on both halves of the path some place has a loss below the end that is "
        "nearer to it.",
        tuned_table(run),
        tuned_verdict(run),
    ]


def _windows(run: Mapping[str, Any]) -> str:
    return str(max(int(name.rpartition(", ")[2]) for name in run["calibration"][0]))


def own(run: Mapping[str, Any]) -> list[float]:
    """The mean loss of both networks of each pair of the widest."""
    return [pair["own"] for pair in list(run["widths"].values())[-1]]


def over(run: Mapping[str, Any], text: str, how: str) -> list[float]:
    return [pair[text][how] - loss for pair, loss in zip(run["calibration"], own(run), strict=True)]


def calibration_table(run: Mapping[str, Any]) -> str:
    rows = []
    for name in run["calibration"][0]:
        text, _, count = name.rpartition(", ")
        rows.append([text, count, *(spread(over(run, name, how)) for how in HOW)])
    return table(["text", "windows", *HOW.values()], rows)


def calibration_verdict(run: Mapping[str, Any]) -> str:
    def at(text: str, how: str) -> str:
        return f"{mean(over(run, text, how)):.2f}"

    most = _windows(run)
    few = min(
        (int(name.rpartition(", ")[2]), name)
        for name in run["calibration"][0]
        if name.startswith("code")
    )[1]
    told = [
        f"{text} {at(f'{text}, {most}', 'rotated')} and {at(f'{text}, {most}', 'refitted')}"
        for text in ("code", "words shuffled", "headers", "prose", "characters at random")
    ]
    return (
        f"Rotated, and refitted, on {most} windows: {'; '.join(told)}. With "
        f"{few.rpartition(', ')[2]} windows of code: {at(few, 'rotated')} and "
        f"{at(few, 'refitted')}."
    )


def width_table(run: Mapping[str, Any]) -> str:
    columns = {
        "as they are": "as they are", "permuted": "permuted", "rotated": "rotated",
        "refitted": "rotated, refitted",
    }  # fmt: skip
    rows = []
    for width, pairs in run["widths"].items():
        losses = [spread([pair[how] - pair["own"] for pair in pairs]) for how in columns]
        rows.append([width, spread([pair["own"] for pair in pairs]), *losses])
    return table(["width", "own loss", *columns.values()], rows)


def width_verdict(run: Mapping[str, Any]) -> str:
    def share(width: str, how: str) -> float:
        """Of the barrier between the networks as they are."""
        pairs = run["widths"][width]
        return mean((p[how] - p["own"]) / (p["as they are"] - p["own"]) for p in pairs)

    widths = list(run["widths"])
    told = [
        f"at width {width} {share(width, 'rotated'):.0%} and {share(width, 'refitted'):.0%}"
        for width in widths
    ]
    return (
        "Of the barrier between the networks as they are there is left, rotated, and refitted: "
        f"{', '.join(told)}. Wider ones have learnt more in as many steps, too: compare shares."
    )


def is_m(losses: Sequence[float]) -> bool:
    """Whether both halves of the path have a place below their end."""
    half = len(losses) // 2
    return min(losses[1:half]) < losses[0] and min(losses[half + 1 : -1]) < losses[-1]


def depth(losses: Sequence[float]) -> float:
    """How far the path falls below its lower end; 0 where it does not."""
    return max(0.0, min(losses[0], losses[-1]) - min(losses))


def tuned_table(run: Mapping[str, Any]) -> str:
    rows = []
    for task, pairs in run["fine_tuned"].items():
        cells = [TASKS[task], spread([(p["rotated"][0] + p["rotated"][-1]) / 2 for p in pairs])]
        for how in pairs[0]:
            middle = [p[how][len(p[how]) // 2] for p in pairs]
            many = sum(is_m(p[how]) for p in pairs)
            deepest = max(depth(p[how]) for p in pairs)
            cells += [spread(middle), f"{many} of {len(pairs)}", f"{deepest:.3f}"]
        rows.append(cells)
    header = ["task", "own loss"]
    for how in next(iter(run["fine_tuned"].values()))[0]:
        header += [f"halfway, {how}", "M", "below both ends, at most"]
    return table(header, rows)


def tuned_verdict(run: Mapping[str, Any]) -> str:
    every = [pair for pairs in run["fine_tuned"].values() for pair in pairs]
    told = []
    for how in every[0]:
        many = sum(is_m(pair[how]) for pair in every)
        told.append(f"{many} of {len(every)} curves {how}")
    return f"An M: {', '.join(told)}."


def draw(found: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> picture."""
    from nlm.cli import figures

    [run] = found["seeds"].values()
    draws = []
    for pairs in run["fine_tuned"].values():
        count = len(pairs[0]["rotated"])
        series = {
            how: [mean(pair[how][n] for pair in pairs) for n in range(count)] for how in pairs[0]
        }
        places = [number / (count - 1) for number in range(count)]
        draws.append(figures.curves(places, series, "from one network to the other", "loss"))
    names = [TASKS[task] for task in run["fine_tuned"]]
    return {"questions_text.png": figures.png(draws, 3.0, names, 80)}
