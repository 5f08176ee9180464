"""Model Stock (Jang et al., arXiv:2403.19522), tensor by tensor:

theta = theta_0 + r (mean_t theta_t - theta_0), r = K c / (1 + (K - 1) c),

with c the mean cosine between two of the K task vectors: the point nearest to the centre of a
sphere on which fine-tuned models lie.
"""

from collections.abc import Mapping

from torch import Tensor

from nlm import _coefficients
from nlm._state_dict import StateDict
from nlm.merge.linear import combined, computable
from nlm.ops import inner_products


def model_stock(experts: Mapping[str, StateDict], base: StateDict) -> dict[str, Tensor]:
    """The merged entries, in the base's dtype.

    Raises
    ------
    ValueError
        Fewer than two experts.
    """
    if len(experts) < 2:
        raise ValueError(f"nlm.merge: 'model_stock' merges two experts or more, got {len(experts)}")
    merged = {}
    for name, start in base.items():
        models = [computable(state[name]) for state in experts.values()]
        ratio = _coefficients.model_stock(inner_products(models, computable(start)).tolist())
        merged[name] = combined(models, 1.0, start.dtype, start, divisor=len(models), scale=ratio)
    return merged
