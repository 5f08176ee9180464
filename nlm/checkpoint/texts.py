"""JSON that others wrote, and the dataclasses that it describes. Imports no torch.

Whatever is wrong with a text ends as a ValueError, and at once: numbers where there should be names
would end somewhere else.
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

_T = TypeVar("_T")


class DamagedFileError(ValueError):
    """A file that is truncated, corrupt, or of another format."""


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises
    ------
    ValueError
        It is no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def build(kind: type[_T], found: Any) -> _T:
    """The dataclass that a mapping describes: its fields, of the types that they are declared with.

    Raises
    ------
    ValueError
        Another form, an unknown field, one that is missing, or a value of another type.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{kind.__name__} is a mapping, got a {type(found).__name__}")
    hints = typing.get_type_hints(kind)
    named = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if strangers := [name for name in found if name not in named]:
        raise ValueError(f"{kind.__name__} has {', '.join(named)}, got {strangers[0]!r}")
    for name, field in named.items():
        default = (field.default, field.default_factory)
        if name not in found and default == (dataclasses.MISSING, dataclasses.MISSING):
            raise ValueError(f"{kind.__name__} has {name}, got none")
    return kind(**{name: _made(hints[name], of, name) for name, of in found.items()})


def _made(hint: Any, found: Any, name: str) -> Any:
    """A value of the type of a field: numbers, texts, lists, tuples, mappings, dataclasses."""
    of, parts = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, found)
    if of in (types.UnionType, typing.Union):
        if found is None and type(None) in parts:
            return None
        return _made(next(part for part in parts if part is not type(None)), found, name)
    if of in (list, tuple) and isinstance(found, (list, tuple)):
        if of is list or parts[1:] == (...,):
            return of(_made(parts[0], each, name) for each in found)
        if len(found) == len(parts):
            return tuple(_made(*pair, name) for pair in zip(parts, found, strict=True))
    elif of is dict and isinstance(found, Mapping):
        key, value = parts
        return {_made(key, k, name): _made(value, each, name) for k, each in found.items()}
    elif hint is float and type(found) in (int, float):
        try:
            return float(found)
        except OverflowError:
            pass
    elif hint in (int, str, bool) and type(found) is hint:
        return found
    told = repr(found) if isinstance(found, (str, int, float, type(None))) else type(found).__name__
    raise ValueError(f"{name} is {getattr(hint, '__name__', None) or hint}, got {told[:60]}")


@contextmanager
def whole(path: str | os.PathLike[str], kind: str, caller: str) -> Iterator[None]:
    """Within, what the content of a file of nlm's own leads to is an error that names the file.

    Raises
    ------
    DamagedFileError
        Something that the file should hold is missing or of another form.
    """
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedFileError(
            f"{caller}: a file of {kind} must be whole, got {os.fspath(path)!r} "
            f"({' '.join(said.split())})"
        ) from error
