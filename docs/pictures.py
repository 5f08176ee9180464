"""Draws the pictures of symmetry.md and fills its table, from the specifications that are shipped.

    python docs/pictures.py

A test fails where they are not what this script would write.
"""

import re
from pathlib import Path

from nlm import PermutationSpec
from nlm.cli.spec_figure import figure
from nlm.cli.spec_layers import shown
from nlm.symmetry import shipped
from nlm.symmetry.layout import references

HERE = Path(__file__).parent
PAGE = HERE / "symmetry.md"
DRAWN = ("bert-base", "qwen2-0.5b")


def picture(name: str) -> str:
    """The drawing of a shipped specification."""
    return figure(shown(PermutationSpec.load(name)))


def filled(page: str) -> str:
    """The page with its table as the specifications say."""
    lines = [
        "| name | class | groups | permutations | entries that move |",
        "|---|---|---|---|---|",
    ]
    for name, (model_class, _) in shipped.MODELS.items():
        spec = PermutationSpec.load(name)
        lines.append(
            f"| `{name}` | {model_class} | {len(spec.free)} | {spec.permutation_count} | "
            f"{_moved(spec)} of {len(spec.params)} |"
        )
    table = "\n".join(lines)
    pattern = r"(<!-- shipped: [^>]*-->\n).*?(<!-- end of shipped -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", page, flags=re.DOTALL)


def _moved(spec: PermutationSpec) -> int:
    """The number of entries that some group moves."""
    return sum(
        any(ref.group in spec.free for layout in layouts for ref in references(layout))
        for layouts in spec.params.values()
    )


def main() -> None:
    for name in DRAWN:
        (HERE / "pictures" / f"{name}.svg").write_text(picture(name))
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
