"""What a proof leaves behind: a record of it, or an error that names the groups."""

from collections.abc import Iterable
from dataclasses import dataclass


class SymmetryError(ValueError):
    """A permutation that a specification allows changes what the model computes.

    Attributes
    ----------
    groups : the ids of the groups at fault, where single groups are.
    """

    def __init__(self, message: str, groups: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.groups = tuple(groups)


class VacuousError(SymmetryError):
    """Groups whose units have no effect on the outputs that could be told from rounding.

    Nothing is known to be wrong with them, but nothing is proven: pinned, they do no harm.
    """


@dataclass(frozen=True)
class Verification:
    """The proof that a specification holds for a model.

    ``max_error`` is the largest change of the outputs under random permutations and ``control`` the
    smallest change when a group is permuted everywhere except in one place, both relative to
    the largest output; the error must vanish against the control. Without groups there is no
    control. ``dtype`` is what the model computes in: "float64", or "float32 inside" where weights
    pass through float32 on their way to the outputs, which sets the error that is allowed.
    ``digest`` is that of the specification that was proven: a changed one is not. ``seeds`` and
    ``shapes`` are the numbers of permutations tried and of shapes of inputs.
    """

    dtype: str
    seeds: int
    max_error: float
    control: float | None
    digest: str = ""
    shapes: int = 1
