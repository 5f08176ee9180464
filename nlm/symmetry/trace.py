"""``nlm.trace``: from a model and an example input to a verified specification."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nlm.symmetry.discover import discover
from nlm.symmetry.graph import call_arguments
from nlm.symmetry.proof import SymmetryError, VacuousError
from nlm.symmetry.spec import PermutationSpec

_log = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    outputs: str | Sequence[str] | None = None,
) -> PermutationSpec:
    """Finds the permutation symmetries of a model and proves them on it.

    The model is exported with the example inputs, and its graph is run on axes instead of numbers
    (:mod:`nlm.symmetry.discover`). Works for any model that ``torch.export`` can export. What is
    not understood stays as it is: a specification may miss a symmetry, it never claims a wrong one.

    Parameters
    ----------
    model : the network; it is not changed. On the meta device it is traced without being proven.
    example_inputs : a tensor, a tuple of the model's arguments, or a dict of its keyword arguments.
        Two or more samples of real data prove more than one of noise.
    kwargs : further keyword arguments.
    outputs : name or names of the outputs that must not change, as keys of the model's output or
        positions ("logits", "0"); what only others depend on stays as it is. By default the logits
        and what else it takes for every parameter to count, or all outputs where there are none.

    Returns
    -------
    PermutationSpec
        Verified: random permutations of its groups leave the outputs as they are.

    Raises
    ------
    ValueError
        The model cannot be exported, or has no such outputs; the message holds the reason.
    SymmetryError
        The proof failed, and not for single groups. A group that fails alone, or whose units have
        no effect on this model, stays as it is: ``spec.pinned`` says so.

    References
    ----------
    Ainsworth, Hayase, Srinivasa: Git Re-Basin, arXiv:2209.04836, section 2.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"nlm.trace: a model is a torch.nn.Module that is not scripted, got "
            f"{type(model).__name__}"
        )
    args, arguments = call_arguments(model, example_inputs, kwargs)
    outputs = (outputs,) if isinstance(outputs, str) else outputs
    spec = discover(model, args, arguments, outputs)
    if any(parameter.is_meta for parameter in model.parameters()):
        return spec
    return _proven(spec, model, args, arguments)


def _proven(
    spec: PermutationSpec, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> PermutationSpec:
    """The specification with its proof, without the groups that cannot be proven."""
    while True:
        try:
            spec.verify(model, args, kwargs)
            return spec
        except SymmetryError as error:
            dropped = [group for group in error.groups if group in spec.free]
            if not dropped:
                raise
            why = "without effect"
            if not isinstance(error, VacuousError):
                why = "refuted by the proof"
                _log.warning("%s; %s stays as it is", error, ", ".join(dropped))
            spec = spec.restrict(group for group in spec.free if group not in dropped)
            spec.pinned.update(dict.fromkeys(dropped, why))
