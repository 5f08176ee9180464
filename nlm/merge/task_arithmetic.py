"""Task Arithmetic (Ilharco et al., arXiv:2212.04089):

theta = theta_0 + scale * sum_t w_t (theta_t - theta_0).
"""

from collections.abc import Mapping

from torch import Tensor

from nlm._state_dict import StateDict
from nlm.merge.linear import combined


def task_arithmetic(
    experts: Mapping[str, StateDict],
    base: StateDict,
    scale: float,
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    """The base plus the scaled sum of the task vectors, in the base's dtype.

    Parameters
    ----------
    experts : task -> state dict; ``base``, the state dict that their task vectors start from.
    scale : the factor on the sum; ``weights``, task -> the factor on its task vector.
    """
    factors = [weights[task] for task in experts]
    return {
        name: combined(
            (state[name] for state in experts.values()), factors, start.dtype, start, scale=scale
        )
        for name, start in base.items()
    }
