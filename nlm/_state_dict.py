"""State dicts side by side: the same entries, real, finite, of one shape."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn

from nlm._names import as_patterns, matches

StateDict = Mapping[str, Tensor]


def state_of(model: nn.Module | StateDict) -> StateDict:
    """The state dict of a model, or the one that was given."""
    return model.state_dict() if isinstance(model, nn.Module) else model


def place_of(tensor: Tensor) -> Hashable:
    """Equal for two names of the same numbers: of one parameter, or of two that share ``data``."""
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:  # sparse
        return id(tensor)
    layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return storage._cdata, tensor.dtype, *layout


def overlapping(state: StateDict) -> set[str]:
    """The entries that share memory with one of another form: a transpose, a part, a whole."""
    spans: dict[Hashable, list[tuple[int, int, str]]] = defaultdict(list)
    places = {name: place_of(tensor) for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.numel() and not isinstance(places[name], int):
            start = int(tensor.storage_offset()) * tensor.itemsize
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            length = 1 + sum((int(size) - 1) * int(stride) for size, stride in steps)
            span = start, start + length * tensor.itemsize, name
            spans[tensor.untyped_storage()._cdata].append(span)
    found: set[Hashable] = set()
    for of in spans.values():
        _, last, widest = min(of)
        for start, end, name in sorted(of):
            if start < last and places[name] != places[widest]:
                found |= {places[name], places[widest]}
            last, widest = max((last, widest), (end, name))
    return {name for name, place in places.items() if place in found}


def check_alike(
    caller: str, states: Mapping[str, StateDict], apart: str | Iterable[str] = ()
) -> list[str]:
    """The names of the entries that all state dicts share, after checking that they are alike.

    Parameters
    ----------
    caller : the function that the message names.
    states : who -> state dict.
    apart : patterns of entries that each keeps for itself (heads): they may differ or be missing.

    Raises
    ------
    ValueError
        No state dict, missing or extra entries, differing shapes, NaN or inf.
    TypeError
        Integer or complex weights.
    """
    apart = as_patterns(apart)
    if not states:
        raise ValueError(f"{caller}: there is at least one model, got none")
    (first, reference), *others = states.items()
    shared = [name for name in reference if not matches(name, apart)]
    for who, state in others:
        missing = [name for name in shared if name not in state]
        extra = [name for name in state if name not in reference and not matches(name, apart)]
        if missing or extra:
            raise ValueError(
                f"{caller}: the models have the same entries, got "
                f"{_few(missing) or 'none'} missing and {_few(extra) or 'none'} extra in {who!r} "
                f"against {first!r}"
            )
        for name in shared:
            if state[name].shape != reference[name].shape:
                raise ValueError(
                    f"{caller}: the models have the same shapes (entries that each keeps for "
                    f"itself are named as heads), got {list(state[name].shape)} for {name!r} of "
                    f"{who!r} and {list(reference[name].shape)} of {first!r}"
                )
    for who, state in states.items():
        for name, tensor in state.items():
            check_weight(caller, who, name, tensor)
    return shared


def check_weight(caller: str, who: str, name: str, tensor: Tensor) -> None:
    """Raises where an entry is complex, an integer weight, or not finite."""
    kind = name.rpartition(".")[2]
    if tensor.is_complex() or (not tensor.is_floating_point() and kind in {"weight", "bias"}):
        raise TypeError(
            f"{caller}: weights are real floating-point numbers, got {tensor.dtype} for {name!r} "
            f"of {who!r}"
        )
    if bad := count_not_finite(tensor):
        raise ValueError(
            f"{caller}: weights are finite, got {bad} NaN or inf of {tensor.numel()} in {name!r} "
            f"of {who!r}"
        )


def count_not_finite(tensor: Tensor) -> int:
    """The number of NaN and inf in a tensor; one read of it where there is none."""
    if not tensor.is_floating_point() or math.isfinite(float(tensor.detach().sum())):
        return 0  # the sum of finite numbers may overflow, that of others is never finite
    return int((~torch.isfinite(tensor)).sum())


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")
