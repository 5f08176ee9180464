"""Finding the permutation that aligns one foundation model with another."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nlm._state_dict import state_of
from nlm.align.activations import activation_matching
from nlm.align.orthogonal import OrthogonalAlignment, orthogonal_matching
from nlm.align.result import AlignmentReport, AlignmentResult
from nlm.align.weights import weight_matching
from nlm.gauge import find
from nlm.statistics import Data, Forward, Mask, batches, run
from nlm.symmetry import PermutationSpec, SymmetryError

__all__ = [
    "AlignmentReport",
    "AlignmentResult",
    "OrthogonalAlignment",
    "activation_matching",
    "align",
    "orthogonal_matching",
    "weight_matching",
]

_METHODS = ("weights", "activations", "orthogonal")
_PROOF_SAMPLES = 32


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
    normalise: bool = False,
    exclude: str | tuple[str, ...] = (),
    observe: Mapping[str, str | tuple[str, int]] | None = None,
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """Finds the permutation of ``model_b``'s units that aligns it with ``model_a``.

    Parameters
    ----------
    model_a, model_b : two models of one architecture; for ``method="weights"`` their state dicts
        will do.
    spec : what may be permuted, proven (``nlm.trace`` proves). It is proven here on ``model_a``
        when ``example_inputs`` or ``data`` are given, also where it was on another model.
    method : "weights" (coordinate descent on <A, P B>, see :func:`weight_matching`) or
        "activations" (signed correlation of the units' outputs, see :func:`activation_matching`;
        groups that no module shows are matched by weights, ``report.by_weights`` names them) or
        "orthogonal", for pre-norm transformers (see :func:`orthogonal_matching`).
    data : for "activations" and "orthogonal": a re-iterable of batches; only inputs are used.
    example_inputs : an input of ``model_a``, which is a module then, or a tuple of its inputs.
    seed, max_sweeps, tolerance, order, restarts, normalise, exclude : for "weights".
    observe, forward, mask, max_samples, device : for "activations"; all but the first also for
        "orthogonal", which needs ``example_inputs`` beside ``forward``.
    progress : called with a number and a value: of each sweep and its objective ("weights"), or of
        each batch and the seconds so far ("activations"). What it raises cancels.

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
    if method != "weights" and not shown:
        raise ValueError(
            f"nlm.align: the method {method!r} needs two modules and data, got "
            f"{type(model_a).__name__}, {type(model_b).__name__} and data={data!r}"
        )
    _prove(spec, model_a, example_inputs, data, forward, device)
    if method == "weights":
        return weight_matching(
            state_of(model_a), state_of(model_b), spec, seed=seed, max_sweeps=max_sweeps,
            tolerance=tolerance, order=order, restarts=restarts, normalise=normalise,
            exclude=exclude, progress=progress,
        )  # fmt: skip
    assert data is not None and isinstance(model_a, nn.Module) and isinstance(model_b, nn.Module)
    if method == "activations":
        return activation_matching(
            model_a, model_b, spec, data, observe=observe, forward=forward, mask=mask,
            max_samples=max_samples, device=device, progress=progress,
        )  # fmt: skip
    gauge = find(model_a, _example(example_inputs, data, forward, device), spec)
    return orthogonal_matching(
        model_a, model_b, gauge, data, forward=forward, mask=mask, max_samples=max_samples,
        device=device, progress=progress,
    )  # fmt: skip


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
    batch = next(batches(data, _PROOF_SAMPLES, device, "nlm.align"))
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _prove(
    spec: PermutationSpec,
    model: nn.Module | Mapping[str, Tensor],
    example_inputs: Any,
    data: Data | None,
    forward: Forward | None,
    device: torch.device | str | None,
) -> None:
    """Proves a specification on the model, where there is an input, or sees that it was proven."""
    if example_inputs is not None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"nlm.align: example inputs prove a specification on a module, got "
                f"{type(model).__name__} for model_a"
            )
        spec.verify(model, example_inputs)
    elif data is not None and isinstance(model, nn.Module):
        batch = next(batches(data, _PROOF_SAMPLES, device, "nlm.align"))
        spec.verify(model, batch, forward=lambda model, batch: run(model, batch, forward))
    if not spec.proven:
        state = "not verified" if spec.verified is None else "changed since it was verified"
        raise SymmetryError(
            f"nlm.align: a specification is proven before anything is matched with it "
            f"(spec.verify, or example_inputs here), got one that is {state}"
        )
