"""Weight matching: the permutation that maximises the inner product of two models' weights.

    maximise over P    sum_W  <W_A, P(W_B)>,

which is the least distance ||A - P(B)||, by coordinate descent (Ainsworth, Hayase and Srinivasa,
Git Re-Basin, arXiv:2209.04836, algorithm 1): with all other groups held, the best permutation of
one group solves a linear assignment problem on the sum of its similarities over the parameters it
stands on. All in float64. Groups are visited in random order; one whose neighbours have not moved
since its last visit is not solved again. A sweep that gains less than ``tolerance`` times the
objective is the last.

BatchNorm's running statistics are permuted with their channels but are no part of the cost: their
scale would dominate it. Heads are part of it where the models share their classes.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nlm._state_dict import StateDict, check_weight, is_statistic, matches
from nlm.align.assignment import best_assignment, matched
from nlm.align.result import AlignmentReport, AlignmentResult
from nlm.align.similarity import permuted, similarity, squared_norms
from nlm.symmetry import PermutationSpec
from nlm.symmetry.layout import references
from nlm.symmetry.permutation import Permutation


def weight_matching(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    spec: PermutationSpec,
    *,
    seed: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-9,
    exclude: str | tuple[str, ...] = (),
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """The permutation of ``b``'s units that brings its weights closest to ``a``'s.

    Parameters
    ----------
    a, b : state dicts of the specification's entries and shapes, of any float dtype.
    seed : of the order in which the groups are visited.
    max_sweeps : at most so many visits to every group.
    tolerance : the relative gain of a sweep at which to stop.
    exclude : patterns of entries to leave out of the cost. Heads whose classes differ in number
        are left out by themselves; where the specification does not say which axes are outputs (a
        hand-written one), so is every entry whose sizes differ on an axis without groups.
    progress : called after each sweep with its number and the objective; what it raises cancels.

    Raises
    ------
    ValueError, TypeError
        See :func:`nlm.align`.
    NotImplementedError
        A group with parents (heads and the like).
    """
    started = time.perf_counter()
    cost = _Cost(a, b, spec, exclude)
    permutation = spec.identity()
    generator = torch.Generator().manual_seed(seed)
    groups = list(spec.free)
    objective = [cost.objective(permutation)]
    stale = set(groups)
    for sweep in range(max_sweeps):
        for number in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[number]
            if group not in stale:
                continue
            stale.discard(group)
            if cost.improve(group, permutation):
                stale |= cost.neighbours(group)
        objective.append(cost.objective(permutation))
        if progress is not None:
            progress(sweep + 1, objective[-1])
        if objective[-1] - objective[-2] <= tolerance * abs(objective[-1]):
            break
    report = AlignmentReport(
        "weights",
        objective,
        {group: cost.cosine(group, permutation) for group in groups},
        time.perf_counter() - started,
        excluded=cost.excluded,
    )
    return AlignmentResult(permutation, report)


class _Cost:
    """Two models' weights in float64 and the groups that stand on them."""

    def __init__(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, exclude: str | tuple[str, ...]
    ) -> None:
        for group in spec.groups.values():
            if group.parents:
                raise NotImplementedError(
                    f"nlm.align: weight matching moves groups without parents, got {group.id!r} "
                    f"inside {', '.join(group.parents)}"
                )
        for state in (a, b):
            spec.check_state_dict(state)
        self.spec = spec
        self.excluded: list[str] = []
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for name, layouts in spec.params.items():
            for who, state in (("model_a", a), ("model_b", b)):
                check_weight("nlm.align", who, name, state[name])
            if is_statistic(name) or not any(ref for part in layouts for ref in references(part)):
                continue
            if matches(name, exclude) or self._is_other_head(a, b, name):
                self.excluded.append(name)
                continue
            self.a[name] = a[name].detach().cpu().double()
            self.b[name] = b[name].detach().cpu().double()

    def _is_other_head(self, a: StateDict, b: StateDict, name: str) -> bool:
        """Whether an entry is of two sizes because the models have other classes."""
        if a[name].shape == b[name].shape:
            return False
        for dim, (size_a, size_b) in enumerate(zip(a[name].shape, b[name].shape, strict=True)):
            pinned = self.spec.pinned.get(f"{name}:{dim}")
            if size_a != size_b and self.spec.outputs and pinned != "output":
                raise ValueError(
                    f"nlm.align: the models have the same shapes, got {list(a[name].shape)} and "
                    f"{list(b[name].shape)} for {name!r}"
                )
        return True

    def objective(self, permutation: Permutation, names: set[str] | None = None) -> float:
        """The inner product of the weights of ``a`` and of ``b`` in a permutation's order."""
        return sum(
            float(torch.sum(self.a[name] * self._in_order(name, permutation)))
            for name in (self.a if names is None else names)
        )

    def improve(self, group: str, permutation: Permutation) -> bool:
        """Gives a group its best permutation, in place; whether the objective rose."""
        gain_matrix = self._similarity(group, permutation)
        old, new = permutation[group], best_assignment(gain_matrix)
        if torch.equal(old, new):
            return False
        quadratic = self._twice(group)
        if quadratic:  # the other side of the parameter moves too: compare what really comes out
            before = self.objective(permutation, quadratic)
            after = self.objective({**permutation, group: new}, quadratic)
            linear = self._similarity(group, permutation, without=quadratic)
            gain = after - before + float((matched(linear, new) - matched(linear, old)).sum())
            scale = abs(before) + float(matched(linear, old).abs().sum())
        else:
            gain = float((matched(gain_matrix, new) - matched(gain_matrix, old)).sum())
            scale = float(matched(gain_matrix, old).abs().sum())
        if gain <= 1e-12 * scale:
            return False
        permutation[group] = new
        return True

    def neighbours(self, group: str) -> set[str]:
        """The groups that share a parameter with one; itself where it stands on two dimensions."""
        found = {
            ref.group
            for name in self._carriers(group)
            for layout in self.spec.params[name]
            for ref in references(layout)
        }
        return found if self._twice(group) else found - {group}

    def cosine(self, group: str, permutation: Permutation) -> float:
        """The mean cosine between the weights of matched units."""
        pairs = matched(self._similarity(group, permutation), permutation[group])
        norm_a, norm_b = (
            sum(
                (
                    squared_norms(side[name], self.spec.params[name][dim], dim, group, len(pairs))
                    for name, dim in self._places(group)
                ),
                torch.zeros(len(pairs), dtype=torch.float64),
            )
            for side in (self.a, self.b)
        )
        norm = (norm_a * norm_b[permutation[group]]).sqrt()
        live = norm > 0
        return float(torch.where(live, pairs / torch.where(live, norm, 1.0), 0.0).mean())

    def _similarity(
        self, group: str, permutation: Permutation, without: set[str] | None = None
    ) -> Tensor:
        size = self.spec.groups[group].size
        total = torch.zeros(size, size, dtype=torch.float64)
        for name, dim in self._places(group):
            if name not in (without or ()):
                total += similarity(
                    self.a[name], self.b[name], self.spec.params[name], dim, group,
                    self.spec.groups, permutation,
                )  # fmt: skip
        return total

    def _in_order(self, name: str, permutation: Permutation) -> Tensor:
        return permuted(self.b[name], self.spec.params[name], self.spec.groups, permutation)

    def _places(self, group: str) -> list[tuple[str, int]]:
        return [(name, dim) for name, dim in self.spec.carriers(group) if name in self.a]

    def _carriers(self, group: str) -> set[str]:
        return {name for name, _ in self._places(group)}

    def _twice(self, group: str) -> set[str]:
        """The parameters on which a group stands on more than one dimension."""
        names = [name for name, _ in self._places(group)]
        return {name for name in names if names.count(name) > 1}
