"""Activation matching: units are matched by the correlation of what they compute.

Both models see the same inputs; for every group the signed correlation matrix of its units is
collected in one streamed pass (nothing is kept but moments), and one linear assignment per group
maximises the sum of the matched correlations (Li et al. 2015, arXiv:1511.07543; Ainsworth, Hayase
and Srinivasa, arXiv:2209.04836, section 3.1). Signed, because a unit matched with its negative
would be averaged away. Groups are independent of one another: there are no sweeps.
"""

import time
from collections.abc import Mapping

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
    observe: Mapping[str, str] | None = None,
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
) -> AlignmentResult:
    """The permutation of ``model_b``'s units whose activations correlate best with ``model_a``'s.

    Parameters
    ----------
    data : a re-iterable of batches; a few hundred samples suffice.
    observe : group -> name of the module whose output shows it; by default the last one that
        carries it, after the activation function.
    forward, mask, max_samples, device : how a batch is run, which positions count, how many samples
        are used, and where.

    Raises
    ------
    ValueError
        See :func:`nlm.align`; also a group that no module's output shows alone, or fewer than two
        positions.
    """
    started = time.perf_counter()
    for who, model in (("model_a", model_a), ("model_b", model_b)):
        state = model.state_dict()
        spec.check_state_dict(state)
        for name, tensor in state.items():
            check_weight("nlm.align", who, name, tensor)
    sites = {**spec.observation_sites(), **(observe or {})}
    points = {sites[group]: _channel_dim(spec, group, sites) for group in spec.groups}
    moments = collect_cross_moments(
        model_a, model_b, points, data, forward=forward, mask=mask, max_samples=max_samples,
        device=device, caller="nlm.align",
    )  # fmt: skip
    permutation, correlation, samples = {}, {}, {}
    for group in spec.groups:
        count = int(moments[sites[group]].count)
        if count < 2:
            raise ValueError(
                f"nlm.align: a correlation needs at least two positions, got {count} for group "
                f"{group!r}"
            )
        similarity = moments[sites[group]].correlation().cpu()
        permutation[group] = best_assignment(similarity)
        correlation[group] = float(matched(similarity, permutation[group]).mean())
        samples[group] = count
    total = sum(correlation[group] * spec.groups[group].size for group in spec.groups)
    report = AlignmentReport(
        "activations", [total], correlation, time.perf_counter() - started, samples
    )
    return AlignmentResult(permutation, report)


def _channel_dim(spec: PermutationSpec, group: str, sites: Mapping[str, str]) -> int:
    """The dimension of the chosen module's output on which a group stands, alone."""
    module = sites.get(group)
    site = spec.sites.get(module) if module is not None else None
    if site is None or site.layout != Ref(group, spec.groups[group].size):
        raise ValueError(
            f"nlm.align: a group is observed where it stands alone on a dimension of a module's "
            f"output, got {'no module' if site is None else repr(str(site.layout))} for {group!r} "
            f"at {module!r}"
        )
    return site.dim
