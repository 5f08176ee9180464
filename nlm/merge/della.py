"""DELLA's MagPrune (Deep et al., arXiv:2406.11617): drops at random, smaller entries more often.

In each row of a tensor of a task vector (all entries of one index of the first dimension; a vector
is one row) the smallest entry is kept with probability density - epsilon, the largest with density
+ epsilon, and those between with equal steps. What is kept is rescaled:

============  =====================================================================
rescale       the entries that are kept are multiplied by
============  =====================================================================
``expected``  1 / their probability, as in the paper: the expected value stays
``l1``        sum |tau| / sum |kept tau| per tensor, as in mergekit: the norm stays
``none``      1
============  =====================================================================

Then signs are elected (``della``), or the rest is summed (``della_linear``). What is drawn follows
from the seed, the task, the name of the tensor, the row and the rank alone, as
:mod:`nlm.ops.magprune` has it, which cuts rows of more than 2^20 entries. Rows of mergekit run
along the second dimension: the same but for convolutions.
"""

from collections.abc import Mapping

from torch import Tensor

from nlm import ops
from nlm._methods import check_dropping, check_ranked, tensor_seed
from nlm._state_dict import StateDict
from nlm.merge.dare import rescaled, wide
from nlm.merge.linear import alike


def magprune(
    experts: Mapping[str, StateDict],
    base: StateDict,
    density: float,
    epsilon: float,
    seed: int | None,
    rescale: str,
) -> dict[str, dict[str, Tensor]]:
    """task -> name -> the base plus what is left of the task vector, in float32 at least.

    Parameters
    ----------
    experts : task -> state dict; ``base``, the state dict that their task vectors start from.
    density : the mean share of entries that is left, in (0, 1].
    epsilon : how far the probabilities of a row's smallest and largest entry lie from it.
    seed : of the draws; the same seed drops the same entries for any chunks and threads.
    rescale : "expected", "l1" or "none": the table of :mod:`nlm.merge.della`.

    Raises
    ------
    ValueError
        No seed, an unknown rescaling, a density outside (0, 1], or with a smaller density than 1
        a probability outside (0, 1).
    """
    seed = check_dropping(0.0, seed, rescale)
    check_ranked(density, epsilon)
    found: dict[str, dict[str, Tensor]] = {}
    for task, state in experts.items():
        found[task] = {}
        for name, start in base.items():
            expert, origin = alike(wide(state[name]), wide(start))
            vector = expert - origin
            if vector.numel():
                rows = vector.reshape(vector.shape[0] if vector.dim() > 1 else 1, -1)
                key = tensor_seed(seed, task, name)
                kept = ops.magprune(rows, density, epsilon, key, rescale=rescale == "expected")
                kept = rescaled(kept, vector) if rescale == "l1" else kept
                vector = kept.reshape(vector.shape)
            found[task][name] = vector + origin
    return found
