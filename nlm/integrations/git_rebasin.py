"""Git Re-Basin's functions, with the signatures that everybody copied, on nlm's weight matching.

A script that aligned two models by the published functions goes on by changing one line::

    from nlm.integrations.git_rebasin import (
        apply_permutation, permutation_spec_from_axes_to_perm, weight_matching,
    )

    ps = permutation_spec_from_axes_to_perm({"fc1.weight": ("P_0", None), ...})
    perm = weight_matching(ps, params_a, params_b)      # {"P_0": indices, ...}
    params_b = apply_permutation(ps, perm, params_b)

Tables are read as they are: one name or None per axis, in any order of axes (PyTorch's or Flax's),
with trailing Nones for vectors, and one name on two axes of an entry, which the published loop
forbids. Parameters are tensors or what NumPy takes for an array; indices come back as the kind of
the parameters, always as integers. Indices in floating point, which some ports store, are taken
where they are whole numbers.

What differs: the objective never falls and a sweep that gains nothing ends a descent
(:mod:`nlm.align.descent`), of which there are two from different starts
(:mod:`nlm.align.layerwise`); sums are exact to float64, nothing is printed, and BatchNorm's
running statistics move with their channels but are no part of what is maximised.

References: Ainsworth, Hayase and Srinivasa, Git Re-Basin, arXiv:2209.04836, algorithm 1.
"""

import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nlm import align
from nlm.symmetry import PermutationSpec as Symmetry
from nlm.symmetry.layout import is_name

__all__ = [
    "PermutationSpec",
    "apply_permutation",
    "get_permuted_param",
    "permutation_spec_from_axes_to_perm",
    "weight_matching",
]

_log = logging.getLogger(__name__)
_WHERE = "nlm.integrations.git_rebasin"

Axes = tuple[str | None, ...]


class PermutationSpec(NamedTuple):
    """Which permutation stands on which axis of which parameter.

    Attributes
    ----------
    perm_to_axes : permutation -> its (parameter, axis) pairs.
    axes_to_perm : parameter -> a permutation or None for each of its axes.
    """

    perm_to_axes: dict[str, list[tuple[str, int]]]
    axes_to_perm: dict[str, Axes]


def permutation_spec_from_axes_to_perm(
    axes_to_perm: Mapping[str, Iterable[str | None]],
) -> PermutationSpec:
    """The specification of a table ``{"fc1.weight": ("P_1", "P_0"), "fc1.bias": ("P_1",)}``."""
    table = {name: tuple(axes) for name, axes in axes_to_perm.items()}
    perm_to_axes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, axes in table.items():
        for axis, perm in enumerate(axes):
            if perm is not None:
                perm_to_axes[perm].append((name, axis))
    return PermutationSpec(dict(perm_to_axes), table)


def weight_matching(
    ps: PermutationSpec,
    params_a: Mapping[str, Any],
    params_b: Mapping[str, Any],
    max_iter: int = 100,
    init_perm: Mapping[str, Any] | None = None,
    *,
    silent: bool = True,
    seed: int | None = None,
    frank_wolfe: bool = False,
) -> dict[str, Any]:
    """The permutation of ``params_b``'s units that brings its weights closest to ``params_a``'s.

    Parameters
    ----------
    ps : the specification; entries of the parameters that its table leaves out do not count.
    params_a, params_b : name -> Tensor or array, of any float dtype and on any device.
    max_iter : at most so many visits to every permutation in a descent, of which there are two
        (:mod:`nlm.align.layerwise`); the better one is kept.
    init_perm : where to start: permutation -> indices; those left out start as they are.
    silent : whether progress is logged at debug level instead of as information.
    seed : of the order of visits; by default drawn from PyTorch's global generator, so that
        ``torch.manual_seed`` settles it and calls in a row differ, as in the published loop.
    frank_wolfe : whether the descent starts from where steps of all permutations together lead
        (:mod:`nlm.align.frank_wolfe`): mostly a higher objective, in several times the time.

    Returns
    -------
    permutation -> int64 ``[n]``: row i of ``params_a`` is matched to row ``[i]`` of ``params_b``. A
    tensor on ``params_b``'s device; an array where that entry of ``params_b`` is none.

    Raises
    ------
    ValueError
        An entry of the table is missing in the parameters or has another shape than it says, NaN or
        inf, an unknown permutation in ``init_perm`` or indices that are none.
    TypeError
        Integer or complex weights.

    Warns
    -----
    UserWarning
        A permutation stands on one matrix alone: it permutes an input or an output of the network.
    """
    names = list(ps.axes_to_perm)
    for who, params in (("params_a", params_a), ("params_b", params_b)):
        if missing := [name for name in names if name not in params]:
            raise ValueError(
                f"{_WHERE}: parameters have the entries of the table, got {len(missing)} missing "
                f"in {who}, such as {missing[0]!r}"
            )
    a, b = ({name: _tensor(params[name]) for name in names} for params in (params_a, params_b))
    own_names, spec = _symmetry(ps, a)
    for perm, axes in ps.perm_to_axes.items():
        matrices = {name for name, _ in axes if a[name].dim() > 1}
        if len(matrices) == 1 and len({axis for name, axis in axes if name in matrices}) == 1:
            warnings.warn(
                f"{_WHERE}: a hidden permutation stands on the layer that writes its units and on "
                f"one that reads them, got {perm!r} on {matrices.pop()!r} alone: it permutes an "
                f"input or an output of the network",
                stacklevel=2,
            )
    start = _indices(own_names, init_perm or {})
    moved = spec.apply(start, b)

    def report(sweep: int, objective: float) -> None:
        _log.log(logging.DEBUG if silent else logging.INFO, "sweep %d: %.9g", sweep, objective)

    found = align.weight_matching(
        a, moved, spec, seed=int(torch.randint(2**31, ())) if seed is None else seed,
        max_sweeps=max_iter, frank_wolfe=frank_wolfe, layerwise=True, progress=report,
    )  # fmt: skip
    permutation = spec.compose(start, found.permutation)
    return {
        perm: _like(permutation[own_names[perm]], params_b[ps.perm_to_axes[perm][0][0]])
        for perm in ps.perm_to_axes
    }


def apply_permutation(
    ps: PermutationSpec, perm: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters with their units in another order.

    Parameters
    ----------
    perm : permutation -> indices, of all permutations that stand on an entry of ``params``.
    params : name -> Tensor or array; some or all of the table's entries, and no others.

    Returns
    -------
    name -> Tensor or array, new memory but for entries without a permutation. A tensor that
    requires gradients passes them on.

    Raises
    ------
    ValueError
        See :func:`get_permuted_param`.
    """
    if torch.is_grad_enabled() and any(
        isinstance(each, Tensor) and each.requires_grad for each in params.values()
    ):
        return {name: get_permuted_param(ps, perm, name, params) for name in params}
    for name in params:
        _axes(ps, name)
    tensors = {name: _tensor(each) for name, each in params.items()}
    own_names, spec = _symmetry(ps, tensors)
    if missing := [each for each in own_names if each not in perm]:
        raise _missing(missing[0], perm)
    moved = spec.apply(_indices(own_names, {each: perm[each] for each in own_names}), tensors)
    return {
        name: each if set(ps.axes_to_perm[name]) <= {None} else _like(moved[name], each)
        for name, each in params.items()
    }


def get_permuted_param(
    ps: PermutationSpec,
    perm: Mapping[str, Any],
    k: str,
    params: Mapping[str, Any],
    except_axis: int | None = None,
) -> Any:
    """One parameter with its units in another order, but for those of one axis.

    Parameters
    ----------
    perm : permutation -> indices.
    k : the name of the parameter.
    params : name -> Tensor or array.
    except_axis : an axis that stays as it is.

    Returns
    -------
    A Tensor or an array, as ``params[k]``; a tensor passes gradients on.

    Raises
    ------
    ValueError
        A parameter that the table leaves out, a permutation without indices, indices that are no
        permutation of their axis, or in floating point and no whole numbers.
    """
    value = params[k]
    for axis, name in enumerate(_axes(ps, k)):
        if name is None or axis == except_axis:
            continue
        if name not in perm:
            raise _missing(name, perm)
        index = _whole(name, perm[name])
        if not torch.equal(index.sort().values, torch.arange(value.shape[axis])):
            raise ValueError(
                f"{_WHERE}: the indices of a permutation hold each of 0 to n - 1 once, got "
                f"{_shown(index)} of {name!r} for {value.shape[axis]} units of {k!r}"
            )
        if isinstance(value, Tensor):
            value = value.index_select(axis, index.to(value.device))
        else:
            value = np.take(np.asarray(value), index.numpy(), axis)
    return value


def _axes(ps: PermutationSpec, name: str) -> Axes:
    if name not in ps.axes_to_perm:
        raise ValueError(
            f"{_WHERE}: parameters are entries of the table (one that stays as it is has Nones), "
            f"got {name!r}"
        )
    return ps.axes_to_perm[name]


def _missing(name: str, perm: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"{_WHERE}: there are indices for every permutation of a parameter, got none for {name!r} "
        f"among {', '.join(map(repr, perm)) or 'none'}"
    )


def _symmetry(ps: PermutationSpec, params: Mapping[str, Tensor]) -> tuple[dict[str, str], Symmetry]:
    """The specification of some entries, and the names of its groups: theirs, where they may be."""
    own_names: dict[str, str] = {}
    named = (each for name in params for each in ps.axes_to_perm[name] if each is not None)
    for perm in dict.fromkeys(named):
        own = str(perm)
        if not is_name(own):
            own = "P" + re.sub(r"[^\w.-]", "_", own, flags=re.ASCII)
        while own in own_names.values():
            own += "_"
        own_names[perm] = own
    table = {
        name: tuple(None if each is None else own_names[each] for each in ps.axes_to_perm[name])
        for name in params
    }
    return own_names, Symmetry.from_axes_to_perm(table, params)


def _indices(own_names: Mapping[str, str], perm: Mapping[str, Any]) -> dict[str, Tensor]:
    """Group -> indices, of each permutation that is given."""
    if unknown := [name for name in perm if name not in own_names]:
        raise ValueError(
            f"{_WHERE}: indices are those of permutations of the table "
            f"({', '.join(own_names) or 'none'}), got {unknown[0]!r}"
        )
    return {own_names[name]: _whole(name, each) for name, each in perm.items()}


def _whole(name: str, index: Any) -> Tensor:
    """Indices on the CPU as int64; those in floating point where they are whole numbers."""
    found = torch.as_tensor(index if isinstance(index, Tensor) else np.array(index)).detach().cpu()
    whole = found.long()
    if found.dim() != 1 or found.is_complex() or not torch.equal(whole.to(found.dtype), found):
        raise ValueError(
            f"{_WHERE}: the indices of a permutation are whole numbers in one dimension, got "
            f"{_shown(found)} of shape {list(found.shape)} for {name!r}"
        )
    return whole


def _shown(index: Tensor) -> str:
    values = index.flatten().tolist()
    return f"{values[:8]}{'...' if len(values) > 8 else ''}"


def _tensor(value: Any) -> Tensor:
    """A tensor, or an array as one; arrays that are not to be written to are copied."""
    if isinstance(value, Tensor):
        return value.detach()
    array = np.asarray(value)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _like(found: Tensor, value: Any) -> Any:
    """A tensor on the device of a value, or an array where that is none."""
    return found.to(value.device) if isinstance(value, Tensor) else found.numpy()
