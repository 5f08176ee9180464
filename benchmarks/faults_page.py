"""Writes docs/faults.md: what merges leave that are killed, or that the system or their files fail.

    python benchmarks/faults_page.py

makes it of the committed results of benchmarks/experiments/faults.py; a test fails where the page
is not what this script would write.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _pages import again

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results" / "faults.json"

INTRODUCTION = """# Merges that are killed, and that fail

`nlm merge` grows its output in a hidden folder beside it: each file is flushed to the disk when
it is finished, with a note of its SHA-256, and the folder gets its name when all are. A merge
that dies leaves nothing, a state that `--resume` takes up, or the whole result; an output that
`--force` replaces stays until the new one has its name, but for a moment between two renames,
after which the next command brings one of them back. `--resume` reads the finished files again
and keeps those whose digest is the noted one, of the same recipe and the same inputs (by size and
time). Where it finds the whole result under its name it reads its files again, says that they are
what the model card says, and ends with 0; it refuses another recipe's. A single file has no card:
it is merged again beside, and compared.

An error is one sentence on stderr that names the file. Exit codes: 0 done, 1 failed, 2 wrong use,
130 stopped by the user; what a signal ends, the shell reports as 128 and its number.

What cannot be seen: a bit that flips in an input's weights is another weight. It is noticed where
it makes the result infinite, not a number, or the input another file in size or time; the digests
in the model card are of what was written.

This page is made by `benchmarks/faults_page.py` from one run of
`benchmarks/experiments/faults.py` on a busy machine. It tries all of this with real processes
and compares what they leave with an undisturbed merge, byte by byte; a short form is among the
tests."""

OF_CALL = re.compile(r"(\w+) at (\w+) (\d+)")


def page(report: dict[str, Any]) -> str:
    wrong = report["wrong"]
    calls = sum(each["calls"] for each in report["calls"])
    moments = sum(each["kills"] for each in report["kills"])
    late = sum(each["late"] for each in report["kills"])
    verdict = "None of them left anything else." if not wrong else f"**{wrong} were wrong.**"
    parts = [
        INTRODUCTION,
        "## Killed",
        f"SIGKILL at {moments} random moments of processes that have nlm imported, from their "
        f"command's start on, all of which hit (of {late} more the merge was over); and before "
        f"each of {calls} calls on files of the output's folder. {verdict} "
        "Each was then resumed and ended as if undisturbed.",
        table(("merge", "kills", "left, how often"), killed(report)),
        "One of several processes, at its fifth write:",
        table(("processes", "killed", "the others end after"), together(report)),
        "## Errors of the system",
        "At the n-th call of a kind on the output's folder or on the models. *short* is a call "
        "that reads or writes half of what it is asked to.",
        table(("error", "call", "n", "exit code", "left"), of_calls(report)),
        "## Files",
        table(("what is wrong", "exit code", "what is said"), of_files(report)),
    ]
    closing = "The seed is fixed; the moments of the kills are the machine's."
    parts.append(again("experiments/faults.py", "faults_page.py", closing=closing))
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


def killed(report: dict[str, Any]) -> Iterable[Sequence[Any]]:
    for each in report["kills"]:
        name = f"{each['recipe']}, {each['seconds']:.1f} s, at random moments"
        yield name, each["kills"], _counted(each["states"])
    for each in report["calls"]:
        what = "replaces another" if each["replaces"] else "new"
        yield f"dare, {what}, before every call", each["calls"], _counted(each["states"])


def together(report: dict[str, Any]) -> Iterable[Sequence[Any]]:
    for each in report["ranks"]:
        yield each["processes"], f"number {each['victim']}", f"{each['seconds']:.1f} s"


def of_calls(report: dict[str, Any]) -> Iterable[Sequence[Any]]:
    groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for each in report["faults"]:
        if found := OF_CALL.fullmatch(each["fault"]):
            error, call, number = found.groups()
            groups.setdefault((error, call), []).append((number, each))
    for (error, call), found in groups.items():
        codes = sorted({each["code"] for _, each in found})
        states = sorted({each["state"] for _, each in found})
        numbers = ", ".join(number for number, _ in found)
        yield error, call, numbers, ", ".join(map(str, codes)), ", ".join(states)


def of_files(report: dict[str, Any]) -> Iterable[Sequence[Any]]:
    for each in report["faults"]:
        if not OF_CALL.fullmatch(each["fault"]):
            said = each["said"].strip().replace("|", "\\|") if each["code"] else "done as usual"
            yield each["fault"], each["code"], said


def _counted(states: dict[str, int]) -> str:
    return ", ".join(f"{state}: {count}" for state, count in sorted(states.items()))


def main() -> None:
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
