"""Layout: how axis groups make up one dimension of a parameter.

A dimension of size n is a tree. Its leaves are axis groups and fixed (never permuted) stretches,
its nodes say how they are put together, always row-major:

====================  =======================  ================================================
node                  text                     the dimension is
====================  =======================  ================================================
``Ref(group, size)``  ``g3:8``                 one axis group
``Fixed(size)``       ``25``                   positions that stay where they are
``Product(parts)``    ``g3:8 x g4:4 x 128``    a grid of its parts, the last one running fastest
``Sum(parts)``        ``(g0:64 + g1:64)``      its parts, one after the other
``Family(s, parts)``  ``s<g1:64 | g2:64>``     ``parts[k]`` where the index of group ``s`` is k
====================  =======================  ================================================

``str(layout)`` and ``parse(text)`` are inverse to each other.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Ref:
    """One axis ``group``, by its id, of ``size`` units."""

    group: str
    size: int

    def __str__(self) -> str:
        return f"{self.group}:{self.size}"


@dataclass(frozen=True)
class Fixed:
    """``size`` positions that no permutation moves."""

    size: int

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Product:
    """A row-major grid of ``parts``."""

    parts: tuple["Layout", ...]

    @property
    def size(self) -> int:
        """How many positions the grid has."""
        return math.prod(part.size for part in self.parts)

    def __str__(self) -> str:
        return " x ".join(str(part) for part in self.parts)


@dataclass(frozen=True)
class Sum:
    """``parts`` laid one after the other."""

    parts: tuple["Layout", ...]

    @property
    def size(self) -> int:
        """How many positions the parts have together."""
        return sum(part.size for part in self.parts)

    def __str__(self) -> str:
        return f"({' + '.join(str(part) for part in self.parts)})"


@dataclass(frozen=True)
class Family:
    """``parts[k]`` where the group ``selector``, another factor of the parameter, stands at k."""

    selector: str
    parts: tuple["Layout", ...]

    @property
    def size(self) -> int:
        """How many positions a part has: all have as many."""
        return self.parts[0].size

    def __str__(self) -> str:
        return f"{self.selector}<{' | '.join(str(part) for part in self.parts)}>"


Layout = Ref | Fixed | Product | Sum | Family


def product(*parts: Layout) -> Layout:
    """The product of parts in normal form: flat, no factor 1, neighbouring fixed factors joined."""
    flat: list[Layout] = []
    for part in parts:
        for factor in part.parts if isinstance(part, Product) else (part,):
            if isinstance(factor, Fixed) and factor.size == 1:
                continue
            if isinstance(factor, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size * factor.size)
            else:
                flat.append(factor)
    if not flat:
        return Fixed(1)
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def references(layout: Layout) -> Iterator[Ref]:
    """Every reference to a group, in order."""
    if isinstance(layout, Ref):
        yield layout
    elif not isinstance(layout, Fixed):
        for part in layout.parts:
            yield from references(part)


def selectors(layout: Layout) -> Iterator[str]:
    """The groups whose index selects among the parts of a family."""
    if not isinstance(layout, (Ref, Fixed)):
        if isinstance(layout, Family):
            yield layout.selector
        for part in layout.parts:
            yield from selectors(part)


def pin(layout: Layout, groups: set[str]) -> Layout:
    """The layout with the given groups made fixed."""
    if isinstance(layout, Ref):
        return Fixed(layout.size) if layout.group in groups else layout
    if isinstance(layout, Product):
        return product(*(pin(part, groups) for part in layout.parts))
    if isinstance(layout, Sum):
        parts = tuple(pin(part, groups) for part in layout.parts)
        if all(isinstance(part, Fixed) for part in parts):
            return Fixed(sum(part.size for part in parts))
        return Sum(parts)
    if isinstance(layout, Family):
        return Family(layout.selector, tuple(pin(part, groups) for part in layout.parts))
    return layout


_NAME = r"[A-Za-z_][\w.\-]*"
_TOKEN = re.compile(rf"\s*({_NAME}|\d+|[:()<>|+])")
_DEEPEST = 50  # brackets within each other


def is_name(text: str) -> bool:
    """Whether a group can be called so in the text of a layout."""
    return re.fullmatch(_NAME, text) is not None


def parse(text: str) -> Layout:
    """The layout that a compact text stands for.

    Raises
    ------
    ValueError
        The text is no layout; the message holds the text and the place.
    """
    tokens: list[str] = []
    position, depth, end = 0, 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise _not_a_layout(text, text[position:])
        tokens.append(match.group(1))
        position = match.end()
        depth += (tokens[-1] in "(<") - (tokens[-1] in ")>")
        if depth > _DEEPEST:
            raise ValueError(
                f"nlm.symmetry: a layout has at most {_DEEPEST} brackets within each other, got "
                f"more in {text[:40]!r}..."
            )
    tokens.reverse()
    layout = _parse_product(tokens, text)
    if tokens:
        raise _not_a_layout(text, tokens[-1])
    return layout


def _parse_product(tokens: list[str], text: str) -> Layout:
    factors = [_parse_factor(tokens, text)]
    while tokens and tokens[-1] == "x":
        tokens.pop()
        factors.append(_parse_factor(tokens, text))
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _parse_factor(tokens: list[str], text: str) -> Layout:
    token = _pop(tokens, text)
    if token.isdigit():
        return Fixed(int(token))
    if token == "(":
        parts = _parse_parts(tokens, text, "+", ")")
        return parts[0] if len(parts) == 1 else Sum(parts)
    if not (token[0].isalpha() or token[0] == "_"):
        raise _not_a_layout(text, token)
    follower = _pop(tokens, text)
    if follower == "<":
        return Family(token, _parse_parts(tokens, text, "|", ">"))
    size = _pop(tokens, text)
    if follower != ":" or not size.isdigit():
        raise _not_a_layout(text, token)
    return Ref(token, int(size))


def _parse_parts(tokens: list[str], text: str, separator: str, end: str) -> tuple[Layout, ...]:
    parts = [_parse_product(tokens, text)]
    while (token := _pop(tokens, text)) == separator:
        parts.append(_parse_product(tokens, text))
    if token != end:
        raise _not_a_layout(text, token)
    return tuple(parts)


def _pop(tokens: list[str], text: str) -> str:
    if not tokens:
        raise _not_a_layout(text, "its end")
    return tokens.pop()


def _not_a_layout(text: str, place: str) -> ValueError:
    return ValueError(
        f"nlm.symmetry: a layout is written like 'g0:8 x (g1:4 + 12)', got {text!r} at {place!r}"
    )
