"""Spherical interpolation of two models, tensor by tensor (Shoemake, SIGGRAPH 1985):

theta = sin((1 - t) a) / sin a * theta_1 + sin(t a) / sin a * theta_2, a the angle between them,

as mergekit has it: linear where the tensors are nearly parallel or opposite.
"""

from collections.abc import Mapping

from torch import Tensor

from nlm import _coefficients
from nlm._state_dict import StateDict
from nlm.merge.linear import combined, computable
from nlm.ops import inner_products


def slerp(experts: Mapping[str, StateDict], like: StateDict, t: float) -> dict[str, Tensor]:
    """Between the first expert (``t`` = 0) and the second (1), in the dtypes of ``like``.

    Raises
    ------
    ValueError
        More or fewer than two experts.
    """
    if len(experts) != 2:
        raise ValueError(f"nlm.merge: 'slerp' merges two experts, got {len(experts)}")
    merged = {}
    for name, each in like.items():
        pair = [computable(state[name]) for state in experts.values()]
        factors = _coefficients.slerp(inner_products(pair).tolist(), t)
        merged[name] = combined(pair, factors, each.dtype)
    return merged
