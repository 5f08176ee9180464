"""Writes docs/recovery.md: what noise leaves of planted permutations, from the committed results.

    python benchmarks/recovery_page.py

A test fails where the page is not what this script would write.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _pages import again

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recovery.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results" / "recovery.json"

DEFAULT, ONCE = "nlm weights", "nlm weights, one descent"
PEERS = ("rebasin", "Git Re-Basin with SciPy", "greedy, SciPy")

INTRODUCTION = """# Planted permutations under noise

Made by `benchmarks/recovery_page.py` from the results of `benchmarks/experiments/recovery.py`.
Trained networks, each against a copy of itself in a random order, with normal noise of so many of
a tensor's standard deviations on every tensor: the share of units that come back to their place,
means over {seeds} seeds with their standard errors. Peers are `rebasin` 0.0.47 with its own loop,
Git Re-Basin's loop written out with PyTorch and SciPy, and one pass from the input to the output.
They know of no heads: of the transformer they match the feed-forward layers, and nlm does so beside
them; "all groups" is nlm's alone. "One descent" is `nlm.align(..., layerwise=False)`; "layerwise"
starts a second one from where one layer after the other settles (`layerwise=True`); by default
`nlm.align` does so where the first one's end is not clear{default}. Where not all come back, noise
has moved the optimum off what was planted: a higher objective may then be a unit or two fewer in
their places."""


def page() -> str:
    found = json.loads(RESULTS.read_text())
    methods = {row["method"] for row in found["rows"]}
    default = f' ("{DEFAULT}")' if ONCE in methods else ""
    for row in found["rows"] if not default else ():
        row["method"] = {DEFAULT: ONCE}.get(row["method"], row["method"])
    networks: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        networks.setdefault(row["network"], []).append(row)
    parts = [
        INTRODUCTION.format(seeds=len(found["rows"][0]["shares"]), default=default),
        verdict(found["rows"]),
    ]
    for network, rows in networks.items():
        parts += [f"## {network}", table(rows)]
    seeds = " ".join(map(str, range(len(found["rows"][0]["shares"]))))
    parts.append(again(f"experiments/recovery.py --seeds {seeds}", "recovery_page.py"))
    return "\n\n".join(parts) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each method, a column for each noise."""
    noises = list(dict.fromkeys(row["noise"] for row in rows))
    lines = [
        f"| method | {' | '.join(f'noise {noise:g}' for noise in noises)} |",
        f"|---|{'--:|' * len(noises)}",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [spread(row["shares"]) for row in rows if row["method"] == method]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Where nlm's methods by weights are below the best peer, seed by seed on the same copies."""
    below: dict[str, list[str]] = {}
    for network, noise in dict.fromkeys((row["network"], row["noise"]) for row in rows):
        at = (network, noise)
        shares = {r["method"]: r["shares"] for r in rows if (r["network"], r["noise"]) == at}
        values = {
            r["method"]: r.get("objectives") for r in rows if (r["network"], r["noise"]) == at
        }
        peers = [name for name in PEERS if name in shares]
        if not peers:
            continue
        best = max(peers, key=lambda name: mean(shares[name]))
        for method, found in shares.items():
            if method.startswith(("nlm weights", "nlm frank-wolfe")):
                less = [theirs - ours for theirs, ours in zip(shares[best], found, strict=True)]
                below.setdefault(method, [])
                if mean(less) > 1e-9:
                    tie = ", a tie" if mean(less) <= _standard_error(less) else ""
                    high = _as_high(values[method], values[best])
                    where = f"{network}, noise {noise:g}"
                    below[method].append(f"{where}, by {_error(less, 4)}{tie} ({best}{high})")
    lines = [
        "Below the peer that is best there, by the mean difference over the seeds and its standard "
        "error (no more than that is a tie):",
        "",
    ]
    lines += [f"- {name}: {'; '.join(where) or 'nowhere'}" for name, where in below.items()]
    return "\n".join(lines)


def _as_high(ours: list[float] | None, theirs: list[float] | None) -> str:
    """In how many of the seeds the objective, which both maximise, is at least the peer's."""
    if ours is None or theirs is None:
        return ""
    count = sum(one >= other * (1 - 1e-9) for one, other in zip(ours, theirs, strict=True))
    return f", whose objective nlm reaches or passes in {count} of {len(ours)}"


def spread(values: list[float]) -> str:
    """Mean and standard error; the mean alone where they agree."""
    return _error(values, 3) if max(values) > min(values) else f"{values[0]:.3f}"


def _error(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {_standard_error(values):.{digits}f}"


def _standard_error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
