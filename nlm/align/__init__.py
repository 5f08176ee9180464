"""Finding the permutation that aligns one foundation model with another."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nlm._state_dict import state_of
from nlm.align.activations import activation_matching
from nlm.align.dual import dual_matching
from nlm.align.learned import sinkhorn_matching, straight_through_matching
from nlm.align.many import JointAlignment, JointReport, align_many
from nlm.align.orthogonal import OrthogonalAlignment, orthogonal_matching
from nlm.align.partial import partial_matching
from nlm.align.proof import SAMPLES, prove
from nlm.align.result import AlignmentReport, AlignmentResult
from nlm.align.variants import without_heads
from nlm.align.weights import weight_matching
from nlm.align.zipping import zip_matching
from nlm.gauge import find
from nlm.statistics import Data, Forward, Mask, batches
from nlm.symmetry import PermutationSpec

__all__ = [
    "AlignmentReport",
    "AlignmentResult",
    "JointAlignment",
    "JointReport",
    "OrthogonalAlignment",
    "activation_matching",
    "align",
    "align_many",
    "orthogonal_matching",
    "partial_matching",
    "sinkhorn_matching",
    "straight_through_matching",
    "weight_matching",
    "without_heads",
    "zip_matching",
]

_BY_WEIGHTS = ("weights", "frank-wolfe")
_METHODS = (*_BY_WEIGHTS, "activations", "dual", "orthogonal")


def align(
    model_a: nn.Module | Mapping[str, Tensor],
    model_b: nn.Module | Mapping[str, Tensor],
    spec: PermutationSpec,
    method: str = "weights",
    *,
    data: Data | None = None,
    example_inputs: Any = None,
    seed: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-9,
    order: str = "random",
    restarts: int = 0,
    layerwise: bool | None = None,
    normalise: bool = False,
    exclude: str | tuple[str, ...] = (),
    dual: float = 0.5,
    observe: Mapping[str, str | tuple[str, int]] | None = None,
    heads: str = "matched",
    residual: str = "all",
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    stride: int = 1,
    max_tokens: int | None = None,
    precision: str = "float32",
    device: torch.device | str | None = None,
    process_group: Any = None,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """Finds the permutation of ``model_b``'s units that aligns it with ``model_a``.

    Parameters
    ----------
    model_a, model_b : two models of one architecture; for "weights" and "frank-wolfe" their state
        dicts will do.
    spec : what may be permuted, proven (``nlm.trace`` proves). Where ``example_inputs`` or ``data``
        are given it is proven here, on ``model_a``; one that is proven already is only confirmed
        on it (:func:`nlm.symmetry.verify.confirm`: all groups at once, on two samples of the
        data), and proven again where that fails.
    method : "weights" (coordinate descent on <A, P B>, see :func:`weight_matching`),
        "frank-wolfe" (the same from where steps of all groups together lead, see
        :mod:`nlm.align.frank_wolfe`), "activations" (signed correlation of the units' outputs, see
        :func:`activation_matching`; groups that no module shows are matched by weights,
        ``report.by_weights`` names them), "dual" (weights and activations in one objective, see
        :mod:`nlm.align.dual`) or "orthogonal", for pre-norm transformers (see
        :func:`orthogonal_matching`).
    data : for all that sees activations: a re-iterable of batches; only inputs are used.
    example_inputs : an input of ``model_a``, which is a module then, or a tuple of its inputs.
    seed : of the order of visits (by weights), of the positions that are drawn (else).
    max_sweeps, tolerance, order, restarts, layerwise, normalise, exclude : for "weights",
        "frank-wolfe" and "dual", see :func:`weight_matching`.
    dual : the share of activations beside weights, at least 0 (weights alone) and less than 1.
    observe, heads, residual : for "activations" and "dual", see :func:`activation_matching`.
    forward, mask, max_samples, stride, max_tokens, precision, device : see there too; also for
        "orthogonal", which needs ``example_inputs`` beside ``forward``.
    process_group : of torch.distributed, for all that sees activations: each of its processes has
        data of its own, and all find the same; see :func:`nlm.statistics.collect_moments`.
    progress : called with a number and a value: of each sweep and its objective (by weights; of
        the Frank-Wolfe steps too), or of each batch and the seconds so far (by activations); of
        these and then of those ("dual"). What it raises cancels.

    Returns
    -------
    AlignmentResult
        ``.permutation`` (apply it to ``model_b`` and to its experts with ``spec.apply``) and
        ``.report``; for "orthogonal" an :class:`OrthogonalAlignment`, which has more to apply.

    Raises
    ------
    SymmetryError
        The specification is not proven, was changed since, or does not hold.
    ValueError
        Different entries or shapes, NaN or inf, missing data, example inputs for a state dict.
    TypeError
        Integer or complex weights.

    References
    ----------
    Ainsworth, Hayase, Srinivasa: Git Re-Basin, arXiv:2209.04836, sections 3.1 and 3.2.
    """
    if method not in _METHODS:
        raise ValueError(f"nlm.align: the method is one of {', '.join(_METHODS)}, got {method!r}")
    shown = data is not None and all(isinstance(each, nn.Module) for each in (model_a, model_b))
    if method not in _BY_WEIGHTS and not shown:
        raise ValueError(
            f"nlm.align: the method {method!r} needs two modules and data, got "
            f"{type(model_a).__name__}, {type(model_b).__name__} and data={data!r}"
        )
    prove(spec, model_a, example_inputs, data, forward, device)
    search: dict[str, Any] = {
        "seed": seed, "max_sweeps": max_sweeps, "tolerance": tolerance, "order": order,
        "restarts": restarts, "layerwise": layerwise, "normalise": normalise, "exclude": exclude,
    }  # fmt: skip
    if method in _BY_WEIGHTS:
        return weight_matching(
            state_of(model_a), state_of(model_b), spec, **search,
            frank_wolfe=method == "frank-wolfe", progress=progress,
        )  # fmt: skip
    assert data is not None and isinstance(model_a, nn.Module) and isinstance(model_b, nn.Module)
    walk: dict[str, Any] = {
        "forward": forward, "mask": mask, "max_samples": max_samples, "stride": stride,
        "max_tokens": max_tokens, "seed": seed, "precision": precision, "device": device,
        "process_group": process_group, "progress": progress,
    }  # fmt: skip
    seen: dict[str, Any] = {"observe": observe, "heads": heads, "residual": residual}
    if method == "activations":
        return activation_matching(model_a, model_b, spec, data, **seen, **walk)
    if method == "dual":
        return dual_matching(model_a, model_b, spec, data, dual=dual, search=search, **seen, **walk)
    gauge = find(model_a, _example(example_inputs, data, forward, device), spec)
    return orthogonal_matching(model_a, model_b, gauge, data, **walk)


def _example(
    example_inputs: Any, data: Data, forward: Forward | None, device: torch.device | str | None
) -> Any:
    """What a model is traced with: the example inputs, or what it gets of the first batch."""
    if example_inputs is not None:
        return example_inputs
    if forward is not None:
        raise ValueError(
            "nlm.align: the continuous symmetries of a model that forward runs are found with "
            "example_inputs, got none"
        )
    batch = next(batches(data, SAMPLES, device, "nlm.align"))
    return batch[0] if isinstance(batch, (tuple, list)) else batch
