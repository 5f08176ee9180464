"""The page of ``nlm align``: matched similarities by group, the objective, and the barrier."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nlm.align import AlignmentReport
from nlm.cli.figures import curves as drawn
from nlm.cli.page import page
from nlm.cli.spec_page import proof
from nlm.symmetry import PermutationSpec
from nlm.symmetry.text import headline

_WIDTH, _HEIGHT = 200, 60  # of a histogram
METHODS = {"weights": "weights", "activations": "activations", "orthogonal": "orthogonal maps"}


def render(
    spec: PermutationSpec,
    report: AlignmentReport,
    curves: Mapping[str, Any] | None,
    a: str,
    b: str,
) -> str:
    """The page as HTML; all text is escaped."""
    return page(
        "align.html.jinja",
        a=a,
        b=b,
        headline=headline(spec),
        proof=proof(spec),
        report=report,
        method=METHODS[report.method],
        groups=list(_groups(spec, report)),
        size=(_WIDTH, _HEIGHT),
        objective=_objective(report.objective),
        barrier=None if curves is None else _barrier(curves),
        barriers={} if curves is None else curves["barriers"],
    )


def _groups(spec: PermutationSpec, report: AlignmentReport) -> Iterator[dict[str, Any]]:
    for name, counts in report.histogram.items():
        group = spec.groups[name]
        yield {
            "name": name,
            "units": f"{sum(counts)} units" + (f" in {group.parents[-1]}" if group.parents else ""),
            "origin": group.origin,
            "similarity": report.correlation[name],
            "by_weights": name in report.by_weights,
            "path": _bars(counts),
        }


def _bars(counts: Sequence[int]) -> str:
    """A histogram as the path of its outline."""
    width, most = _WIDTH / len(counts), max(*counts, 1)
    steps = "".join(f"V{_HEIGHT * (1 - n / most):.1f}h{width:.1f}" for n in counts)
    return f"M0 {_HEIGHT}{steps}V{_HEIGHT}z"


def _objective(objective: Sequence[float]) -> str | None:
    if len(objective) < 2:
        return None
    sweeps = list(range(len(objective)))
    return drawn(sweeps, {"objective": objective}, "sweep", "sum of similarities")


def _barrier(curves: Mapping[str, Any]) -> str:
    return drawn(curves["positions"], curves["losses"], "share of the second model", "loss")
