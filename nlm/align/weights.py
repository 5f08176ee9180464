"""Weight matching: the permutation that maximises the inner product of two models' weights.

    maximise over P    sum_W  <W_A, P(W_B)>,

which is the least distance ||A - P(B)||, by coordinate descent (Ainsworth, Hayase and Srinivasa,
Git Re-Basin, arXiv:2209.04836, algorithm 1): with all other groups held, the best permutation of
one group, with the units inside it, solves linear assignment problems on its similarities over the
parameters it stands on (:mod:`nlm.align.nested`, :mod:`nlm.align.descent`). The objective is summed
in float64; the similarities, which only propose a move, multiply in float32 (float64 for float64).

Memory: the two state dicts; once more as much at most for similarities that are kept from one visit
to the next; and the largest of them, for what is being solved (measured in docs/performance.md).

BatchNorm's running statistics are permuted with their channels but are no part of the cost: their
scale would dominate it. Heads are part of it where the models share their classes.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nlm._names import is_statistic, matches
from nlm._state_dict import StateDict, check_weight
from nlm.align.descent import ORDERS, Descent
from nlm.align.frank_wolfe import Entry, Polytope
from nlm.align.layerwise import layer_by_layer
from nlm.align.result import AlignmentReport, AlignmentResult, histograms, means
from nlm.align.scale import on_one_scale
from nlm.align.seen import Seen, by_correlation
from nlm.align.similarity import Comparison, Correlation
from nlm.symmetry import PermutationSpec
from nlm.symmetry.layout import references
from nlm.symmetry.permutation import Permutation
from nlm.symmetry.stacks import joined

_CLEAR = 0.5  # the mean cosine of a group's matched units from which on no other start is tried


def weight_matching(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    spec: PermutationSpec,
    *,
    seed: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-9,
    order: str = "random",
    restarts: int = 0,
    normalise: bool = False,
    exclude: str | tuple[str, ...] = (),
    frank_wolfe: bool = False,
    layerwise: bool | None = None,
    seen: Seen | None = None,
    dual: float = 0.5,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """The permutation of ``b``'s units that brings its weights closest to ``a``'s.

    Parameters
    ----------
    a, b : state dicts of the specification's entries and shapes, of any float dtype.
    spec : what may be permuted, see :func:`nlm.trace`.
    seed : of the order in which the groups are visited, and of the restarts.
    max_sweeps : at most so many visits to every group in a descent.
    tolerance : the relative gain of a sweep at which to stop.
    order : in which the groups are visited: "random", that of the specification ("forward"), its
        reverse ("backward"), or one and then the other ("alternating").
    restarts : further descents, each from a random permutation; the best one is kept.
    normalise : whether each entry's contribution is divided by the product of its norms in the two
        models, so that the objective is a sum of cosines.
    exclude : patterns of entries to leave out of the cost. Heads whose classes differ in number
        are left out by themselves; where the specification does not say which axes are outputs (a
        hand-written one), so is every entry whose sizes differ on an axis without groups.
    frank_wolfe : whether a descent starts from where steps of all groups together lead, projected,
        if that is higher (:mod:`nlm.align.frank_wolfe`).
    layerwise : whether one more descent starts from where one layer after the other settles
        (:mod:`nlm.align.layerwise`); the best one is kept. None, the default: of weights alone and
        without ``frank_wolfe``, where the weights of some group's matched units have a mean cosine
        below .5 after the others. Models that match better than that (a permuted copy with as much
        noise as it has weights) are found by the first descent; all others take two to three
        times its time.
    seen : what modules show of the two models, to be matched beside the weights, with the share
        ``dual``: at least 0, weights alone, and less than 1 (:mod:`nlm.align.dual`).
        One more descent starts from what they say alone.
    progress : called after each step and each sweep with its number and the objective (of a step
        the relaxed one); what it raises cancels.

    Raises
    ------
    ValueError, TypeError
        See :func:`nlm.align`.
    """
    if order not in ORDERS:
        raise ValueError(f"nlm.align: the order is one of {', '.join(ORDERS)}, got {order!r}")
    if layerwise not in (None, False, True):
        raise ValueError(f"nlm.align: layerwise is True, False or None, got {layerwise!r}")
    if restarts < 0:
        raise ValueError(f"nlm.align: the number of restarts is at least 0, got {restarts}")
    started = time.perf_counter()
    entries, excluded = compared({"model_a": a, "model_b": b}, spec, exclude)
    comparisons = [
        Comparison(in_a, in_b, spec.params[name], normalise)
        for name, (in_a, in_b) in entries.items()
    ]
    shown: Sequence[Correlation] = ()
    if seen is not None and dual > 0:
        shown = on_one_scale(comparisons, seen, spec.groups, dual)
    best: Descent | None = None
    descents: list[float] = []
    relaxed: list[float] = []

    def descend(start: Permutation | None) -> Descent:
        """The better of the best descent so far and that from a start."""
        nonlocal relaxed
        descent = Descent(spec.groups, [*comparisons, *shown], start)
        steps: list[float] = []
        if frank_wolfe:
            descent, steps = _projected(descent, progress)
        descent.run(seed + len(descents), max_sweeps, tolerance, order, progress)
        descents.append(descent.objective[-1])
        if best is not None and best.objective[-1] >= descents[-1]:
            return best
        relaxed = steps
        return descent

    for start in (None, *(spec.random(seed + number) for number in range(1, restarts + 1))):
        best = descend(start)
    assert best is not None
    similarity = best.agreement(comparisons)
    if layerwise is None and not frank_wolfe and not shown:
        layerwise = min(means(similarity).values(), default=1.0) < _CLEAR
    if layerwise:
        names = list(entries)
        best = descend(layer_by_layer(spec.groups, comparisons, names, seed, max_sweeps, order))
    if seen is not None and shown:
        best = descend(by_correlation(spec.groups, seen.comparisons).permutation)
    if len(descents) > restarts + 1:
        similarity = best.agreement(comparisons)
    samples = {} if seen is None else seen.samples
    if samples:
        by_activations = best.agreement(shown)
        for group in samples:
            similarity[group] = similarity[group].lerp(by_activations[group], dual)
    report = AlignmentReport(
        "dual" if seen is not None else "frank-wolfe" if frank_wolfe else "weights",
        best.objective,
        means(similarity),
        time.perf_counter() - started,
        samples,
        excluded=excluded,
        by_weights=[group for group in spec.free if seen is not None and group not in samples],
        histogram=histograms(similarity),
        descents=descents,
        relaxed=relaxed,
    )
    return AlignmentResult(best.permutation, report, similarity=similarity)


def _projected(
    descent: Descent, progress: Callable[[int, float], None] | None
) -> tuple[Descent, list[float]]:
    """A descent from where Frank-Wolfe steps end, if that is higher than its start."""
    polytope = Polytope(
        descent.groups,
        [
            Entry(other.layouts, [other.a, other.b], other.weight)
            for other in descent.comparisons
            if other.a is not None
        ],
        [None, descent.permutation],
    )
    [_, found], relaxed = polytope.solve(progress=progress)
    other = Descent(descent.groups, descent.comparisons, found)
    if other.objective[0] <= descent.objective[0]:
        return descent, relaxed
    other.objective.insert(0, descent.objective[0])
    return other, relaxed


def compared(
    models: Mapping[str, StateDict], spec: PermutationSpec, exclude: str | tuple[str, ...]
) -> tuple[dict[str, list[Tensor]], list[str]]:
    """The entries that make up the cost, each in all models and one type; those left out by name.

    Parameters
    ----------
    models : who -> state dict.
    """
    for state in models.values():
        spec.check_state_dict(state)
    states = {who: joined(spec.stacks, state) for who, state in models.items()}
    found, excluded = {}, []
    for name, layouts in spec.params.items():
        for who, state in states.items():
            check_weight("nlm.align", who, name, state[name])
        if is_statistic(name) or not any(ref for part in layouts for ref in references(part)):
            continue
        first, *others = (state[name].detach().cpu() for state in states.values())
        if matches(name, exclude) or any(
            _is_other_head(first, other, name, spec) for other in others
        ):
            excluded.append(name)
            continue
        kind = functools.reduce(torch.promote_types, (each.dtype for each in (first, *others)))
        found[name] = [each.to(kind) for each in (first, *others)]
    return found, excluded


def _is_other_head(a: Tensor, b: Tensor, name: str, spec: PermutationSpec) -> bool:
    """Whether an entry is of two sizes because the models have other classes."""
    if a.shape == b.shape:
        return False
    for dim, (size_a, size_b) in enumerate(zip(a.shape, b.shape, strict=True)):
        pinned = spec.pinned.get(f"{name}:{dim}")
        if size_a != size_b and spec.outputs and pinned != "output":
            raise ValueError(
                f"nlm.align: the models have the same shapes, got {list(a.shape)} and "
                f"{list(b.shape)} for {name!r}"
            )
    return True
