"""A permutation applied to a state dict: into new memory, or into a state dict that is there."""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nlm._state_dict import place_of
from nlm.ops._arguments import check_apart, check_written
from nlm.symmetry import gather, stacks
from nlm.symmetry import permutation as permutations

if TYPE_CHECKING:
    from nlm.symmetry.spec import PermutationSpec

State = Mapping[str, Tensor]


def apply(
    spec: "PermutationSpec",
    permutation: Mapping[str, Tensor],
    state_dict: State,
    out: State | None = None,
) -> dict[str, Tensor]:
    """See :meth:`PermutationSpec.apply`; the state dict has been checked."""
    plans = gather.Gathers(spec.groups, permutations.check(spec.groups, permutation))
    repeated = set() if out is None else _repeated(spec, state_dict, out)
    state = stacks.joined(spec.stacks, state_dict)
    sources = {name: tensor for name, tensor in state.items() if name not in repeated}
    plan = [plans.of(spec.params.get(name, ())) for name in sources]
    if out is None:
        moved = gather.apply(sources.values(), plan)
        found = stacks.separated(spec.stacks, dict(zip(sources, moved, strict=True)))
        return {name: found[name] for name in state_dict}
    _check_apart(state_dict, {name: out[name] for name in state_dict if name not in repeated})
    direct = {n: out[n].detach() for n in sources if n in out and _is_plain(out[n])}
    targets = [
        direct[name] if name in direct else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for name, x in sources.items()
    ]
    moved = gather.apply(sources.values(), plan, targets)
    found = stacks.separated(spec.stacks, dict(zip(sources, moved, strict=True)))
    for name in found.keys() - direct.keys():
        out[name].detach().copy_(found[name])
    return {name: out[name] for name in state_dict}


def _is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may write to it: in order, and neither conjugate nor negative in reading."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _repeated(spec: "PermutationSpec", state: State, out: State) -> set[str]:
    """The entries to be written once, with another: tied in ``out``, and equal as they go in.

    Raises where ``out`` is not made as the state dict.
    """
    missing, extra = [n for n in state if n not in out], [n for n in out if n not in state]
    if missing or extra:
        raise ValueError(
            f"nlm.symmetry: out has the entries of the state dict, got "
            f"{len(missing)} missing and {len(extra)} extra, such as {(missing + extra)[0]!r}"
        )
    members = stacks.stack_of(spec.stacks)
    found: set[str] = set()
    seen: dict[Hashable, Tensor] = {}
    for name, tensor in state.items():
        target = out[name]
        check_written("symmetry", f"out[{name!r}]", target)
        if target.dtype != tensor.dtype:
            raise TypeError(
                f"nlm.symmetry: out has the types of the state dict, got {target.dtype} and "
                f"{tensor.dtype} for {name!r}"
            )
        if target.shape != tensor.shape or target.device != tensor.device:
            raise ValueError(
                f"nlm.symmetry: out has the shapes and devices of the state dict, got "
                f"{list(target.shape)} on {target.device} and {list(tensor.shape)} on "
                f"{tensor.device} for {name!r}"
            )
        if name in members:
            continue
        place = place_of(target), spec.params.get(name)
        if place in seen and _is_equal(seen[place], tensor):
            found.add(name)
        seen.setdefault(place, tensor)
    return found


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return place_of(one) == place_of(other) or (not one.is_meta and torch.equal(one, other))


def _check_apart(state: State, out: State) -> None:
    written = [(f"out[{name!r}]", tensor) for name, tensor in out.items() if not tensor.is_meta]
    read = [(f"{name!r} of the state dict", state[name]) for name in state]
    check_apart("symmetry", written, [each for each in read if not each[1].is_meta])
