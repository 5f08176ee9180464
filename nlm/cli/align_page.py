"""The results of ``nlm align``: matched similarities by group, the objective, and the barrier."""

from nlm._info import info
from nlm._results import Barrier, Report
from nlm.align import AlignmentReport
from nlm.cli.results import METHODS
from nlm.cli.spec_page import proof
from nlm.report import alignment_of
from nlm.symmetry import PermutationSpec
from nlm.symmetry.text import headline


def results(
    spec: PermutationSpec, report: AlignmentReport, curves: Barrier | None, a: str, b: str
) -> Report:
    """What a page shows of an alignment."""
    method = METHODS.get(report.method, report.method)
    found: Report = {
        "title": f"{b} aligned with {a}",
        "lead": f"{headline(spec)}, matched by {method} in {report.seconds:.1f} s.",
        "notes": [proof(spec)],
        "alignment": {report.method: alignment_of(report, spec)},
        "versions": info()["versions"],
    }
    return found if curves is None else {**found, "barrier": curves}
