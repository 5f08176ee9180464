"""Specifications as text: JSON or YAML in files, and what people read.

A file holds a mapping with the attributes of :class:`PermutationSpec`, layouts in compact form::

    version: 1
    groups: {g0: {size: 64, origin: conv1}}
    params: {conv1.weight: [g0:64, 1, 5, 5], conv1.bias: [g0:64]}
    sites: {act1: [1, g0:64]}
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nlm.checkpoint import atomic_path
from nlm.checkpoint.plain_yaml import parse_yaml
from nlm.checkpoint.texts import build, parse_json
from nlm.symmetry import shipped
from nlm.symmetry.layout import Layout, parse
from nlm.symmetry.permutation import AxisGroup
from nlm.symmetry.proof import Verification
from nlm.symmetry.spec import PermutationSpec, Site

_VERSION = 1


@dataclasses.dataclass
class _Rest:
    """What a file holds as a specification does."""

    outputs: tuple[str, ...] = ()
    opaque_ops: dict[str, int] = dataclasses.field(default_factory=dict)
    pinned: dict[str, str] = dataclasses.field(default_factory=dict)
    stacks: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


_REST = {field.name for field in dataclasses.fields(_Rest)}


def to_mapping(spec: PermutationSpec) -> dict[str, Any]:
    """The specification as plain dicts, lists, texts and numbers."""
    return {
        "version": _VERSION,
        "groups": {
            name: {"size": group.size, "parents": list(group.parents), "origin": group.origin}
            | ({"fixed": True} if group.fixed else {})
            for name, group in spec.groups.items()
        },
        "params": {name: [str(part) for part in dims] for name, dims in spec.params.items()},
        "sites": {name: [site.dim, str(site.layout)] for name, site in spec.sites.items()},
        "outputs": list(spec.outputs),
        "opaque_ops": dict(spec.opaque_ops),
        "pinned": dict(spec.pinned),
        "verified": None if spec.verified is None else dataclasses.asdict(spec.verified),
    } | ({"stacks": {name: list(of) for name, of in spec.stacks.items()}} if spec.stacks else {})


def from_mapping(text: Mapping[str, Any], name: str = "a mapping") -> PermutationSpec:
    """The specification that plain dicts, lists, texts and numbers describe.

    Raises
    ------
    ValueError
        A part is missing or has another form than it should.
    """
    try:
        if text["version"] != _VERSION:
            raise ValueError(
                f"nlm.symmetry: a specification of version {_VERSION} is read, got version "
                f"{text['version']!r}"
            )
        proof = text.get("verified")
        spec = PermutationSpec(
            groups={
                str(group): build(AxisGroup, {"id": str(group), **of})
                for group, of in text["groups"].items()
            },
            params={str(key): _layouts(dims) for key, dims in text["params"].items()},
            sites={
                str(module): Site(_whole(dim), _layout(layout))
                for module, (dim, layout) in text.get("sites", {}).items()
            },
            verified=None if proof is None else build(Verification, proof),
            **dataclasses.asdict(build(_Rest, {name: text[name] for name in _REST & text.keys()})),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if str(error).startswith("nlm."):  # it says what is wrong, and not where
            raise ValueError(f"{error} in {name}") from error
        raise ValueError(
            f"nlm.symmetry: a specification is a mapping with version, groups and params, got "
            f"{name} ({type(error).__name__}: {error})"
        ) from error
    if spec.verified is not None and not spec.proven:
        spec.verified = None
        warnings.warn(
            f"nlm.symmetry: a proof is of the specification as it was proven, got one that was "
            f"changed since in {name}; it is not verified",
            stacklevel=4,
        )
    return spec


def write(spec: PermutationSpec, path: str | os.PathLike[str], force: bool) -> None:
    """Writes YAML where the path ends in .yaml or .yml, JSON otherwise."""
    content = to_mapping(spec)
    with atomic_path(path, force) as temporary:
        if _is_yaml(path):
            temporary.write_text(yaml.safe_dump(content, sort_keys=False, width=100))
        else:
            temporary.write_text(to_json(content))


def to_json(content: Mapping[str, Any]) -> str:
    """A mapping as JSON, with one line for each entry of the mappings in it."""
    lines = []
    for name, value in content.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, dict) and len(value) > 1:
            inner = (
                f"  {json.dumps(key)}: {json.dumps(of, allow_nan=False)}"
                for key, of in value.items()
            )
            text = "{\n" + ",\n".join(inner) + "\n }"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: str | os.PathLike[str]) -> PermutationSpec:
    """Reads what :func:`write` wrote, what a person did, or what is shipped under a name."""
    file = Path(path)
    if not (file.is_file() or file.is_fifo()):
        named = shipped.path(os.fspath(path))
        if named is None:
            raise FileNotFoundError(
                f"nlm.symmetry: a specification is a file, or one of those that are shipped "
                f"({', '.join(shipped.MODELS)}), got {os.fspath(path)!r}"
            )
        path = file = named
    try:
        text = file.read_text()
        content = parse_yaml(text) if _is_yaml(path) else parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"nlm.symmetry: a specification is JSON or YAML, got {os.fspath(path)!r} "
            f"({' '.join(str(error).split())})"
        ) from error
    return from_mapping(content, repr(os.fspath(path)))


def _layouts(dims: Any) -> tuple[Layout, ...]:
    if isinstance(dims, str):
        raise ValueError(
            f"nlm.symmetry: a parameter has a list of one layout per dimension, got {dims!r}"
        )
    return tuple(_layout(layout) for layout in dims)


def _layout(text: Any) -> Layout:
    if type(text) not in (str, int):
        raise ValueError(f"a layout is a text or a number, got a {type(text).__name__}")
    return parse(str(text))


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise ValueError(f"a dimension is a whole number, got a {type(number).__name__}")
    return number


def _is_yaml(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix in {".yaml", ".yml"}


# --- for people -----------------------------------------------------------------------------------


def counted(number: int, noun: str, plural: str = "") -> str:
    """ "1 group", "2 groups"; "2 entries" where that plural is given."""
    shown = str(number) if number < 1 << 63 else f"at least 2^{number.bit_length() - 1}"
    return f"{shown} {noun if number == 1 else plural or f'{noun}s'}"


def headline(spec: PermutationSpec) -> str:
    """The numbers of groups and of independent permutations."""
    numbers = f"{counted(len(spec.free), 'group')}, "
    numbers += counted(spec.permutation_count, "permutation")
    if fixed := len(spec.groups) - len(spec.free):
        numbers += f", {counted(fixed, 'group')} that {'stays' if fixed == 1 else 'stay'} in order"
    return numbers


def table(spec: PermutationSpec) -> str:
    """The groups, the layout of every entry, and the proof."""
    lines = [headline(spec)]
    for group in spec.groups.values():
        parents = f" per {' x '.join(group.parents)}" if group.parents else ""
        fixed = " fixed" if group.fixed else ""
        lines.append(f"  {group.id:<6} {group.size:>6} units{parents}{fixed}  {group.origin}")
    width = max((len(name) for name in spec.params), default=0)
    for name, layouts in spec.params.items():
        lines.append(f"  {name:<{width}}  [{', '.join(map(str, layouts))}]")
    proof = spec.verified
    if proof is None or not spec.proven:
        lines.append("not verified")
    else:
        control = "" if proof.control is None else f", control {proof.control:.1e}"
        lines.append(f"verified in {proof.dtype}: error {proof.max_error:.1e}{control}")
    return "\n".join(lines)
