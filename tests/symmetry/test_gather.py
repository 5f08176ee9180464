"""Index arrays of random layouts against a naive loop over positions."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nlm.symmetry import AxisGroup, Family, Fixed, Layout, PermutationSpec, Product, Ref, Sum, parse
from nlm.symmetry.permutation import Permutation

#: A chain of parents (a > b > c), groups without, one that depends on a pinned one, a selector.
GROUPS = {
    "a": AxisGroup("a", 2),
    "b": AxisGroup("b", 3, ("a",)),
    "c": AxisGroup("c", 2, ("a", "b")),
    "p": AxisGroup("p", 2, fixed=True),
    "d": AxisGroup("d", 3, ("p",)),
    "e": AxisGroup("e", 4),
    "s": AxisGroup("s", 3, fixed=True),
}


def refs(*names: str) -> tuple[Ref, ...]:
    return tuple(Ref(name, GROUPS[name].size) for name in names)


@st.composite
def layouts(draw: st.DrawFn, here: frozenset[str] = frozenset(), depth: int = 2) -> Layout:
    """A layout in which every group's parents stand beside it, given those that stand around it."""
    options = ["e", "p", "ab", "abc", "pd", "fixed"]
    options += [name for name in "bcd" if set(GROUPS[name].parents) <= here]
    if depth:
        options += ["product", "sum", "sum"] + ["family"] * ("s" in here)
    choice = draw(st.sampled_from(options))
    if choice == "fixed":
        return Fixed(draw(st.integers(1, 4)))
    if choice == "sum":
        parts = draw(st.lists(layouts(here, depth - 1), min_size=2, max_size=3))
        return Sum(tuple(parts))
    if choice == "product":
        outer = draw(st.sampled_from([refs("p"), refs("a"), refs("s"), refs("a", "b")]))
        around = here | {ref.group for ref in outer}
        inner = draw(layouts(around, depth - 1))
        return Product((*outer, inner))
    if choice == "family":
        size = draw(st.sampled_from([2, 3]))
        ids = [name for name in GROUPS if GROUPS[name].size == size and name != "s"]
        ids = [name for name in ids if set(GROUPS[name].parents) <= here]
        members = st.sampled_from([*refs(*ids), Fixed(size)])
        return Family("s", tuple(draw(members) for _ in range(3)))
    return Product(refs(*choice)) if len(choice) > 1 else refs(choice)[0]


def old_position(
    layout: Layout, position: int, known: Mapping[str, int], permutation: Permutation
) -> int:
    """One position, by the definition: inner indices are looked up by the new index of parents."""
    if isinstance(layout, Fixed):
        return position
    if isinstance(layout, Ref):
        parents = tuple(known[parent] for parent in GROUPS[layout.group].parents)
        return int(permutation[layout.group][(*parents, position)])
    if isinstance(layout, Family):
        return old_position(layout.parts[known[layout.selector]], position, known, permutation)
    if isinstance(layout, Sum):
        for part in layout.parts:
            if position < part.size:
                break
            position -= part.size
        start = sum(p.size for p in itertools.takewhile(lambda p: p is not part, layout.parts))
        return start + old_position(part, position, {**known, **index_of(part, position, known)},
                                    permutation)  # fmt: skip
    known = {**known, **index_of(layout, position, known)}
    old = 0
    for part, local in zip(layout.parts, locals_of(layout, position), strict=True):
        old = old * part.size + old_position(part, local, known, permutation)
    return old


def locals_of(layout: Product, position: int) -> list[int]:
    found = []
    for part in reversed(layout.parts):
        position, local = divmod(position, part.size)
        found.append(local)
    return found[::-1]


def index_of(layout: Layout, position: int, known: Mapping[str, int]) -> dict[str, int]:
    if isinstance(layout, Ref):
        return {layout.group: position}
    if isinstance(layout, Product):
        found: dict[str, int] = {}
        for part, local in zip(layout.parts, locals_of(layout, position), strict=True):
            found = index_of(part, local, {**known, **found}) | found
        return found
    if isinstance(layout, Family) and layout.selector in known:
        return index_of(layout.parts[known[layout.selector]], position, known)
    return {}


def naive(tensor: Tensor, dims: tuple[Layout, ...], permutation: Permutation) -> Tensor:
    moved = torch.empty_like(tensor)
    for new in itertools.product(*map(range, tensor.shape)):
        everywhere: dict[str, int] = {}
        for layout, position in zip(dims, new, strict=True):
            everywhere = index_of(layout, position, everywhere) | everywhere
        old = []
        for layout, position in zip(dims, new, strict=True):
            own = index_of(layout, position, everywhere)
            old.append(old_position(layout, position, {**everywhere, **own}, permutation))
        moved[new] = tensor[tuple(old)]
    return moved


def permuted(dims: tuple[Layout, ...], seed: int, only: str | None = None) -> tuple[Tensor, Tensor]:
    """What the specification makes of a tensor of distinct entries, and what the loop does."""
    spec = PermutationSpec(dict(GROUPS), {"w": dims})
    permutation = spec.random(seed)
    if only is not None:
        permutation = spec.identity() | {only: permutation[only]}
    sizes = [layout.size for layout in dims]
    tensor = torch.arange(float(torch.Size(sizes).numel())).view(sizes)
    return spec.apply(permutation, {"w": tensor})["w"], naive(tensor, dims, permutation)


@settings(deadline=None, max_examples=150)
@given(layouts(), st.integers(0, 9))
def test_one_dimension(layout, seed):
    found, expected = permuted((layout,), seed)
    assert torch.equal(found, expected)
    assert sorted(found.tolist()) == list(range(found.numel()))


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(["a x b", "b x a", "s", "p x s", "s x a"]), st.data(), st.integers(0, 9))
def test_parents_and_selectors_on_another_dimension(outer, data, seed):
    names = outer.split(" x ")
    first = parse(" x ".join(str(*refs(name)) for name in names))
    second = data.draw(layouts(frozenset(names)))
    for dims in ((first, second), (second, first)):
        found, expected = permuted(dims, seed)
        assert torch.equal(found, expected)


@settings(deadline=None, max_examples=60)
@given(layouts(), st.sampled_from([name for name in GROUPS if not GROUPS[name].fixed]))
def test_one_group_alone(layout, group):
    found, expected = permuted((layout,), 1, group)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "text",
    [
        "a:2 x (b:3 x c:2 + b:3 + 8)",
        "(a:2 x b:3 + a:2 x 4 + e:4)",
        "s:3 x s<b:3 | 3 | d:3>",
        "s:3 x s<a:2 | a:2 | p:2> x s<b:3 | b:3 | d:3>",
        "p:2 x (d:3 + 1) x e:4",
    ],
)
def test_layouts_of_attention(text):
    layout = parse(text)
    if text.startswith("s:3 x s<b"):  # its parents stand on the first dimension
        found, expected = permuted((parse("a:2 x p:2"), layout), 3)
    else:
        found, expected = permuted((layout,), 3)
    assert torch.equal(found, expected)
    assert not torch.equal(found.flatten(), torch.arange(float(found.numel())))


def test_a_parent_that_stands_nowhere_is_named():
    with pytest.raises(ValueError, match=r"the index of 'a', on which axis 0 \(b:3\) depends"):
        permuted((parse("b:3"),), 0)
    with pytest.raises(ValueError, match="the parents of a group have an index wherever it stands"):
        permuted((parse("s:3 x s<a:2 | 2 | 2> x b:3"),), 0)
