"""Stacks: the entries of sibling modules as one parameter.

Experts held in a list may be exchanged for one another, and no axis says so: each has tensors of
its own. A stack names the entries of one role in all of them (``experts.*.up.weight``: those of
``experts.0``, ``experts.1``, ...). They count as one parameter with a dimension more, the first, on
which the group of the experts stands.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

Stacks = Mapping[str, tuple[str, ...]]


def check(stacks: Stacks, params: Iterable[str]) -> None:
    """Raises ValueError where stacks do not go together with the names of the parameters."""
    known, taken = set(params), set[str]()
    for name, members in stacks.items():
        if name not in known or len(members) < 2 or len(set(members)) < len(members):
            raise ValueError(
                f"nlm.symmetry: a stack is a parameter of two or more members, got {name!r} of "
                f"{list(members)}"
            )
        if both := sorted(set(members) & (known | taken)):
            raise ValueError(
                f"nlm.symmetry: a member of a stack is no parameter beside it, got {both[0]!r} in "
                f"{name!r}"
            )
        taken |= set(members)


def entries(stacks: Stacks, params: Iterable[str]) -> Iterator[str]:
    """The entries of the state dict that parameters stand for."""
    for name in params:
        yield from stacks.get(name, (name,))


def stack_of(stacks: Stacks) -> dict[str, str]:
    """Member -> the stack to which it belongs."""
    return {each: name for name, of in stacks.items() for each in of}


def shape(stacks: Stacks, name: str, state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of a parameter.

    Raises
    ------
    ValueError
        Members of different shapes.
    """
    if name not in stacks:
        return tuple(state[name].shape)
    shapes = {tuple(state[each].shape): each for each in stacks[name]}
    if len(shapes) > 1:
        raise ValueError(
            f"nlm.symmetry: the members of a stack have one shape, got "
            f"{', '.join(f'{list(size)} for {each!r}' for size, each in shapes.items())}"
        )
    return (len(stacks[name]), *next(iter(shapes)))


def joined(stacks: Stacks, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the members of every stack as one, where its first member stood."""
    if not stacks:
        return dict(state)
    owner = stack_of(stacks)
    found: dict[str, Tensor] = {}
    for entry, tensor in state.items():
        name = owner.get(entry, entry)
        if name not in stacks:
            found[name] = tensor
        elif name not in found:
            found[name] = torch.stack([state[each].detach() for each in stacks[name]])
    return found


def separated(stacks: Stacks, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`joined`; members do not share memory."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in stacks:
            parts = (part.clone() for part in tensor.unbind())
            found |= zip(stacks[name], parts, strict=True)
        else:
            found[name] = tensor
    return found
