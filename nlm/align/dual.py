"""Dual-space matching: by weights and by activations at the same time, in one objective.

    maximise over P    sum_W <W_A, P(W_B)>  +  dual / (1 - dual)  sum_g k_g sum_i C_g[i, P_g(i)],

C_g being the correlations of the units of a group that a module shows, k_g what brings them to the
scale of the weights (:mod:`nlm.align.scale`). Xu et al. ("Training-free pretrained model merging",
CVPR 2024, arXiv:2403.01753) mix the two spaces group by group; here the sum is one, and its second
part linear in each P_g: the moves of a descent (:mod:`nlm.align.descent`) stay exact, and it never
falls. It starts from the order as it is and from the one that activations lead to, and the better
end is kept. Groups that no module shows are matched by their weights, as they are anyway.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nlm.align.result import AlignmentResult
from nlm.align.seen import correlate
from nlm.align.variants import restricted
from nlm.align.weights import weight_matching
from nlm.statistics import Data
from nlm.symmetry import PermutationSpec


def dual_matching(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Data,
    *,
    dual: float = 0.5,
    search: Mapping[str, Any],
    heads: str = "matched",
    residual: str = "all",
    progress: Callable[[int, float], None] | None = None,
    **walk: Any,
) -> AlignmentResult:
    """The permutation of ``model_b``'s units that weights and activations agree on best.

    Parameters
    ----------
    data, heads, residual, walk : see :func:`nlm.align.activation_matching`.
    dual : the share of activations, at least 0 (weights alone, bit for bit) and less than 1.
    search : options of :func:`nlm.align.weight_matching`.
    progress : called after each batch with its number and the seconds so far, then after each
        sweep with its number and the objective; what it raises cancels.
    """
    check_share(dual)
    started = time.perf_counter()
    inside = restricted(spec, heads, residual)
    seen = correlate(model_a, model_b, inside, data, residual=residual, progress=progress, **walk)
    states = model_a.state_dict(), model_b.state_dict()
    result = weight_matching(*states, inside, seen=seen, dual=dual, progress=progress, **search)
    result.permutation = spec.compose(result.permutation, {})
    result.report.seconds = time.perf_counter() - started
    return result


def check_share(dual: float) -> None:
    """Raises ValueError where ``dual`` is no share of activations beside weights."""
    if not 0 <= dual < 1:
        raise ValueError(
            f"nlm.align: the share of activations beside weights is at least 0 and less than 1, "
            f"got {dual}"
        )
