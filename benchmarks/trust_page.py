"""Writes docs/trust.md: what is tried so that nlm can be depended on, with the numbers.

    python benchmarks/trust_page.py

makes it of the committed results of benchmarks/experiments/fuzzing.py and faults.py,
benchmarks/scaling.py, .ci/release, .ci/nightly and .ci/run; a test fails where the page is not what
this script would write.
"""

import json
import re
from pathlib import Path
from typing import Any

from packaging.version import Version

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trust.md"
RESULTS = ROOT / "benchmarks" / "results"
EXPERIMENTS = ROOT / "benchmarks" / "experiments" / "results"
FILES = {
    "fuzzing": EXPERIMENTS / "fuzzing.json",
    "faults": EXPERIMENTS / "faults.json",
    "release": RESULTS / "release.json",
    "nightly": RESULTS / "nightly.json",
    "ci": RESULTS / "ci.json",
}
EXAMPLES = 2000  # of each operator and each kind of file, by night
STAGES = "sanitize valgrind races fuzz support seldom examples release".split()  # of .ci/nightly

INTRODUCTION = """# What is tried

Made by `benchmarks/trust_page.py`. Merges that are killed or that the system fails have
[a page of their own](faults.md), so have [time and memory](scaling.md) and
[families of models](support.md).

| what is tried | how much |
|---|---|
{numbers}

## Files from strangers

Nothing that nlm reads is run: PyTorch's files are read with `weights_only=True` and their tensors
never unpickled into code, YAML makes plain values alone, NumPy archives are opened without pickles,
models' folders without remote code. Names in an index stay in its folder; a half-written checkpoint
is never written to through a link; headers, shapes, aliases, nesting and archives that would take
the memory or the time of the machine are refused before they do; so are pipes and devices in the
place of files, and outputs that would replace what is read. Pages escape all text, and names from
files cannot steer a terminal. Nothing is looked up on a network: tested under an audit that ends
the process at the first name resolved or connection opened (`tests/test_security.py`,
`tests/test_strange_inputs.py`).

A recipe is the exception: where it names a function (`package.module:function`, as data or as a
score), that is imported and called, and its output goes where it says. One from a stranger is read
before it is checked or merged. Links in a model's folder are followed, as Hugging Face's cache
needs.

Every reader ends in what it was asked for or in one sentence of its own. {kinds} kinds of files are
changed by bytes and by the parts of their JSON, pickle, YAML or framing: 100 of each kind in every
run of the tests, 2,000 by night (`tests/test_readers.py`), and guided by coverage (atheris,
libFuzzer): **{tried:,} files, {findings} findings open**.
"""

FOUND = """Found in this way and mended: {number} places where another library's error came through
or a file was taken for whole:

{list}
"""
THREADS = """## Threads and memory

All operators on the samples of the conformance suite from 8 Python threads at once while the
number of PyTorch's threads changes, in children of a plain `os.fork` beside their working parent,
and in workers of data loaders that fork and that spawn: the same bits as alone, and no hang
(`tests/test_concurrency.py`). In a forked child an operation asks PyTorch for one thread;
PyTorch's own operations wait there for ever where they would use several, unless
`torch.set_num_threads(1)` is called first, as data loaders do.

AddressSanitizer and UndefinedBehaviorSanitizer run on every change (`.ci/sanitize`);
ThreadSanitizer on a build whose threads are those of the standard library (`.ci/races`) and
valgrind on a build without instruction sets (`.ci/valgrind`) by night. Each first has to see a
mistake that is made on purpose.
"""

MENDED = (
    "negative and truncated offsets in zip archives of PyTorch",
    "archives of many disks (seen only by the fuzzing that coverage guides)",
    "index and structure errors inside PyTorch's own reader of pickles",
    "JSON and YAML nested by the thousand (recursion, and seconds growing as the square)",
    "aliases of aliases in a YAML specification",
    "proofs in a specification whose numbers are texts",
    "alignments, joint and orthogonal, with damaged reports, groups or index arrays",
    "moments with other names, shapes or negative counts",
    "corrections with rows that are no rows, tables of other shapes, NaN",
    "merged weights with masks of no task or of other sizes",
    "NumPy archives that are no archives, hold no numbers, or promise more than they have",
    "benchmark results with lists for names",
    "shapes whose product has a million digits",
    "lines of text nested by the thousand; an adapter's configuration that is no mapping",
    "pipes and devices in the place of checkpoints, indices, configurations and specifications",
    "headers that safetensors' own reader refuses: UTF-16, half a pair of it, shapes that are no "
    "list",
    "packed pickles, and NumPy archives that unpack to more than a hundred times their size",
    "names of tensors, groups and types that steered the terminal, or were markup of its bar",
    "a recipe through a pipe, which was read twice and the second time empty",
    "recipes and data inside the output that `--force` replaces; outputs beside an input's weights",
    "seeds from 2^53 on, rounded; numbers of layers with thousands of digits; folders whose name "
    "is not UTF-8",
    "sizes of groups in a file of alignments, for which 16 GiB were asked before they were refused",
)


def page(results: dict[str, dict[str, Any]]) -> str:
    fuzzing = results["fuzzing"]
    parts = [
        INTRODUCTION.format(
            kinds=len(fuzzing["rows"]), tried=fuzzing["tried"], findings=fuzzing["findings"],
            numbers=_numbers(results),
        ).strip(),
        FOUND.format(number=len(MENDED), list="\n".join(f"- {each}" for each in MENDED)).strip(),
        _fuzzed(fuzzing),
        THREADS.strip(),
        _released(results["release"]),
        _changes(results["ci"]),
        _night(results["nightly"]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _numbers(results: dict[str, dict[str, Any]]) -> str:
    fuzzing, faults, release = (results[name] for name in ("fuzzing", "faults", "release"))
    kills = sum(each["kills"] for each in faults["kills"])
    versions = {name: {row["versions"][name] for row in release["rows"]} for name in ("torch",)}
    pythons = {".".join(row["python"].split(".")[:2]) for row in release["rows"]}
    rows = {
        "operators, and kinds of files, held to their rule on drawn examples": (
            f"100 examples of each on every change, {EXAMPLES:,} by night"
            + _examined(results["nightly"])
        ),
        "malformed files tried under guidance by coverage": f"{fuzzing['tried']:,}",
        "merges killed; errors of the system and damaged files injected": (
            f"{kills}; {len(faults['faults'])}"
        ),
        "Python threads at once, with PyTorch's changing among 1, 2, 3, 4 and 8": "8",
        "offsets in elements; tensors of a state dict; layers; units of a group": (
            "beyond 2^31; 20,000; 1,000; 1 to 16,384"
        ),
        "versions of Python; of PyTorch": (
            f"{', '.join(sorted(pythons, key=_order))}; "
            f"{', '.join(sorted(versions['torch'], key=_order))}"
        ),
        "findings that are open": str(fuzzing["findings"] + faults["wrong"]),
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _examined(nightly: dict[str, Any]) -> str:
    passed = re.search(r"(\d+) passed", " ".join(nightly.get("examples", {}).get("said", [])))
    return f": {int(passed[1]) * EXAMPLES:,}" if passed else ""


def _order(version: str) -> Version:
    return Version(version.partition("+")[0])


def _fuzzed(report: dict[str, Any]) -> str:
    lines = [
        f"With {report['seconds']:.0f} s for each kind on a busy machine, PyTorch "
        f"{report['versions']['torch']}, atheris {report['versions']['atheris']}:", "",
        "| kind | tried | read | refused | branches seen | findings |", "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in report["rows"]:
        lines.append(
            f"| {row['kind']} | {row['tried']:,} | {row['read']:,} | {row['refused']:,} | "
            f"{row['edges']:,} | {len(row['findings'])} |"
        )
    if left := unfuzzed(report):
        lines += ["", f"Mutated in the tests, but not yet in this run: {', '.join(left)}."]
    return "\n".join(lines)


def unfuzzed(report: dict[str, Any]) -> list[str]:
    """Kinds of files that joined ``tests/_readers.py`` after the run."""
    source = (ROOT / "tests" / "_readers.py").read_text()
    known = re.findall(r'^    "([^"]+)": Kind\(', source, re.MULTILINE)
    return [name for name in known if name not in {row["kind"] for row in report["rows"]}]


def _released(report: dict[str, Any]) -> str:
    sizes = ", ".join(f"`{name}` ({size / 1e6:.1f} MB)" for name, size in report["files"].items())
    lines = [
        "## What is published", "",
        f"`.ci/release` builds {sizes}; the wheels are built from the sdist in isolation and "
        "repaired by auditwheel, with libgomp left to PyTorch's wheel. Each is installed in a "
        "virtual environment with its core dependencies alone, and imported before PyTorch and "
        "after it; all examples of the operations run there, a trace, an alignment, a merge, a "
        "correction and a merge of files.", "",
        "| Python | PyTorch | NumPy | SciPy | safetensors | first | examples | libgomp mapped | "
        "at |",
        "|---|---|---|---|---|---|--:|--:|---|",
    ]  # fmt: skip
    for row in report["rows"]:
        of = row["versions"]
        lines.append(
            f"| {row['python']} | {of['torch']} | {of['numpy']} | {of['scipy']} | "
            f"{of['safetensors']} | {row['first']} | {row['examples']} | {row['libgomp']} | "
            f"{row.get('commit', '-')} |"
        )
    lines += ["", _runtimes(report["rows"])]
    if not any("least" in row for row in report["rows"]):
        lines += ["", "Not in this run: the least versions that `pyproject.toml` names."]
    for row in report["rows"]:
        if "least" in row and row["first"] == "torch":
            least = ", ".join(f"{name} {version}" for name, version in row["least"].items())
            lines += [
                "", f"With Python {row['python']} everything is as old as `pyproject.toml` allows, "
                f"and the demonstration and a network of transformers ran too: {least}.",
            ]  # fmt: skip
    return "\n".join(lines)


def _runtimes(rows: list[dict[str, Any]]) -> str:
    others = sorted({each for row in rows for each in row.get("libgomp of others", [])})
    text = (
        "nlm and PyTorch share one OpenMP runtime, whichever comes first: counted after all of the "
        "above, and the trial fails at a second one."
    )
    if others:
        names = ", ".join(f"`{each}`" for each in others)
        text += f" The demonstration, after that, maps one that another wheel brings: {names}."
    if any(row["libgomp"] > 1 for row in rows):
        text += " Rows of 2 are of an earlier commit, which counted after the demonstration."
    return text


def _changes(ci: dict[str, Any]) -> str:
    if not ci:
        return (
            "## Every change\n\n`.ci/run` passes in a clean checkout before a change is taken, and "
            "prints a table of seconds; `NLM_STAGES=FILE` keeps it."
        )
    lines = [
        "## Every change", "",
        f"`.ci/run` passes in a clean checkout before a change is taken; at {ci['commit']} on a "
        f"machine of {ci['processors']} processors:", "", "| stage | seconds |", "|---|--:|",
    ]  # fmt: skip
    return "\n".join(lines + [f"| {name} | {took} |" for name, took in ci["seconds"].items()])


def _night(nightly: dict[str, Any]) -> str:
    lines = [
        "## The night", "",
        "`.ci/nightly` runs what a change does not wait for, in one command, and keeps what each "
        "stage said. Here on a machine with much other work: seconds from beginning to end, and of "
        "one processor.", "",
        "| stage | begun | at | seconds | of a processor | it said |", "|---|---|---|--:|--:|---|",
    ]  # fmt: skip
    for name in sorted(nightly, key=lambda name: (*STAGES, name).index(name)):
        found = nightly[name]
        said = "; ".join(_said(found["said"])).replace("|", "/")
        said = f"**failed**: {said}" if found["code"] else said
        lines.append(
            f"| {name} | {found.get('began', '-').replace('T', ' ').rstrip('Z')} | "
            f"{found.get('commit', '-')} | {found['seconds']:,} | "
            f"{found.get('processor seconds', '-')} | {said} |"
        )
    if missing := [f"`{name}`" for name in STAGES if name not in nightly]:
        lines += ["", f"Not kept from a run: {', '.join(missing)}."]
    if again := _again(nightly):
        names = " and ".join(f"`{name}`" for name in again)
        lines += ["", f"What {names} found in the whole night was mended; they ran again after it."]
    return "\n".join(lines)


def _again(nightly: dict[str, Any]) -> list[str]:
    """The stages that failed within the whole night, and have passed since."""
    whole = nightly.get("the whole", {"said": [], "began": ""})
    failed = " ".join(whole["said"]).partition("failed: ")[2]
    return [
        name
        for name in STAGES
        if f"{name} (" in failed
        and nightly[name]["code"] == 0
        and nightly[name]["commit"] != whole["commit"]
    ]


def _said(lines: list[str]) -> list[str]:
    """What a stage said last: of tests the closing line alone."""
    told = [line.strip("= ") for line in lines if not line.startswith("{")]
    return told[-1:] if told and " passed" in told[-1] else told


def load() -> dict[str, dict[str, Any]]:
    return {
        name: json.loads(file.read_text()) if file.exists() else {} for name, file in FILES.items()
    }


def main() -> None:
    PAGE.write_text(page(load()))


if __name__ == "__main__":
    main()
