"""The work of ``nlm bench``: finds the workloads, runs them, writes one file of results."""

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import nlm
from nlm.checkpoint import atomic_path, refuse_existing
from nlm.cli.bench_compare import is_results

_DEFAULT_JSON = Path("bench.json")


def run(
    operation: str | None,
    peers: bool,
    threads: Sequence[int],
    part: str,
    seconds: float,
    quick: bool,
    json_file: Path | None,
    force: bool,
) -> None:
    """Runs the workloads of one operation or of all.

    Without ``json_file`` the results are ``bench.json`` in the current folder; those that an
    earlier run left there are replaced, any other file of that name is kept.
    """
    target = json_file or _DEFAULT_JSON
    replace = force or (json_file is None and is_results(target))
    refuse_existing(target, replace)
    suite = _suite()
    stems = suite.stems()
    if operation is not None and operation not in stems:
        raise ValueError(f"nlm bench: an operation is one of {', '.join(stems)}, got {operation!r}")
    chosen = stems if operation is None else [operation]
    report = suite.run(
        {stem: suite.source(stem) for stem in chosen},
        threads=threads, part=part, peers=peers, seconds=seconds, quick=quick,
    )  # fmt: skip
    if not report["rows"]:
        raise ValueError(f"nlm bench: --workload is part of a workload's name, got {part!r}")
    with atomic_path(target, replace) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nThe results are {target}")


def _suite() -> Any:
    """The module ``_bench`` of the benchmarks: in a checkout, or installed with the package."""
    package = Path(nlm.__file__).resolve().parent
    folders = [package / "benchmarks", package.parent / "benchmarks"]
    for folder in folders:
        if (folder / "_bench.py").is_file():
            sys.path.insert(0, str(folder))
            return import_module("_bench")
    raise FileNotFoundError(
        f"nlm bench: the workloads are a folder 'benchmarks' in or beside the package, got none "
        f"in {' or '.join(str(folder.parent) for folder in folders)}"
    )
