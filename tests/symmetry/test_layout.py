"""The algebra of layouts and their text form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlm.symmetry import Family, Fixed, Product, Ref, Sum, parse
from nlm.symmetry.layout import pin, product, references

_leaves = st.one_of(
    st.builds(Fixed, st.integers(2, 9)),
    st.builds(Ref, st.sampled_from(["g0", "g1", "block.2"]), st.integers(1, 9)),
)
_layouts = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Sum(tuple(parts))),
        st.lists(inner, min_size=2, max_size=3)
        .map(lambda parts: product(*parts))
        .filter(lambda layout: isinstance(layout, Product)),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Family("s", tuple(parts))),
    ),
    max_leaves=6,
)


@given(_layouts)
def test_text_and_tree_are_inverse(layout):
    assert parse(str(layout)) == layout


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("g3:8 x g4:4 x g5:128", 4096),
        ("(g0:11008 + g0:11008)", 22016),
        ("3 x s<g1:12 | g2:12>", 36),
    ],
)
def test_sizes_of_the_documented_forms(text, size):
    assert parse(text).size == size
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "g0", "g0:", "(g0:3 +", "g0:3 x", "3 4", "g0:3)", "s<g0:1", "?"]
)
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(ValueError, match="a layout is written like"):
        parse(text)


def test_products_are_flat_and_join_fixed_factors():
    inner = product(Ref("g", 4), Fixed(2))
    assert product(inner, Fixed(3), Fixed(1)) == Product((Ref("g", 4), Fixed(6)))
    assert product(Fixed(1)) == Fixed(1)


def test_pinning_removes_a_group_everywhere():
    layout = parse("(g0:4 + g1:2 x 3)")
    assert str(pin(layout, {"g1"})) == "(g0:4 + 6)"
    assert pin(layout, {"g0", "g1"}) == Fixed(10)
    assert [ref.group for ref in references(layout)] == ["g0", "g1"]
