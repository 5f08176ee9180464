"""Blocks cover a parameter once; gathers follow parents wherever these stand."""

import pytest
import torch
from _structured import specification

from nlm.symmetry import parse
from nlm.symmetry.blocks import blocks

LAYOUTS = {
    "one group": (["g:6"], 1),
    "fixed": (["7", "3"], 1),
    "a grid": (["g:2 x 3", "h:4"], 1),
    "a sum": (["(g:2 + 3 + h:4)", "(g:2 + g:2)"], 6),
    "a sum in a product": (["g:2 x (r:3 x d:2 + d:2 + 1)", "4"], 3),
    "a family": (["s:3 x s<h:2 | h:2 | h:2> x s<d:2 | d:2 | e:2>", "4"], 3),
    "a selector on another dimension": (["4", "s<d:2 | (e:1 + 1)>", "s:2"], 3),
    "families in families": (["s:2 x s<t:2 x t<a:3 | b:3> | 6>"], 3),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_blocks_of_a_parameter_cover_it_once(case):
    texts, count = LAYOUTS[case]
    layouts = [parse(text) for text in texts]
    tensor = torch.zeros([layout.size for layout in layouts])
    found = blocks(layouts, tensor.shape)
    assert len(found) == count
    for block in found:
        view = block.view(tensor)
        assert view.shape == torch.Size([axis.size for axis in block.axes])
        view += 1
    assert torch.equal(tensor, torch.ones_like(tensor))


def test_a_view_follows_strides_and_offsets():
    tensor = torch.arange(240.0).reshape(4, 60).T[10:40, ::2]  # [30, 2]
    [block] = blocks([parse("g:5 x h:6"), parse("2")], tensor.shape)
    assert torch.equal(block.view(tensor), tensor.unflatten(0, (5, 6)))


def test_a_selector_that_stands_nowhere():
    layout = parse("s<a:2 | b:2>")
    assert blocks([layout], [2], partial=True) == []
    with pytest.raises(ValueError, match=r"got none with \['s'\] in \[s<a:2 | b:2>\]"):
        blocks([layout], [2])


@pytest.mark.parametrize(
    ("groups", "layouts"),
    [
        ("h:3 d:4<h", ["(h:3 x d:4 + 2 + h:3 x d:4)"]),
        ("s:2! h:3 d:4<h e:4<h", ["s:2 x s<h:3 | h:3> x s<d:4 | e:4>"]),
        ("s:2! h:3 d:4<h e:4<s", ["s:2", "s<h:3 x d:4 | h:3 x e:4>"]),
        ("s:2! t:2! d:4<s,t", ["s:2", "d:4 x t:2"]),
        ("g:2 r:3<g d:4<g,r e:2<g", ["g:2 x (r:3 x d:4 + e:2 + 1)", "2"]),
    ],
)
def test_a_gather_follows_each_position(groups, layouts):
    spec = specification(groups, {"w": layouts})
    p = spec.random(1)
    shape = [layout.size for layout in spec.params["w"]]
    state = torch.arange(torch.Size(shape).numel()).reshape(shape)
    moved = spec.apply(p, {"w": state})["w"]
    for block in blocks(spec.params["w"], shape):
        names = [axis.group for axis in block.axes]
        old, new = block.view(state), block.view(moved)
        for place in torch.cartesian_prod(*(torch.arange(size) for size in new.shape)).reshape(
            new.numel(), -1
        ):
            known = {**block.at, **dict(zip(names, place.tolist(), strict=True))}
            source = tuple(
                int(p[name][(*(known[other] for other in spec.groups[name].parents), index)])
                if name in spec.free
                else index
                for name, index in zip(names, place.tolist(), strict=True)
            )
            assert new[tuple(place)] == old[source]
