"""Numbers by filters and gradients: the rules of mergekit 0.1.5, worked out by hand."""

import pytest

from nlm.recipe import Rule, Values
from nlm.recipe.values import depths, layers


@pytest.mark.parametrize(
    ("numbers", "depth", "expected"),
    [
        # n numbers: place = depth * (n - 1), a straight line between the two around it.
        ((0.5,), 0.3, 0.5),
        ((0.2, 0.4), 0.0, 0.2),
        ((0.2, 0.4), 1.0, 0.4),
        ((0.2, 0.4), 0.25, 0.25),
        ((1.0, 0.7, 0.1), 1 / 3, 0.8),  # place 2/3: 1/3 of 1.0 and 2/3 of 0.7
        ((1.0, 0.7, 0.1), 2 / 3, 0.5),  # place 4/3: 2/3 of 0.7 and 1/3 of 0.1
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.5, 0.3),
        ((0.0, 0.5, 0.3, 0.7, 1.0), None, 0.0),  # embeddings and heads: depth 0
    ],
)
def test_a_gradient(numbers, depth, expected):
    assert Values.of(*numbers).at("a.weight", depth) == pytest.approx(expected, rel=1e-15)


def test_the_first_rule_that_fits_counts():
    attention, mlp, rest = Rule("self_attn", (0.0, 1.0)), Rule("mlp", (0.3,)), Rule(None, (0.5,))
    values = Values((attention, mlp, rest))
    assert values.at("layers.1.self_attn.q.weight", 0.25) == 0.25
    assert values.at("layers.1.mlp.up.weight", 0.25) == 0.3
    assert values.at("layers.1.norm.weight", 0.25) == 0.5
    assert Values((rest, mlp)).at("layers.1.mlp.up.weight", 0.25) == 0.5
    assert values.parts == ("self_attn", "mlp")


def test_where_no_rule_fits_the_next_values_count():
    own, all_of_them = Values((Rule("mlp", (0.3,)),)), Values.of(0.5)
    assert own.at("norm.weight") is None
    assert (own + all_of_them).at("norm.weight") == 0.5
    assert (own + all_of_them).at("mlp.weight") == 0.3


def test_layers_are_those_of_the_first_number():
    names = [
        "model.embed.weight", "model.layers.0.mlp.experts.7.weight", "model.layers.2.norm.weight",
        "encoder.block.0.layer.1.weight", "lm_head.weight", "layer1.0.conv1.weight",
        "visual.1.weight", "visual.5.weight",
    ]  # fmt: skip
    assert layers(names) == {
        "model.layers.0.mlp.experts.7.weight": (0, 3), "model.layers.2.norm.weight": (2, 3),
        "encoder.block.0.layer.1.weight": (0, 1), "layer1.0.conv1.weight": (0, 1),
        "visual.1.weight": (1, 6), "visual.5.weight": (5, 6),
    }  # fmt: skip
    assert depths(names) == {
        "model.layers.0.mlp.experts.7.weight": 0.0, "model.layers.2.norm.weight": 1.0,
        "encoder.block.0.layer.1.weight": 1.0,  # the only layer, as mergekit has it
        "layer1.0.conv1.weight": 1.0, "visual.1.weight": 0.2, "visual.5.weight": 1.0,
    }  # fmt: skip


def test_a_number_of_a_layer_of_any_length():
    assert depths(["h.0.w", "h.1.w", f"h.{'9' * 5000}.w"]) == {"h.0.w": 0.0, "h.1.w": 1.0}
