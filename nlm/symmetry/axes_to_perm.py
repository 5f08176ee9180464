"""The tables of Git Re-Basin's tools: ``{"fc1.weight": ("P_1", "P_0"), "fc1.bias": ("P_1",)}``.

One name or None per dimension (Ainsworth, Hayase and Srinivasa, arXiv:2209.04836). A group may
stand on two dimensions of one parameter. A dimension made of several groups (a convolution's
channels flattened into a linear layer) cannot be said.
"""

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor

from nlm.symmetry.layout import Fixed, Layout, Ref
from nlm.symmetry.permutation import AxisGroup
from nlm.symmetry.spec import PermutationSpec

Table = dict[str, tuple[str | None, ...]]


def import_table(
    table: Mapping[str, Iterable[str | None] | None], state_dict: Mapping[str, Tensor]
) -> PermutationSpec:
    """The specification of a table, with the sizes taken from a state dict."""
    groups: dict[str, AxisGroup] = {}
    params: dict[str, tuple[Layout, ...]] = {}
    if unknown := [name for name in table if name not in state_dict]:
        raise ValueError(
            f"nlm.symmetry: a table names entries of the state dict, got {', '.join(unknown)}"
        )
    left_out = [name for name in state_dict if name not in table]
    if left_out:
        warnings.warn(
            f"nlm.symmetry: entries that the table leaves out are not permuted: "
            f"{', '.join(left_out)}",
            stacklevel=3,
        )
    for name, tensor in state_dict.items():
        shape = tuple(tensor.shape)
        perms = (None,) * len(shape) if table.get(name) is None else tuple(table[name] or ())
        if perms[len(shape) :] == (None,) * (len(perms) - len(shape)):
            perms = perms[: len(shape)]  # some tables write ("P", None) for a vector
        if len(perms) != len(shape):
            raise ValueError(
                f"nlm.symmetry: a table has one name or None per dimension, got {perms} for "
                f"{name!r} of shape {list(shape)}"
            )
        layouts: list[Layout] = []
        for perm, size in zip(perms, shape, strict=True):
            if perm is None:
                layouts.append(Fixed(size))
                continue
            group = groups.setdefault(perm, AxisGroup(perm, size, origin=name))
            if group.size != size:
                raise ValueError(
                    f"nlm.symmetry: a permutation has one size, got {group.size} units of {perm!r} "
                    f"in {group.origin!r} and {size} in {name!r}"
                )
            layouts.append(Ref(perm, size))
        params[name] = tuple(layouts)
    return PermutationSpec(groups, params)


def export_table(spec: PermutationSpec) -> Table:
    """The table of a specification that has one group or none per dimension."""
    if spec.stacks:
        raise ValueError(
            f"nlm.symmetry: an axes_to_perm table holds entries of a state dict, got a stack of "
            f"several, {next(iter(spec.stacks))!r}"
        )
    return {
        name: tuple(_cell(spec, layout, name, dim) for dim, layout in enumerate(layouts))
        for name, layouts in spec.params.items()
    }


def _cell(spec: PermutationSpec, layout: Layout, name: str, dim: int) -> str | None:
    if isinstance(layout, Ref):
        group = spec.groups.get(layout.group)
        if group is None or group.fixed:
            return None
        if not group.parents:
            return layout.group
        text = f"{layout} per {' x '.join(group.parents)}"
    elif isinstance(layout, Fixed):
        return None
    else:
        text = str(layout)
    raise ValueError(
        f"nlm.symmetry: an axes_to_perm table holds one group per dimension that depends on no "
        f"other, got '{text}' on dimension {dim} of {name!r}"
    )
