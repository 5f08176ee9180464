"""Zipping: units merged wherever they are most alike, in one model or across several.

All units of a group, of all models together, are clustered by the signed correlation of their
activations: the two clusters whose least alike units are most alike become one, until so many are
left as the wide group shall have units (Stoica et al., ZipIt!, arXiv:2305.03053, whose greedy
matching with alpha = beta = 1 this is: complete linkage, by SciPy). Two models side by side become
one that is narrower than both together, one model becomes narrower than it was.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from nlm.statistics import Data, Forward, Mask, collect_cross_moments
from nlm.symmetry import Ref
from nlm.symmetry.widening import Widening


def zip_matching(
    models: Sequence[nn.Module],
    widening: Widening,
    data: Data,
    *,
    width: float = 1.0,
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The units of aligned models in a wide one, merged by clusters of their activations.

    Parameters
    ----------
    models : one or more, of one architecture and in one order of units.
    widening : the groups that can be widened; all others are merged as they stand.
    data : a re-iterable of batches.
    width : of each group, as a multiple of its size; up to the number of models.
    forward, mask, max_samples, device : see :mod:`nlm.statistics.data`.

    Returns
    -------
    group -> int64 ``[models, n]``, as :func:`nlm.align.partial_matching` has it.

    Raises
    ------
    ValueError
        A width out of range, a group that no module shows alone.
    """
    if not 0 < width <= len(models):
        raise ValueError(
            f"nlm.align: a width is more than 0 and at most the number of models "
            f"({len(models)}), got {width}"
        )
    spec = widening.spec
    shown = spec.observation_sites()
    sites = {}
    for group in widening.written:
        site = spec.sites.get(shown.get(group, ""))
        if site is None or not isinstance(site.layout, Ref):
            raise ValueError(
                f"nlm.align: units are clustered where a module shows them alone, got "
                f"{'no module' if site is None else repr(str(site.layout))} for {group!r}"
            )
        sites[shown[group]] = site.dim
    blocks: dict[tuple[int, int], dict[str, Tensor]] = {}
    for x, y in combinations_with_replacement(range(len(models)), 2):
        moments = collect_cross_moments(
            models[x], models[y], sites, data, forward=forward, mask=mask,
            max_samples=max_samples, device=device, caller="nlm.align",
        )  # fmt: skip
        blocks[x, y] = {name: each.correlation().cpu() for name, each in moments.items()}
        blocks[y, x] = {name: each.T for name, each in blocks[x, y].items()}
    all_ = range(len(models))
    return {
        group: clusters(
            torch.cat([torch.cat([blocks[x, y][shown[group]] for y in all_], 1) for x in all_]),
            max(1, round(width * spec.groups[group].size)),
        ).view(len(models), -1)
        for group in widening.written
    }


def clusters(correlation: Tensor, count: int) -> Tensor:
    """The cluster of every unit, counted in the order of their first units."""
    if len(correlation) < 2:
        return torch.zeros(len(correlation), dtype=torch.int64)
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    distance = (1 - (correlation + correlation.T) / 2).clamp(min=0).fill_diagonal_(0)
    tree = linkage(squareform(distance.numpy(), checks=False), "complete")
    labels = torch.from_numpy(cut_tree(tree, n_clusters=[count])[:, 0]).long()
    first = torch.full((count,), len(labels)).scatter_reduce(
        0, labels, torch.arange(len(labels)), "amin"
    )
    return first.argsort().argsort()[labels]
