"""Activation matching: units are matched by the correlation of what they compute.

Both models see the same inputs; for every group the signed correlation matrix of its units is
collected in one streamed pass (nothing is kept but moments), and linear assignments maximise the
sum of the matched correlations (Li et al. 2015, arXiv:1511.07543; Ainsworth, Hayase and Srinivasa,
arXiv:2209.04836, section 3.1). Signed, because a unit matched with its negative would be averaged
away. A group is solved together with the units inside it (:mod:`nlm.align.nested`); what is seen at
different modules is independent. Groups that no module shows (the heads of a projection that is a
bare parameter, experts in one stacked tensor) are matched by their weights then, with all others in
place; where that is every group of a traced network, the whole network is.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nlm._state_dict import StateDict
from nlm.align.result import AlignmentReport, AlignmentResult, histograms, means
from nlm.align.seen import Seen, by_correlation, correlate
from nlm.align.variants import restricted
from nlm.align.weights import weight_matching
from nlm.statistics import Data, Forward, Mask
from nlm.symmetry import PermutationSpec


def activation_matching(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Data,
    *,
    observe: Mapping[str, str | tuple[str, int]] | None = None,
    heads: str = "matched",
    residual: str = "all",
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    stride: int = 1,
    max_tokens: int | None = None,
    seed: int = 0,
    precision: str = "float32",
    device: torch.device | str | None = None,
    process_group: Any = None,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """The permutation of ``model_b``'s units whose activations correlate best with ``model_a``'s.

    Parameters
    ----------
    model_a, model_b : of one architecture; they come back as they were.
    spec : what may be permuted, see :func:`nlm.trace`.
    data : a re-iterable of batches; a few hundred samples suffice.
    observe : group -> name of the module whose output shows it; by default the last one that
        carries nothing else but its parents, after the activation function. Or (name, dimension)
        for a module of which the specification says nothing: the group stands there alone, or as
        the last factor behind its parents (heads x units).
    heads : "matched": by what their units are worth, which are matched inside each; "monotonic":
        the order of heads is kept; "identity": that of their units too. Experts alike.
    residual : where residual streams are seen, which many modules write and read: at "all" of
        their norms (the mean correlation), the "first" or the "last" of them; "identity": they
        stay in order, which is the published default. A permuted copy of a model comes back only
        where they are seen. Of transformers trained apart (docs/barriers.md) "all" left lower
        barriers than "identity" and than "last" in every comparison, and of pre-norm ones
        rotations left less still (:func:`orthogonal_matching`).
    forward, max_samples, device : how a batch is run, ``forward(model, batch)``, how many samples
        are used, and where.
    mask : ``mask(batch)`` says which positions count (:mod:`nlm.statistics.positions`); by default
        the attention mask of a batch by name, where it has one. ``lambda batch: None``: all count.
        Special tokens count; :func:`nlm.statistics.tokens_except` leaves them out.
    stride, max_tokens, seed : one position of every ``stride`` is taken, and at most ``max_tokens``
        of a batch at each module, drawn evenly: the same in both models.
    process_group : see :func:`nlm.align`.
    precision : of the products of activations, see :func:`nlm.ops.cross_moments_`.
    progress : called after each batch with its number and the seconds so far (where no module
        shows any group as in :func:`weight_matching`); what it raises cancels.

    Raises
    ------
    ValueError
        See :func:`nlm.align`; also an unknown variant, an unknown group in ``observe`` or one that
        is not seen there, an output of another size than the group, fewer than two positions, or a
        hand-written specification that names no module, without ``observe``.
    """
    started = time.perf_counter()
    inside = restricted(spec, heads, residual)
    seen = correlate(
        model_a, model_b, inside, data, observe=observe, residual=residual, forward=forward,
        mask=mask, max_samples=max_samples, stride=stride, max_tokens=max_tokens, seed=seed,
        precision=precision, device=device, process_group=process_group, progress=progress,
    )  # fmt: skip
    result = match_seen(model_a.state_dict(), model_b.state_dict(), inside, seen, progress)
    result.permutation = spec.compose(result.permutation, {})
    result.report.seconds = time.perf_counter() - started
    return result


def match_seen(
    a: StateDict,
    b: StateDict,
    spec: PermutationSpec,
    seen: Seen,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """What correlations say, and of groups that are not seen the weights.

    ``progress`` is that of :func:`nlm.align.weight_matching`, where nothing is seen.
    """
    started = time.perf_counter()
    descent = by_correlation(spec.groups, seen.comparisons)
    permutation, similarity = descent.permutation, descent.agreement()
    objective = descent.objective[-1:]
    unseen = [group for group in spec.free if group not in seen.samples]
    if unseen:
        rest = weight_matching(
            a, spec.apply(permutation, b), spec.restrict(unseen),
            progress=None if seen.comparisons else progress,
        )  # fmt: skip
        permutation = spec.compose(permutation, rest.permutation)
        similarity |= {group: rest.similarity[group] for group in unseen}
        objective = objective if seen.comparisons else rest.report.objective
    report = AlignmentReport(
        "activations",
        objective,
        means(similarity),
        time.perf_counter() - started,
        seen.samples,
        by_weights=unseen,
        histogram=histograms(similarity),
    )
    return AlignmentResult(permutation, report, similarity=similarity)
