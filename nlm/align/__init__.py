"""Finding the permutation that aligns one foundation model with another."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nlm._state_dict import state_of
from nlm.align.activations import activation_matching
from nlm.align.result import AlignmentReport, AlignmentResult
from nlm.align.weights import weight_matching
from nlm.statistics import Data, Forward, Mask
from nlm.symmetry import PermutationSpec, SymmetryError

__all__ = [
    "AlignmentReport",
    "AlignmentResult",
    "activation_matching",
    "align",
    "weight_matching",
]

_METHODS = ("weights", "activations")


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
    exclude: tuple[str, ...] = (),
    observe: Mapping[str, str] | None = None,
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
    spec : what may be permuted, verified (``nlm.trace`` verifies). An unverified one is proven here
        on ``model_a`` when ``example_inputs`` are given.
    method : "weights" (coordinate descent on <A, P B>, see :func:`weight_matching`) or
        "activations" (signed correlation of the units' outputs, see :func:`activation_matching`).
    data : for "activations": a re-iterable of batches; only inputs are used.
    seed, max_sweeps, tolerance, exclude, progress : for "weights".
    observe, forward, mask, max_samples, device : for "activations".

    Returns
    -------
    AlignmentResult
        ``.permutation`` (apply it to ``model_b`` and to its experts with ``spec.apply``) and
        ``.report``.

    Raises
    ------
    SymmetryError
        The specification is not verified, or does not hold.
    ValueError
        Different entries or shapes, NaN or inf, missing data.
    TypeError
        Integer or complex weights.

    References
    ----------
    Ainsworth, Hayase, Srinivasa: Git Re-Basin, arXiv:2209.04836, sections 3.1 and 3.2.
    """
    if method not in _METHODS:
        raise ValueError(f"nlm.align: the method is one of {', '.join(_METHODS)}, got {method!r}")
    if example_inputs is not None and isinstance(model_a, nn.Module):
        spec.verify(model_a, example_inputs)
    if spec.verified is None:
        raise SymmetryError(
            "nlm.align: a specification is proven before anything is matched with it (spec.verify, "
            "or example_inputs here), got one that is not verified"
        )
    if method == "weights":
        return weight_matching(
            state_of(model_a), state_of(model_b), spec, seed=seed, max_sweeps=max_sweeps,
            tolerance=tolerance, exclude=exclude, progress=progress,
        )  # fmt: skip
    if data is None or not (isinstance(model_a, nn.Module) and isinstance(model_b, nn.Module)):
        raise ValueError(
            f"nlm.align: activation matching needs two modules and data, got "
            f"{type(model_a).__name__}, {type(model_b).__name__} and data={data!r}"
        )
    return activation_matching(
        model_a, model_b, spec, data, observe=observe, forward=forward, mask=mask,
        max_samples=max_samples, device=device,
    )  # fmt: skip
