"""Activation matching: units are matched by the correlation of what they compute.

Both models see the same inputs; for every group the signed correlation matrix of its units is
collected in one streamed pass (nothing is kept but moments), and one linear assignment per group
maximises the sum of the matched correlations (Li et al. 2015, arXiv:1511.07543; Ainsworth, Hayase
and Srinivasa, arXiv:2209.04836, section 3.1). Signed, because a unit matched with its negative
would be averaged away. Groups are independent of one another: there are no sweeps.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from nlm._state_dict import check_weight
from nlm.align.assignment import best_assignment, matched
from nlm.align.result import AlignmentReport, AlignmentResult
from nlm.statistics import Data, Forward, Mask, collect_cross_moments
from nlm.symmetry import PermutationSpec, Ref


def activation_matching(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Data,
    *,
    observe: Mapping[str, str | tuple[str, int]] | None = None,
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """The permutation of ``model_b``'s units whose activations correlate best with ``model_a``'s.

    Parameters
    ----------
    data : a re-iterable of batches; a few hundred samples suffice.
    observe : group -> name of the module whose output shows it; by default the last one that
        carries it, after the activation function. Or (name, dimension) for a module of which the
        specification says nothing.
    forward, mask, max_samples, device : how a batch is run, ``forward(model, batch)``, which
        positions count, how many samples are used, and where.
    progress : called after each batch with its number and the seconds so far; what it raises
        cancels.

    Raises
    ------
    ValueError
        See :func:`nlm.align`; also an unknown group in ``observe``, a group that no module's output
        shows alone, an output of another size than the group, or fewer than two positions.
    NotImplementedError
        A group with parents (heads and the like).
    """
    started = time.perf_counter()
    for who, model in (("model_a", model_a), ("model_b", model_b)):
        state = model.state_dict()
        spec.check_state_dict(state)
        for name, tensor in state.items():
            check_weight("nlm.align", who, name, tensor)
    sites = _sites(spec, observe or {})
    points: dict[str, int] = {}
    for group, (module, dim) in sites.items():
        if points.setdefault(module, dim) != dim:
            raise ValueError(
                f"nlm.align: a module is observed on one dimension, got {points[module]} and {dim} "
                f"of {module!r} (for {group!r})"
            )

    def report_batch(number: int) -> None:
        if progress is not None:
            progress(number, time.perf_counter() - started)

    moments = collect_cross_moments(
        model_a, model_b, points, data, forward=forward, mask=mask, max_samples=max_samples,
        device=device, progress=report_batch, caller="nlm.align",
    )  # fmt: skip
    permutation, correlation, samples = {}, {}, {}
    for group in spec.free:
        seen = moments[sites[group][0]]
        count = int(seen.count)
        if count < 2:
            raise ValueError(
                f"nlm.align: a correlation needs at least two positions, got {count} for group "
                f"{group!r}"
            )
        similarity = seen.correlation().cpu()
        if similarity.shape != (size := spec.groups[group].size, size):
            raise ValueError(
                f"nlm.align: a group is observed on a dimension of its size, got "
                f"{list(similarity.shape)} for {group!r} of {size} units at {sites[group][0]!r}"
            )
        permutation[group] = best_assignment(similarity)
        correlation[group] = float(matched(similarity, permutation[group]).mean())
        samples[group] = count
    total = sum(correlation[group] * spec.groups[group].size for group in spec.free)
    report = AlignmentReport(
        "activations", [total], correlation, time.perf_counter() - started, samples
    )
    return AlignmentResult(permutation, report)


def _sites(
    spec: PermutationSpec, observe: Mapping[str, str | tuple[str, int]]
) -> dict[str, tuple[str, int]]:
    """For each group the module and the dimension of its output on which the group stands, alone.

    What is written as (module, dimension) is taken as it is.
    """
    if unknown := [group for group in observe if group not in spec.groups]:
        raise ValueError(
            f"nlm.align: what is observed are groups of the specification "
            f"({', '.join(spec.groups)}), got {', '.join(map(repr, unknown))}"
        )
    chosen: Mapping[str, str | tuple[str, int]] = {**spec.observation_sites(), **observe}
    sites: dict[str, tuple[str, int]] = {}
    for group, of in spec.free.items():
        if of.parents:
            raise NotImplementedError(
                f"nlm.align: activation matching moves groups without parents, got {group!r} "
                f"inside {', '.join(of.parents)}"
            )
        place = chosen.get(group)
        if isinstance(place, tuple):
            sites[group] = place
            continue
        site = None if place is None else spec.sites.get(place)
        if place is None or site is None or site.layout != Ref(group, of.size):
            raise ValueError(
                f"nlm.align: a group is observed where it stands alone on a dimension of a "
                f"module's output (or at observe={{group: (module, dimension)}}), got "
                f"{'no module' if site is None else repr(str(site.layout))} for {group!r} at "
                f"{place!r}"
            )
        sites[group] = place, site.dim
    return sites
