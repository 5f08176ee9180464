"""Whether results that a file holds can be drawn: what their types do not say."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nlm.cli.results import Results

LARGEST = 1e100  # of the numbers: a plane of 1e308 has no area
LONGEST = 5000  # of the texts: a name of a hundred thousand letters takes minutes


def check_parts(found: Any) -> None:
    """Raises ValueError for a number or a text anywhere in a tree that no picture can show."""
    parts = [found]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, list):
            parts += part
        elif isinstance(part, str):
            part.encode("utf-8")
            if len(part) > LONGEST:
                raise ValueError(f"a text of {len(part)} letters, more than {LONGEST}")
        elif isinstance(part, (int, float)) and LARGEST < abs(part) < math.inf:
            raise ValueError(f"a number beyond {LARGEST:g}")


def check_forms(results: Results) -> None:
    """Raises ValueError where numbers that belong together are not as many, or there are none."""
    for found in (_settings, _series, _alignments, _landscapes, _projections):
        for what in found(results):
            raise ValueError(what)


def _settings(results: Results) -> Iterator[str]:
    for setting, by_tasks in results.get("settings", {}).items():
        if not by_tasks or any(str(int(tasks)) != tasks for tasks in by_tasks):
            yield f"a setting has numbers of tasks, got {list(by_tasks)[:3]} for {setting!r}"


def _series(results: Results) -> Iterator[str]:
    """Curves are as long as their axes."""
    layers, barrier = results.get("layers"), results.get("barrier")
    curves: list[tuple[Sequence[Any], Iterable[Sequence[float]]]] = []
    if layers is not None:
        curves += [
            (layers["points"], layers[part].values())
            for part in ("variance_ratio", "relative_distance")
        ]
    if barrier is not None:
        curves.append((barrier["lambda"], barrier["loss"].values()))
    for axis, each in curves:
        for curve in each:
            if len(curve) != len(axis):
                yield f"a curve has a number for each place, got {len(curve)} for {len(axis)}"


def _alignments(results: Results) -> Iterator[str]:
    for found in results.get("alignment", {}).values():
        for name, counts in found.get("histogram", {}).items():
            if not counts or name not in found["correlation"]:
                yield f"a histogram counts the similarities of a group, got none for {name!r}"


def _landscapes(results: Results) -> Iterator[str]:
    for surface in results.get("landscapes", {}).values():
        sizes = len(surface["y"]), len(surface["x"])
        rises = all(
            math.isfinite(a) and math.isfinite(b) and a < b
            for axis in (surface["x"], surface["y"])
            for a, b in itertools.pairwise(axis)
        )
        if min(sizes) < 2 or not rises:
            yield f"a plane has two rising axes of two places or more, got {list(sizes)}"
        for grid in surface["values"].values():
            if {len(row) for row in grid} != {sizes[1]} or len(grid) != sizes[0]:
                yield f"a plane has a number at each of its places, {list(sizes)}, got others"


def _projections(results: Results) -> Iterator[str]:
    for title, places in results.get("projections", {}).items():
        if not places or not all(each and {2} == set(map(len, each)) for each in places.values()):
            yield f"a projection has two numbers a sample, got others for {title!r}"
