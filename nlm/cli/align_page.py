"""The results of ``nlm align``: matched similarities by group, the objective, and the barrier."""

from dataclasses import asdict

from nlm._info import info
from nlm._results import Alignment, Barrier, Group, Report
from nlm.align import AlignmentReport
from nlm.cli.results import METHODS
from nlm.cli.spec_page import proof
from nlm.symmetry import PermutationSpec
from nlm.symmetry.text import headline


def results(
    spec: PermutationSpec, report: AlignmentReport, curves: Barrier | None, a: str, b: str
) -> Report:
    """What a page shows of an alignment."""
    method = METHODS.get(report.method, report.method)
    alignment: Alignment = {**asdict(report), "groups": {}}  # type: ignore[typeddict-item]
    for name, counts in report.histogram.items():
        group = spec.groups[name]
        of = f" in {group.parents[-1]}" if group.parents else ""
        alignment["groups"][name] = Group(units=f"{sum(counts)} units{of}", origin=group.origin)
    found: Report = {
        "title": f"{b} aligned with {a}",
        "lead": f"{headline(spec)}, matched by {method} in {report.seconds:.1f} s.",
        "notes": [proof(spec)],
        "alignment": {report.method: alignment},
        "versions": info()["versions"],
    }
    return found if curves is None else {**found, "barrier": curves}
