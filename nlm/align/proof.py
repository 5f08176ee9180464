"""That a specification is proven before anything is matched with it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nlm.statistics import Data, Forward, batches, first, run
from nlm.symmetry import PermutationSpec, SymmetryError
from nlm.symmetry.verify import confirm

SAMPLES = 32  # of a proof
_FEW_SAMPLES = 2  # that confirm one


def prove(
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
        if not _holds(spec, model, example_inputs, None):
            spec.verify(model, example_inputs)
    elif data is not None and isinstance(model, nn.Module):
        batch = next(batches(data, device=device, caller="nlm.align"))

        def call(model: nn.Module, batch: Any) -> Any:
            return run(model, batch, forward)

        if not _holds(spec, model, first(batch, _FEW_SAMPLES), call):
            spec.verify(model, first(batch, SAMPLES), forward=call)
    if not spec.proven:
        state = "not verified" if spec.verified is None else "changed since it was verified"
        raise SymmetryError(
            f"nlm.align: a specification is proven before anything is matched with it "
            f"(spec.verify, or example_inputs here), got one that is {state}"
        )


def _holds(
    spec: PermutationSpec, model: nn.Module, example_inputs: Any, call: Forward | None
) -> bool:
    """Whether a specification is proven, and confirmed on the model; why not, the proof says."""
    try:
        if spec.proven:
            confirm(spec, model, example_inputs, call)
    except SymmetryError:
        return False
    return spec.proven
