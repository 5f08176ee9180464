"""Keeps what .ci/release tried: ``keep_release.py ROWS WHEELS COMMIT``.

It goes to benchmarks/results/release.json.

A trial takes the place of an earlier one of the same Python, PyTorch and order of imports; the
others stay, each with the commit that it was tried at. So with files: a wheel takes the place of an
earlier one for its Python, whichever version or name that had, and the sdist that of the earlier.
"""

import json
import sys
from pathlib import Path

from packaging.version import Version

FILE = Path(__file__).parents[1] / "benchmarks" / "results" / "release.json"


def key(row: dict) -> tuple[Version, bool, Version, str]:
    python = Version(".".join(row["python"].split(".")[:2]))
    torch = Version(row["versions"]["torch"].partition("+")[0])  # dev, rc and alphas have an order
    is_least = "least" in row  # whichever these versions were
    return python, not is_least, Version("0") if is_least else torch, row["first"]


def place(file: str) -> str:
    """What a file is the only one of: the sdist, or the wheel for a Python."""
    return file.removesuffix(".whl").split("-")[-3] if file.endswith(".whl") else "sdist"


def joined(known: dict, new: list[dict], files: dict[str, int]) -> dict:
    """What is known, with new trials and files in the place of older ones."""
    tried = [key(row) for row in new]
    kept = [row for row in known["rows"] if key(row) not in tried]
    made = {place(name) for name in files}
    older = {name: size for name, size in known["files"].items() if place(name) not in made}
    ordered = sorted(kept + new, key=lambda row: (*key(row)[:3], row["first"] != "torch"))
    return {"files": dict(sorted((older | files).items())), "rows": ordered}


def main() -> None:
    rows, wheels, commit = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    known = json.loads(FILE.read_text()) if FILE.exists() else {"files": {}, "rows": []}
    new = [json.loads(line) | {"commit": commit} for line in rows.read_text().splitlines()]
    files = {each.name: each.stat().st_size for each in wheels.iterdir()}
    FILE.write_text(json.dumps(joined(known, new, files), indent=1) + "\n")


if __name__ == "__main__":
    main()
