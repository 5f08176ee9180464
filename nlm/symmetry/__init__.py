"""What may be permuted in a network without changing what it computes."""

from nlm.symmetry.layout import Family, Fixed, Layout, Product, Ref, Sum, parse
from nlm.symmetry.permutation import AxisGroup, Permutation
from nlm.symmetry.pretrained import trace_config
from nlm.symmetry.proof import SymmetryError, VacuousError, Verification
from nlm.symmetry.spec import PermutationSpec, Site
from nlm.symmetry.trace import trace
from nlm.symmetry.widening import Widening

__all__ = [
    "AxisGroup",
    "Family",
    "Fixed",
    "Layout",
    "Permutation",
    "PermutationSpec",
    "Product",
    "Ref",
    "Site",
    "Sum",
    "SymmetryError",
    "VacuousError",
    "Verification",
    "Widening",
    "parse",
    "trace",
    "trace_config",
]
