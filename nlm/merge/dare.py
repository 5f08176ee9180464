"""DARE (Yu et al., arXiv:2311.03099): drops entries of each task vector at random.

An entry is dropped with probability p; what is left of a task vector is rescaled:

============  =====================================================================
rescale       the entries that are kept are multiplied by
============  =====================================================================
``expected``  1 / (1 - p), as in the paper: the expected value stays
``l1``        sum |tau| / sum |kept tau| per tensor, as in mergekit: the norm stays
``none``      1
============  =====================================================================

The entries follow from the seed, the task and the name of the tensor: neither the other tasks and
tensors, nor their order, threads or device change them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlm._methods import check_dropping, tensor_seed
from nlm._sparse import Total, l1_factor
from nlm._state_dict import StateDict
from nlm.merge.linear import alike
from nlm.ops import dare


def dropped(
    experts: Mapping[str, StateDict],
    base: StateDict,
    drop: float,
    seed: int | None,
    rescale: str,
) -> dict[str, dict[str, Tensor]]:
    """task -> name -> the base plus what is left of the task vector, in float32 at least.

    Parameters
    ----------
    experts : task -> state dict; ``base``, the state dict that their task vectors start from.
    drop : the share of entries that is dropped, in [0, 1).
    seed : of the draws; the same seed drops the same entries on any device.
    rescale : "expected", "l1" or "none": the table of :mod:`nlm.merge.dare`.

    Raises
    ------
    ValueError
        No seed, an unknown rescaling, or a share to drop outside [0, 1).
    """
    seed = check_dropping(drop, seed, rescale)
    return {
        task: {
            name: _dropped(state[name], start, drop, tensor_seed(seed, task, name), rescale)
            for name, start in base.items()
        }
        for task, state in experts.items()
    }


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that arithmetic is done in: float32, or float64 as it is."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def _dropped(expert: Tensor, base: Tensor, drop: float, key: int, rescale: str) -> Tensor:
    expert, base = alike(wide(expert), wide(base))
    if rescale != "l1":
        return dare(expert, base, drop, key, rescale=rescale == "expected")
    vector = expert - base
    kept = dare(vector, torch.zeros_like(vector), drop, key, rescale=False)
    return base + rescaled(kept, vector)


def rescaled(kept: Tensor, vector: Tensor) -> Tensor:
    """What is kept of a vector, in place, with the vector's L1 norm."""
    factor = l1_factor(powers(vector, 1), powers(kept, 1))
    return kept.mul_(torch.tensor(factor, dtype=kept.dtype, device=kept.device))


def powers(vector: Tensor, power: int) -> float:
    r"""The sum of \|x\|^power in float64; on the CPU the same bits as in chunks of a file."""
    if not vector.is_cpu:
        return float(torch.linalg.vector_norm(vector, power, dtype=torch.float64)) ** power
    total = Total(power)
    total.add(vector.detach().contiguous().numpy())
    return total.value
