"""The weighted mean of models (Wortsman et al., Model Soups, arXiv:2203.05482):

theta = sum_t w_t theta_t / sum_t w_t.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nlm._state_dict import StateDict
from nlm.ops import weighted_sum


def linear(
    experts: Mapping[str, StateDict], like: StateDict, weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """The weighted mean of the experts' entries, in the dtypes of ``like``.

    Raises
    ------
    ValueError
        The weights sum to zero.
    """
    total = sum(weights.values())
    if total == 0:
        raise ValueError(
            f"nlm.merge: the weights of a mean do not sum to zero, got {dict(weights)}"
        )
    factors = [weights[task] for task in experts]
    return {
        name: combined(
            (state[name] for state in experts.values()), factors, each.dtype, divisor=total
        )
        for name, each in like.items()
    }


def combined(
    tensors: Iterable[Tensor],
    weights: Sequence[float] | float,
    dtype: torch.dtype,
    base: Tensor | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """:func:`nlm.ops.weighted_sum` of tensors of any floating type, in ``dtype``."""
    start = None if base is None else computable(base)
    within = dtype if dtype.itemsize >= 2 else torch.float32
    total = weighted_sum([computable(x) for x in tensors], weights, start, divisor, scale, within)
    return total.to(dtype)


def computable(tensor: Tensor) -> Tensor:
    """The tensor in a type that the operations take: 8-bit ones are widened."""
    return tensor if tensor.dtype.itemsize >= 2 else tensor.float()


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are where they have one dtype, else in float32, or float64 with one."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return tensors
    common = torch.float64 if torch.float64 in dtypes else torch.float32
    return tuple(tensor.to(common) for tensor in tensors)
