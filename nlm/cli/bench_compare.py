"""``nlm bench compare``: what became slower between two runs on one machine."""

import json
from pathlib import Path
from typing import Any

from nlm.checkpoint.names import printable

_KEY = ("op", "workload", "dtype", "threads")


def compare(old: Path, new: Path, worse: float) -> int:
    """Prints a line for each workload that nlm takes ``worse`` times as long for; 1 if any, else 0.

    A time counts as a fraction of the limit that its run measured, where the workload has one: a
    machine that other work slows down slows its limits down too.
    """
    before, after = _load(old), _load(new)
    if before["machine"] != after["machine"]:
        raise ValueError(
            f"nlm bench compare: both runs are of one machine, got {before['machine']!r} and "
            f"{after['machine']!r}"
        )
    for path, report in ((old, before), (new, after)):
        if report.get("quick"):
            raise ValueError(
                f"nlm bench compare: a quick run is one unwarmed round and tells no speed, got "
                f"{str(path)!r}"
            )
    earlier, later = _rows(before), _rows(after)
    common = [key for key in earlier if key in later]
    if not common:
        raise ValueError(
            f"nlm bench compare: the runs share a workload, got {len(earlier)} in {str(old)!r} and "
            f"{len(later)} others in {str(new)!r}"
        )
    slower = 0
    for key in common:
        ratio = _ratio(earlier[key], later[key])
        if not ratio <= worse:
            slower += 1
            op, workload, dtype, threads = (printable(str(each)) for each in key)
            print(
                f"{op}, {workload}, {dtype}, threads {threads}: {ratio:.2f} times slower "
                f"({_told(earlier[key])} -> {_told(later[key])})"
            )
    absent = len(earlier) - len(common)
    print(
        f"{len(common)} workloads compared, {slower} more than {worse:g} times slower"
        + (f"; {absent} of {old.name} are not in {new.name}" if absent else "")
    )
    return 1 if slower else 0


def is_results(path: Path) -> bool:
    """Whether a file holds results of ``nlm bench``."""
    try:
        _load(path)
    except (OSError, ValueError):
        return False
    return True


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"nlm bench compare: a file of results exists, got {str(path)!r}")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        complete = isinstance(report["machine"], str) and all(
            {*_KEY, "provider"} <= row.keys()
            and all(isinstance(row[name], (str, int)) for name in _KEY)
            and isinstance(row["median_s"], (int, float))
            and isinstance(row.get("fraction_of_limit", 0.0), (int, float))
            and row["median_s"] > 0
            and row.get("fraction_of_limit", 1.0) > 0
            for row in report["rows"]
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        complete = False
    if not complete:
        raise ValueError(
            f"nlm bench compare: a file of results is what nlm bench writes, got another form in "
            f"{str(path)!r}"
        )
    return report


def _rows(report: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {
        tuple(row[name] for name in _KEY): row for row in report["rows"] if row["provider"] == "nlm"
    }


def _ratio(old: dict[str, Any], new: dict[str, Any]) -> float:
    if "fraction_of_limit" in old and "fraction_of_limit" in new:
        return old["fraction_of_limit"] / new["fraction_of_limit"]
    return new["median_s"] / old["median_s"]


def _told(row: dict[str, Any]) -> str:
    part = row.get("fraction_of_limit")
    limit = "" if part is None else f", {100 * part:.0f} % of the limit"
    return f"{1e3 * row['median_s']:.3g} ms{limit}"
