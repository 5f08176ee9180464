"""Writes docs/barriers.md: the barriers between small transformers, from the committed results.

    python benchmarks/barriers.py

A test fails where the page is not what this script would write.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from _pages import again, counted, dots, save, spread

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "barriers.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"

KINDS = {
    "gpt": "A character GPT, pre-norm",
    "bert": "A masked character model, post-norm",
    "vit": "A vision transformer, pre-norm",
}
ROWS = {
    "raw": "none",
    "folded": "none, norms folded",
    "scrambled": "none, B scrambled (control)",
    "feed-forward": "feed-forward units permuted",
    "heads in order": "+ units of heads permuted, heads in order",
    "heads ignored": "+ units of heads permuted, heads ignored (no symmetry)",
    "heads": "+ heads permuted",
    "stream permuted, first": "+ stream permuted, as its first norm sees it",
    "stream permuted, all": "+ stream permuted, as all norms see it",
    "stream permuted": "+ stream permuted, as its last norm sees it",
    "by weights": "all of these, by weights, in one descent",
    "by weights, layerwise": "all of these, by weights, also layer by layer (the default)",
    "by weights, Frank-Wolfe": "all of these, by weights, also by Frank-Wolfe steps",
    "stream rotated": "stream rotated instead, heads permuted",
    "heads rotated": "+ inside of heads rotated",
    "a copy that was scrambled": "a scrambled copy of A, aligned (control)",
}
FINE_TUNED = {
    "bert": "Fine-tuned to tell Python, C headers and prose apart",
    "vit": "Fine-tuned for Greek letters",
}
PERMUTED = (
    "feed-forward", "heads in order", "heads", "stream permuted, first", "stream permuted, all",
    "stream permuted", "by weights", "by weights, layerwise", "by weights, Frank-Wolfe",
)  # fmt: skip
STREAMS = ("stream permuted, first", "stream permuted, all", "stream permuted")
ROTATED = ("stream rotated", "heads rotated")
STEPS = {
    "feed-forward": "raw",
    "heads in order": "feed-forward",
    "heads": "feed-forward",
    "stream permuted, first": "heads",
    "stream permuted, all": "heads",
    "stream permuted": "heads",
    "stream rotated": "heads",
    "heads rotated": "stream rotated",
}

PICTURE = "barriers.png"

INTRODUCTION = """# Barriers between transformers

Made by `benchmarks/barriers.py` from the results of
`benchmarks/experiments/transformer_barriers.py`. Networks of one kind differ in their initial
weights and in their batches. The barrier is what the loss on held-out data rises above the line
that joins its two ends, at the highest of {points} points between the weights of A and of B as they
are aligned (cross entropy, nats); means over the pairs, with their standard errors. Alignments are
by activations on unlabelled training data where nothing else is said. Aligned models compute what
they computed before; the two controls are a B in a random order and gauge, and a scrambled copy of
A, which has to come back exactly.

Published: heads help and permuting the stream hurts masked language models (Verma and Elbayad,
arXiv:2403.00986: 4.31 to 3.71 with heads; 4.95 to 7.34 with the stream); rotations leave less than
permutations (Theus et al. 2025: 2.02, 1.43 and 0.34 for a GPT-2, 1.69, 1.27 and 0.36 for a ViT).
The expected order is vanilla > permutations > rotations. Absolute values hang on the network and on
how long it was trained; these were trained shortly. Characters alone, by how frequent they are,
have a loss of 3.0."""


def load() -> list[dict[str, Any]]:
    """The results of all kinds, with alignments by weights that were run on their own."""
    found = []
    for kind in KINDS:
        paths = [RESULTS / f"transformer_barriers_{kind}{more}.json" for more in ("", "_weights")]
        if not paths[0].exists():
            continue
        result, *others = (json.loads(path.read_text()) for path in paths if path.exists())
        for other in others:
            _add_rows(result, other)
            if "fine_tuned" in result:
                _add_rows(result["fine_tuned"], other["fine_tuned"])
        found.append(result)
    return found


def _add_rows(result: dict[str, Any], other: dict[str, Any]) -> None:
    """Adds the rows of another run, which has to be of the same networks."""
    for pair, more in zip(result["pairs"], other["pairs"], strict=True):
        one, two = (
            [each["seeds"], each["rows"]["raw"]["losses"], each["rows"]["by weights"]["losses"]]
            for each in (pair, more)
        )
        if one != two:
            raise ValueError(f"rows are added to those of the same networks, got {one} and {two}")
        pair["rows"] |= more["rows"]


def page() -> str:
    results = load()
    parts = [INTRODUCTION.format(points=results[0]["settings"]["points"]), streams(results)]
    picture = f"![The barrier under each alignment](pictures/{PICTURE})"
    made = again(
        "experiments/transformer_barriers.py gpt bert vit",
        "experiments/transformer_barriers.py vit --weights", "barriers.py",
    )  # fmt: skip
    return "\n\n".join([*parts, picture, *map(section, results), made]) + "\n"


def draw() -> dict[str, bytes]:
    """The barriers of all kinds, by the picture's file name."""
    kinds = {
        KINDS[result["kind"]]: {
            title: mean(barriers(result["pairs"], name))
            for name, title in ROWS.items()
            if name in result["pairs"][0]["rows"]
        }
        for result in load()
    }
    return {PICTURE: dots({"": kinds}, "barrier, nats")}


def streams(results: list[dict[str, Any]]) -> str:
    """What the figures say of the default of residual streams."""
    ladders = [each for result in results for each in (result, result.get("fine_tuned")) if each]
    below = {name: 0 for name in ("heads", "stream permuted, first", "stream permuted")}
    for ladder in ladders:
        best, *others = (
            mean(barriers(ladder["pairs"], name)) for name in ("stream permuted, all", *below)
        )
        for name, other in zip(below, others, strict=True):
            below[name] += best < other
    heads, first, last = below.values()
    return (
        'The published default leaves residual streams in order (`residual="identity"`, the rows '
        f'*{ROWS["heads"]}*); nlm\'s default, `residual="all"`, permutes them as all norms see '
        f"them, because that left a lower barrier in {heads} of the {len(ladders)} ladders below; "
        f'it was also lower than "last" in {last} and than "first" in {first}. Residual networks '
        "of convolutions were not compared."
    )


def section(result: dict[str, Any]) -> str:
    pairs, settings = result["pairs"], result["settings"]
    size = settings["size"]
    about = (
        f"{size['depth']} layers of width {size['width']}, {size['heads']} heads, "
        f"{size['hidden']} feed-forward units; {settings['steps']} steps of "
        f"{settings['recipe']['batch']} samples; {members(pairs)}"
    )
    if "pseudo_perplexity" in pairs[0]:
        own = [each for pair in pairs for each in pair["pseudo_perplexity"]]
        about += f", their pseudo-perplexity {min(own):.2f} to {max(own):.2f}"
    parts = [f"## {KINDS[result['kind']]}", f"{about}.", table(pairs), verdict(result)]
    parts += corrections(pairs)
    if result["kind"] == "bert" and min(pairs[0]["rows"]["raw"]["losses"]) > 2.5:
        parts.append(
            "It has learned little more than how frequent the characters are, so there is little "
            "to lose between two of them: these rows say nothing yet about the published ones."
        )
    if tuned := result.get("fine_tuned"):
        about = (
            f"The same networks after {settings['tuning_steps']} more steps of "
            f"{settings['tuning']['batch']} samples, all from one head; {members(tuned['pairs'])}."
        )
        parts += [f"### {FINE_TUNED[result['kind']]}", about, table(tuned["pairs"]), verdict(tuned)]
        parts += corrections(tuned["pairs"])
    return "\n\n".join(parts)


def members(pairs: list[dict[str, Any]]) -> str:
    """The seeds of the pairs, and what the networks' own losses are."""
    seeds = sorted({seed for pair in pairs for seed in pair["seeds"]})
    own = [pair["rows"]["raw"]["losses"][end] for pair in pairs for end in (0, -1)]
    return (
        f"seeds {', '.join(map(str, seeds))}: {counted(pairs, 'pair')}. The networks' own loss is "
        f"{min(own):.3f} to {max(own):.3f}"
    )


def table(pairs: list[dict[str, Any]]) -> str:
    first = pairs[0]["rows"]
    perplexity = "pseudo_perplexity" in first["raw"]
    more = " pseudo-perplexity halfway |" if perplexity else ""
    lines = [f"| alignment of B | barrier | loss halfway |{more}", "|---|--:|--:|"]
    lines[1] += "--:|" if perplexity else ""
    for name, title in ROWS.items():
        if name in first:
            rows = [pair["rows"][name] for pair in pairs]
            halfway = [row["losses"][len(row["losses"]) // 2] for row in rows]
            cells = [title, _spread([row["barrier"] for row in rows], 3), _spread(halfway, 3)]
            if perplexity:
                cells.append(_spread([row["pseudo_perplexity"] for row in rows], 1))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def corrections(pairs: list[dict[str, Any]]) -> list[str]:
    """What corrections leave of the loss that the mean of two networks has above their own."""
    first = pairs[0].get("corrected")
    if not first:
        return []
    columns = list(next(iter(first.values())))
    both = ", also with the best units of both instead of means" if "select" in columns else ""
    lines = [
        "The loss of the mean of A and B above the mean of their own, as it is, with REPAIR, and "
        f"with its layers solved anew by least squares (`nlm.refit`{both}); most of what that "
        "gains needs no alignment, which the first line shows.",
        f"| alignment of B | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}",
    ]
    above = {
        name: {
            column: [
                pair["corrected"][name][column] - mean([losses[0], losses[-1]])
                for pair in pairs
                for losses in [pair["rows"]["raw"]["losses"]]
            ]
            for column in columns
        }
        for name in first
    }
    for name, found in above.items():
        cells = [_spread(values, 3) for values in found.values()]
        lines[1] += f"\n| {ROWS[name]} | {' | '.join(cells)} |"
    before, *_, after = above.values()
    whole = mean(before[columns[0]])

    def removed(found: dict[str, list[float]]) -> str:
        return ", ".join(f"{column} {1 - mean(v) / whole:.0%}" for column, v in found.items())

    told = (
        f"Of {whole:.3f} nats that the mean has more without alignment are removed, as "
        f"*{ROWS[list(above)[-1]]}* has it: {removed(after)}; not aligned: "
        f"{removed({column: before[column] for column in columns[1:]})}."
    )
    return [*lines, told]


def verdict(result: dict[str, Any]) -> str:
    """Where the published order holds, and what made it worse."""
    pairs = result["pairs"]
    found = {name: mean(barriers(pairs, name)) for name in ROWS if name in pairs[0]["rows"]}
    ladder = {"raw": found["raw"]}
    for names in (PERMUTED, ROTATED):
        known = [name for name in names if name in found]
        if known:
            best = min(known, key=lambda name: found[name])
            ladder[best] = found[best]
    values = list(ladder.values())
    holds = values == sorted(values, reverse=True)
    each = ", ".join(f"{value:.3f} ({ROWS[name]})" for name, value in ladder.items())
    order = "vanilla > permutations" + (" > rotations" if len(ladder) > 2 else "")
    text = [f"The order {order} {'holds' if holds else '**does not hold**'}: {each}."]
    for name, before in STEPS.items():
        if name in found and found[name] > found[before]:
            worse = sum(
                one > two
                for one, two in zip(barriers(pairs, name), barriers(pairs, before), strict=True)
            )
            text.append(
                f"*{ROWS[name].removeprefix('+ ')}* is worse than *{ROWS[before]}*, by "
                f"{found[name] - found[before]:.3f}, in {worse} of {counted(pairs, 'pair')}."
            )
    seen = {name: found[name] for name in STREAMS if name in found}
    if result["refused"] and seen and min(seen.values()) < found["heads"]:
        best = min(seen, key=lambda name: seen[name])
        text.append(
            f"Permuting the stream, which raised the barriers of the published masked models, "
            f"lowers this one by {found['heads'] - seen[best]:.3f} (*{ROWS[best]}*)."
        )
    if result["refused"]:
        text.append(f"Rotations are refused: `{result['refused']}`")
    return " ".join(text)


def barriers(pairs: list[dict[str, Any]], name: str) -> list[float]:
    return [pair["rows"][name]["barrier"] for pair in pairs]


def _spread(values: list[float], digits: int) -> str:
    """Mean and standard error."""
    if max(map(abs, values)) < 5 * 10.0**-digits:
        return f"{max(map(abs, values)):.0e} at most"
    return spread(values, digits)


def main() -> None:
    save(draw())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
