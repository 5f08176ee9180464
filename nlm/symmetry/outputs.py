"""The outputs of a model by name: "logits" of a mapping, "0" of a tuple, "output" of a tensor."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


def named_tensors(outputs: Any) -> dict[str, Tensor]:
    """Every tensor among a model's outputs, by the path on which it is found.

    Mappings (the outputs of Hugging Face models), sequences and dataclasses are followed; other
    objects, such as caches, are no outputs.
    """
    found: dict[str, Tensor] = {}
    _collect(outputs, "", found)
    return found


def _collect(value: Any, path: str, found: dict[str, Tensor]) -> None:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Tensor):
        found[path or "output"] = value
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    for key, part in items:
        _collect(part, f"{path}.{key}" if path else str(key), found)


def selected(every: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The names, in the model's order, that selected ones stand for, also by their first part.

    Raises
    ------
    ValueError
        No output has a selected name.
    """
    kept = [
        name for name in every if any(name == each or name.startswith(f"{each}.") for each in names)
    ]
    missing = [
        each for each in names if not any(k == each or k.startswith(f"{each}.") for k in kept)
    ]
    if missing or not kept:
        raise ValueError(
            f"nlm.trace: selected outputs are outputs of the model ({', '.join(every)}), got "
            f"{', '.join(map(repr, missing)) or 'none'}"
        )
    return kept
