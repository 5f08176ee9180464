"""Draws the pictures of symmetry.md and fills its tables: from the shipped specifications and from
what benchmarks/bench_trace.py and benchmarks/prove_shipped.py have left.

    python docs/pictures.py

A test fails where they are not what this script would write.
"""

import json
import re
from pathlib import Path

from nlm import PermutationSpec
from nlm.cli.spec_figure import figure
from nlm.cli.spec_layers import shown
from nlm.symmetry import shipped
from nlm.symmetry.layout import references

HERE = Path(__file__).parent
PAGE = HERE / "symmetry.md"
[COSTS] = HERE.parent.glob("benchmarks/results/*/trace.json")
[PROOFS] = HERE.parent.glob("benchmarks/results/*/proofs.json")
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
    page = _between("shipped", lines, page)
    page = _between("proofs", _proofs(), page)
    return _between("cost", _costs(), page)


def _proofs() -> list[str]:
    """What benchmarks/prove_shipped.py found."""
    lines = [
        "| name | computes in | outputs change by | where a symmetry is broken |",
        "|---|---|---|---|",
    ]
    for row in json.loads(PROOFS.read_text())["rows"]:
        if "dtype" in row:
            found = f"{row['dtype']} | {row['max_error']:.1e} | {row['control']:.1e}"
        else:
            found = f"not proven: takes {row['needed_bytes'] / 2**30:.0f} GiB | | "
        lines.append(f"| `{row['model']}` | {found} |")
    return lines


def _costs() -> list[str]:
    """What tracing cost when benchmarks/bench_trace.py was last run."""
    measured = json.loads(COSTS.read_text())
    lines = ["| name | export | discovery | ratio | peak memory |", "|---|---|---|---|---|"]
    for row in measured["rows"]:
        lines.append(
            f"| `{row['model']}` | {row['export_s']:.1f} s | {row['discover_s']:.1f} s | "
            f"{row['times_export']:.2f} | {row['peak_bytes'] / 2**30:.2f} GiB |"
        )
    return lines


def _between(mark: str, lines: list[str], page: str) -> str:
    """The page with other lines between two marks."""
    pattern = rf"(<!-- {mark}: [^>]*-->\n).*?(<!-- end of {mark} -->)"
    text = "\n".join(lines)
    return re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)


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
