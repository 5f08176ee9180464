"""Writes docs/support.md: what was tried on each family of models, and what came of it.

    python benchmarks/support_page.py

makes it of the committed results of benchmarks/experiments/support.py; a test fails where the page
is not what this script would write.
"""

import json
from pathlib import Path
from typing import Any

from _pages import again

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results" / "support.json"

TITLES = {
    "dense": "Linear layers, attention and mixtures, written here",
    "recurrent": "Recurrent", "convolutional": "Convolutional", "blocks": "Blocks",
    "ideas": "Ideas of papers", "mixing": "Mixing", "encoders": "Text encoders of transformers",
    "decoders": "Decoders of transformers", "translators": "Encoders with decoders",
    "vision transformers": "Vision transformers", "vision": "Vision",
    "speech": "Speech", "others": "Others",
}  # fmt: skip

INTRODUCTION = """# What works with which models

Made by `benchmarks/support_page.py` of a run of `benchmarks/experiments/support.py` with
{versions}: {count} small networks with random weights, those of transformers of its own classes.

- **align**: traced, and a planted random permutation found by weight matching. *exact*: every entry
  came back bit by bit. *function*: the units came back in another order of the same function
  (twins, dead units).
- **merge**: linear and TIES merges with perturbed copies load strictly and give finite outputs.
- **TACT**: fitted for two experts, and the corrected outputs are finite and moved; the number of
  correction points.
- **fold**: the task's plain module computes what the corrected model does. *inline*: some points
  cannot be folded exactly, and the module from `Tact.inline` applies these as it runs.

{exact} of {count} are aligned exactly and {function} more to the same function; {merged} are
merged, {tact} corrected, {fold} of these folded exactly and {inline} inlined. {rest}

An architecture that is missing is likely to work: symmetries are found on the model's graph, with
no table of architectures. [How to try one](howto/architecture.md).
"""


def page(report: dict[str, Any]) -> str:
    rows = report["rows"]

    def count(column: str, start: str) -> int:
        return sum(row[column].startswith(start) for row in rows)

    tact = [row for row in rows if row["tact"].endswith("points")]
    refused = [row for row in rows if any(_no(row[name]) for name in _COLUMNS)]
    rest = "None says no." if not refused else f"{len(refused)} say no somewhere, and why below."
    versions = report["versions"]
    parts = [
        INTRODUCTION.format(
            versions=f"PyTorch {versions['torch']}", count=len(rows), exact=count("align", "exact"),
            function=count("align", "function"), merged=count("merge", "yes"), tact=len(tact),
            fold=count("fold", "yes"), inline=count("fold", "inline"), rest=rest,
        ).strip()
    ]  # fmt: skip
    for room in dict.fromkeys(row["room"] for row in rows):
        lines = [
            f"## {TITLES[room]}", "", "| network | class | align | merge | TACT | fold |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in (each for each in rows if each["room"] == room):
            cells = " | ".join("no" if _no(row[name]) else row[name] for name in _COLUMNS)
            lines.append(f"| {row['name']} | `{row['class']}` | {cells} |")
        parts.append("\n".join(lines))
    if refused:
        lines = ["## What says no", ""]
        for row in refused:
            for name in _COLUMNS:
                if _no(row[name]):
                    said = row[name].partition(": ")[2]
                    lines.append(f"- {row['name']}, {name}: `{said[:300].replace('`', '')}`")
        parts.append("\n".join(lines))
    closing = "Seeds are fixed; weights are random and nothing is trained."
    parts.append(again("experiments/support.py", "support_page.py", closing=closing))
    return "\n\n".join(parts) + "\n"


_COLUMNS = ("align", "merge", "tact", "fold")


def _no(text: str) -> bool:
    return text.startswith(("no:", "FAULT"))


def main() -> None:
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
