"""The weighted mean of models (Wortsman et al., Model Soups, arXiv:2203.05482):

theta = sum_t w_t theta_t / sum_t w_t.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlm._state_dict import StateDict


def linear(experts: Mapping[str, StateDict], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The weighted mean of the experts' entries, summed in float32 at least.

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
    names = next(iter(experts.values()))
    return {
        name: weighted_sum(
            {task: state[name] for task, state in experts.items()},
            {task: weight / total for task, weight in weights.items()},
        ).to(names[name].dtype)
        for name in names
    }


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that arithmetic is done in: float32, or float64 as it is."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are where they have one dtype, else in float32, or float64 with one."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return tensors
    common = torch.float64 if torch.float64 in dtypes else torch.float32
    return tuple(tensor.to(common) for tensor in tensors)


def weighted_sum(tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum_t w_t x_t."""
    (first, start), *others = tensors.items()
    total = wide(start) * weights[first]
    for task, tensor in others:
        total += wide(tensor) * weights[task]
    return total
