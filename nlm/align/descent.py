"""Coordinate descent over block moves, on whatever two models are compared by.

The objective is the sum of what the models' positions have in common under a permutation: products
of weights, or correlations of activations. One move after another is solved with all other groups
held; it is kept if the objective, evaluated anew, really rises. Where a group stands on two axes of
one parameter the move is quadratic, and solving it can lower the objective: then Frank-Wolfe steps
are tried (:mod:`nlm.align.relaxation`). A move whose neighbours have not moved since its last visit
is not solved again, and an assignment starts from the last one of its group: of trained MLPs, where
it is most of the work, a descent takes 1.1 s instead of 1.5; of noisy copies of a ViT or a BERT it
is one twentieth of the work at most. A sweep that gains less than ``tolerance`` times the objective
is the last.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from nlm.align.nested import Move
from nlm.align.similarity import Comparison, chain_of
from nlm.symmetry.blocks import Block
from nlm.symmetry.gather import Gathers
from nlm.symmetry.permutation import Groups, Permutation, identity, index_shape, is_free

ORDERS = ("random", "forward", "backward", "alternating")

_ROUNDING = 1e-9  # of the objective's terms, summed in float64


def check_rise(objective: Sequence[float], scale: float) -> None:
    """Raises RuntimeError where an objective whose terms have this size fell in its last step.

    Only what raises it is ever accepted: a fall, beyond rounding, is a fault of this package.
    """
    before, after = objective[-2:]
    if not after >= before - _ROUNDING * scale:
        raise RuntimeError(
            f"nlm.align: the objective never falls, got {before!r} and then {after!r} (please "
            f"report this)"
        )


class Descent:
    """Two models under comparison, and the permutation found so far.

    The moves keep their similarities from visit to visit, the smallest first, as long as all of
    them together are no larger than the two models.

    Attributes
    ----------
    permutation : of all groups, the identity unless a start is given.
    objective : the objective at the start and after each sweep.
    """

    def __init__(
        self,
        groups: Groups,
        comparisons: Sequence[Comparison],
        start: Permutation | None = None,
    ) -> None:
        for block in (block for other in comparisons for block in other.blocks):
            if moving := [name for name in block.at if is_free(groups, name)]:
                raise ValueError(
                    f"nlm.align: the group that selects among the parts of a family is fixed, got "
                    f"{moving[0]!r}"
                )
        self.groups = groups
        self.comparisons = comparisons
        self.permutation = start or {name: identity(groups, name) for name in groups}
        order = Gathers(groups, self.permutation)
        self._values = {other: other.value(order) for other in comparisons}
        self.objective = [math.fsum(self._values.values())]
        self._moves = _moves(groups, comparisons)
        left = sum(other.nbytes for other in comparisons)
        for move in sorted(self._moves, key=lambda move: move.nbytes):
            left -= move.nbytes
            move.keeps = left >= 0

    def run(
        self,
        seed: int = 0,
        max_sweeps: int = 100,
        tolerance: float = 1e-9,
        order: str = "random",
        progress: Callable[[int, float], None] | None = None,
        but: Collection[str] = (),
    ) -> None:
        """Sweeps over the moves, in one of ``ORDERS``, until nothing is gained.

        Those of groups in ``but`` are left out.

        Raises
        ------
        RuntimeError
            The objective fell, see :func:`check_rise`.
        """
        generator = torch.Generator().manual_seed(seed)
        moves = [move for move in self._moves if not any(name in but for name in move.members)]
        stale = set(moves)
        for sweep in range(max_sweeps):
            visits = list(moves)
            if order == "random":
                numbers = torch.randperm(len(visits), generator=generator).tolist()
                visits = [moves[number] for number in numbers]
            elif order == "backward" or (order == "alternating" and sweep % 2):
                visits.reverse()
            for move in visits:
                if move not in stale:
                    continue
                stale.discard(move)
                if self._improve(move):
                    stale |= self._neighbours(move)
            self.objective.append(math.fsum(self._values.values()))
            check_rise(self.objective, sum(other.scale for other in self.comparisons))
            if progress is not None:
                progress(sweep + 1, self.objective[-1])
            if self.objective[-1] - self.objective[-2] <= tolerance * abs(self.objective[-1]):
                break
        for move in self._moves:
            move.forget()

    def _improve(self, move: Move) -> bool:
        """Makes a move, if the objective rises."""
        found = move.solve(self.permutation)
        if all(torch.equal(found[name], self.permutation[name]) for name in move.members):
            return False
        if self._accept(move, found):
            return True
        return move.is_relaxable and self._accept(move, move.relax(self.permutation))

    def _accept(self, move: Move, found: Permutation) -> bool:
        """Goes on to a permutation, if the objective rises."""
        before, after = (Gathers(self.groups, each) for each in (self.permutation, found))
        gains = {
            other: other.gain(before, after, self._values[other]) for other in move.comparisons
        }
        if not self._gained(gains):
            return False
        self.permutation = found
        for other, gain in gains.items():
            self._values[other] += gain
        return True

    def _gained(self, gains: Mapping[Comparison, float]) -> bool:
        """Whether gains are more than rounding."""
        return math.fsum(gains.values()) > 1e-12 * sum(other.scale for other in gains)

    def _neighbours(self, move: Move) -> set[Move]:
        """The moves whose solution depends on one; itself where it is quadratic."""
        found = {other for other in self._moves if not move.blocks.isdisjoint(other.blocks)}
        return found if move.quadratic else found - {move}

    def agreement(self, comparisons: Sequence[Comparison] | None = None) -> dict[str, Tensor]:
        """Free group -> similarity of each of its matched units; 0 where one has no weights.

        Of weights the cosine; of activations, which are correlations already, the mean.
        ``comparisons``: those that count, of one sort.
        """
        sums = {
            name: torch.zeros(3, *index_shape(self.groups, name), dtype=torch.float64)
            for name in self.groups
            if is_free(self.groups, name)
        }
        order = Gathers(self.groups, self.permutation)
        for comparison in self.comparisons if comparisons is None else comparisons:
            for block, start, parts in comparison.parts(order):
                for number, axis in enumerate(block.axes):
                    if axis.group not in sums:
                        continue
                    chain = chain_of(block, number, (), self.groups[axis.group].parents)
                    out = [*(place for place in chain.held if place >= 0), number]
                    for total, part in zip(sums[axis.group], parts, strict=True):
                        target = total[chain.key]
                        if 0 in out:
                            target = target.narrow(out.index(0), start, len(part))
                        summed = [dim for dim in range(part.dim()) if dim not in out]
                        part = part.sum(summed, dtype=torch.float64) if summed else part
                        target += part.permute(*(sorted(out).index(dim) for dim in out))
        found = {}
        for name, (both, norm_a, norm_b) in sums.items():
            norm = (norm_a * norm_b).sqrt()
            live = norm > 0
            found[name] = torch.where(live, both / torch.where(live, norm, 1.0), 0.0)
        return found


def _moves(groups: Groups, comparisons: Sequence[Comparison]) -> list[Move]:
    """A move for each group that is inside no other; where it may be refused, also for the others.

    A group around others that are in no chain stays as it is.
    """
    standing: dict[str, list[tuple[Comparison, Block]]] = {}
    for comparison in comparisons:
        for block in comparison.blocks:
            for name in dict.fromkeys(axis.group for axis in block.axes if axis.group is not None):
                standing.setdefault(name, []).append((comparison, block))
    moves: dict[str, Move] = {}
    hard: set[str] = set()
    free = {name: group for name, group in groups.items() if not group.fixed}
    for name, group in free.items():
        if not any(parent in free for parent in group.parents):
            moves[name] = Move(name, groups, standing)
            if moves[name].quadratic or not moves[name].is_chained:
                hard |= set(moves[name].members)
    for name in hard - set(moves):
        moves[name] = Move(name, groups, standing)
    return [moves[name] for name in groups if name in moves and moves[name].is_chained]
