"""Keeps what .ci/release tried: ``keep_release.py ROWS WHEELS COMMIT``.

It goes to benchmarks/results/release.json.

A trial takes the place of an earlier one of the same Python, PyTorch and order of imports; the
others stay, each with the commit that it was tried at.
"""

import json
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "benchmarks" / "results" / "release.json"


def key(row: dict) -> tuple[list[int], bool, list[int], str]:
    numbers = [int(part) for part in row["python"].split(".")[:2]]
    torch = row["versions"]["torch"].partition("+")[0].split(".")
    is_least = "least" in row  # whichever these versions were
    return numbers, not is_least, [] if is_least else list(map(int, torch)), row["first"]


def main() -> None:
    rows, wheels, commit = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    known = json.loads(FILE.read_text()) if FILE.exists() else {"files": {}, "rows": []}
    new = [json.loads(line) | {"commit": commit} for line in rows.read_text().splitlines()]
    tried = [key(row) for row in new]
    kept = [row for row in known["rows"] if key(row) not in tried]
    files = known["files"] | {each.name: each.stat().st_size for each in wheels.iterdir()}
    ordered = sorted(kept + new, key=lambda row: (*key(row)[:3], row["first"] != "torch"))
    content = {"files": dict(sorted(files.items())), "rows": ordered}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
