"""Writes docs/recovery.md: what noise leaves of planted permutations, from the committed results.

    python benchmarks/recovery_page.py

A test fails where the page is not what this script would write.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recovery.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results" / "recovery.json"

PEERS = ("rebasin", "Git Re-Basin with SciPy", "greedy, SciPy")

INTRODUCTION = """# Planted permutations under noise

Made by `benchmarks/recovery_page.py` from the results of `benchmarks/experiments/recovery.py`.
Trained networks, each against a copy of itself in a random order, with normal noise of so many of
a tensor's standard deviations on every tensor: the share of units that come back to their place,
means over {seeds} seeds with their standard errors. Peers are `rebasin` 0.0.47 with its own loop,
Git Re-Basin's loop written out with PyTorch and SciPy, and one pass from the input to the output.
They know of no heads: of the transformer they match the feed-forward layers, and nlm does so beside
them; "all groups" is nlm's alone. "Layerwise" is `nlm.align(..., layerwise=True)`."""


def page() -> str:
    found = json.loads(RESULTS.read_text())
    networks: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        networks.setdefault(row["network"], []).append(row)
    parts = [INTRODUCTION.format(seeds=len(found["rows"][0]["shares"])), verdict(found["rows"])]
    for network, rows in networks.items():
        parts += [f"## {network}", table(rows)]
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
    """Where nlm's methods by weights are below the best peer."""
    below: dict[str, list[str]] = {}
    cells = dict.fromkeys((row["network"], row["noise"]) for row in rows)
    for network, noise in cells:
        shares = {
            row["method"]: mean(row["shares"])
            for row in rows
            if (row["network"], row["noise"]) == (network, noise)
        }
        peers = {name: shares[name] for name in PEERS if name in shares}
        if not peers:
            continue
        best = max(peers, key=lambda name: peers[name])
        for method, share in shares.items():
            if method.startswith(("nlm weights", "nlm frank-wolfe")):
                below.setdefault(method, [])
                if share < peers[best] - 1e-9:
                    below[method].append(
                        f"{network}, noise {noise:g} ({share:.4f}, {best} {peers[best]:.4f})"
                    )
    lines = ["Below the best peer by the mean, of the methods by weights:", ""]
    lines += [f"- {name}: {'; '.join(where) or 'nowhere'}" for name, where in below.items()]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean(values):.3f}" + (f" ± {error:.3f}" if error >= 5e-4 else "")


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
