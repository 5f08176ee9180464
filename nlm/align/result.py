"""What an alignment found, and how well."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial

from torch import Tensor, nn

from nlm.symmetry import PermutationSpec
from nlm.symmetry.permutation import Permutation, check_rows

Move = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

BINS = 40
_SIMILARITY = "similarity:"  # in names of tensors in a file, which no group is called by


@dataclass
class AlignmentReport:
    """How an alignment went.

    Attributes
    ----------
    method : "weights", "frank-wolfe", "activations", "dual", "orthogonal", "straight-through" or
        "sinkhorn".
    objective : the maximised sum, at the start, where the Frank-Wolfe steps lead if that is higher
        (frank-wolfe), and after each sweep (weights, dual, also where all groups are in
        ``by_weights``); or once (activations). Of :mod:`nlm.align.learned` the loss in each step
        instead.
    correlation : group -> mean similarity of the matched units: cosine of their weights, or
        Pearson's correlation of their activations, or both in their shares (dual).
    seconds : wall time.
    samples : positions that the activation statistics saw, per group.
    excluded : entries left out of the cost.
    by_weights : groups that no module's output shows, matched by their weights (activations, dual).
    histogram : group -> how many matched units have their similarity in each of 40 equal bins
        from -1 to 1.
    descents : the last objective of every descent, of which the best is kept (weights).
    relaxed : the objective on the convex hull of the permutations, before and after each step
        (frank-wolfe).
    """

    method: str
    objective: list[float]
    correlation: dict[str, float]
    seconds: float
    samples: dict[str, int] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    by_weights: list[str] = field(default_factory=list)
    histogram: dict[str, list[int]] = field(default_factory=dict)
    descents: list[float] = field(default_factory=list)
    relaxed: list[float] = field(default_factory=list)


@dataclass
class AlignmentResult:
    """A permutation of the second model's units, and the report on how it was found.

    Attributes
    ----------
    similarity : group -> similarity of each of its matched units, float64 ``[*parent sizes, n]``;
        empty where the alignment is no permutation alone ("orthogonal").
    """

    permutation: Permutation
    report: AlignmentReport
    similarity: dict[str, Tensor] = field(default_factory=dict, kw_only=True)

    def moves(self, spec: PermutationSpec) -> tuple[Move, Move]:
        """What brings a state dict of the first model, or of an expert of it, into the common form,
        and what does it for the second; neither changes a function. ``spec`` is the groups'.
        """
        return partial(spec.apply, {}), partial(spec.apply, self.permutation)

    def receiver(self, model: nn.Module) -> nn.Module:
        """A copy of a model that can load what :meth:`moves` makes; nothing in it is moved yet."""
        return copy.deepcopy(model)

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes permutation and similarity to ``path`` as safetensors, the report in the header.

        ``force`` replaces a file that is there.
        """
        from nlm.checkpoint import write_tensors

        report = json.dumps(asdict(self.report))
        tensors = self.permutation | {f"{_SIMILARITY}{n}": t for n, t in self.similarity.items()}
        write_tensors(path, tensors, {"nlm": "AlignmentResult", "report": report}, force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "AlignmentResult":
        """Reads what :meth:`save` wrote to ``path``.

        Raises
        ------
        DamagedFileError, ValueError
            The file is damaged, or holds something else.
        """
        from nlm.checkpoint import read_kind
        from nlm.checkpoint.texts import build, parse_json, whole

        tensors, metadata = read_kind(path, cls.__name__, "nlm.align")
        similarity = {
            name.removeprefix(_SIMILARITY): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(_SIMILARITY)
        }
        with whole(path, cls.__name__, "nlm.align"):
            check_rows(tensors)
            report = build(AlignmentReport, parse_json(metadata["report"]))
        return cls(tensors, report, similarity=similarity)


def means(similarity: Mapping[str, Tensor]) -> dict[str, float]:
    """Group -> mean over its matched units."""
    return {group: float(each.mean()) for group, each in similarity.items()}


def histograms(similarity: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Group -> counts of its matched units in ``BINS`` bins from -1 to 1."""
    return {
        group: each.float().clamp(-1, 1).histc(BINS, -1, 1).int().tolist()
        for group, each in similarity.items()
    }
