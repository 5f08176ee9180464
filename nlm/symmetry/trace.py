"""``nlm.trace``: from a model and an example input to a verified specification."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nlm._modules import evaluation
from nlm.symmetry.sequential import BY_HAND, discover
from nlm.symmetry.spec import PermutationSpec


def trace(
    model: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    outputs: Sequence[str] | None = None,
) -> PermutationSpec:
    """Finds the permutation symmetries of a model and proves them on it.

    Reads networks made of nested ``nn.Sequential`` containers of linear, convolution,
    normalisation, pooling, flatten and element-wise modules (MLPs, VGG-like networks).

    Parameters
    ----------
    model : the network; it is not changed.
    example_inputs : a tensor, or a tuple with one tensor, as the model takes it. Two or more
        samples of real data prove more than one of noise.
    kwargs, outputs : further arguments and the names of selected outputs; a sequential network has
        none.

    Returns
    -------
    PermutationSpec
        Verified: random permutations of its groups leave the outputs as they are.

    Raises
    ------
    ValueError
        The network is built in a way that is not understood; the message names the module. A
        specification written by hand (:class:`nlm.PermutationSpec`) and proven with its ``verify``
        serves as well.
    SymmetryError
        The proof failed; the message names the group.

    References
    ----------
    Ainsworth, Hayase, Srinivasa: Git Re-Basin, arXiv:2209.04836, section 2.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if len(args) != 1 or not isinstance(args[0], Tensor) or kwargs or outputs:
        raise ValueError(
            f"nlm.trace: a sequential network takes one tensor, got {len(args)} inputs, "
            f"keywords {list(kwargs or ())} and selected outputs {list(outputs or ())}; {BY_HAND}"
        )
    with evaluation(model):
        spec = discover(model, args[0])
    spec.verify(model, args)
    return spec
