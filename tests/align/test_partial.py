"""Which units are merged: the right ones, within the budget the best choice, clusters."""

import copy
import itertools
import math

import pytest
import torch
from _networks import convnet, images, mlp, vectors

import nlm
from nlm.align import AlignmentResult, partial_matching, zip_matching
from nlm.merge import merge_partial
from nlm.symmetry import Widening


def aligned(method: str = "weights", build=mlp, inputs=vectors):
    """Two models, the second permuted with every third unit drawn anew, and their alignment."""
    a, b, other = build(0), build(0), build(7)
    x = inputs(256)
    spec = nlm.trace(a, x[:16])
    state, new = a.state_dict(), other.state_dict()
    for group, of in spec.groups.items():
        drawn = torch.arange(of.size) % 3 == 2
        for name, dim in spec.carriers(group):
            if dim == 0:  # where it is written
                rows = drawn.view(-1, *[1] * (state[name].dim() - 1))
                state[name] = torch.where(rows, new[name], state[name])
    b.load_state_dict(spec.apply(spec.random(3), state))
    widening = Widening.find(a, spec, x[:16])
    data = [x] if method == "activations" else None
    return a, b, spec, widening, nlm.align(a, b, spec, method, data=data)


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_the_units_that_both_models_have_are_merged(method):
    _, _, spec, widening, found = aligned(method)
    first = next(iter(spec.groups))  # what the second layer reads has changed everywhere
    size = spec.groups[first].size
    units = partial_matching(found, widening, share={first: 2 / 3})
    assert list(units) == [first]
    merged = units[first][1] < size
    assert torch.equal(merged, torch.arange(size) % 3 != 2)
    assert units[first][0].tolist() == list(range(size))
    assert units[first][1][~merged].tolist() == list(range(size, size + int((~merged).sum())))


def test_a_file_keeps_the_similarity_of_every_unit(tmp_path):
    _, _, spec, widening, found = aligned()
    for group, each in found.similarity.items():
        assert each.shape == (spec.groups[group].size,)
        assert float(each.mean()) == pytest.approx(found.report.correlation[group])
    found.save(tmp_path / "alignment.safetensors")
    again = AlignmentResult.load(tmp_path / "alignment.safetensors")
    assert set(again.permutation) == set(found.permutation)
    for share in (0.3, 0.6):
        before, after = (partial_matching(each, widening, share=share) for each in (found, again))
        assert all(torch.equal(before[group], after[group]) for group in before)


def lost(found: AlignmentResult, units: dict[str, torch.Tensor]) -> float:
    """The sum over the groups of the mean of 1 - similarity, of what is merged."""
    total = 0.0
    for group, (first, second) in units.items():
        similarity = found.similarity[group]
        total += float(((1 - similarity) * (first == second)).mean())
    return total


@pytest.mark.parametrize(("build", "inputs"), [(mlp, vectors), (convnet, images)])
def test_no_choice_within_the_budget_loses_less(build, inputs):
    *_, widening, found = aligned("activations", build, inputs)
    shares = [k / 4 for k in range(5)]
    groups = list(widening.written)
    choices = []
    for chosen in itertools.product(shares, repeat=len(groups)):
        units = partial_matching(found, widening, share=dict(zip(groups, chosen, strict=True)))
        choices.append((widening.growth(units), lost(found, units)))
    losses = []
    for budget in (1.0, 1.2, 1.7, 2.5, 4.0):
        units = partial_matching(found, widening, budget=budget, steps=4)
        best = min(loss for growth, loss in choices if growth <= budget * (1 + 1e-9))
        assert widening.growth(units) <= budget * (1 + 1e-6)
        assert lost(found, units) == pytest.approx(best, abs=1e-5)
        losses.append(lost(found, units))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-3 < losses[0]


def test_hidden_features_come_closer_with_the_budget():
    a, b, spec, widening, found = aligned("activations", convnet, images)
    second = copy.deepcopy(b)
    second.load_state_dict(spec.apply(found.permutation, b.state_dict()))
    x, distances = images(64, 5), []
    for budget in (1.0, 1.5, 2.0, 3.0, 4.0):
        units = partial_matching(found, widening, budget=budget)
        model = merge_partial({"a": a, "b": second}, widening, units, heads="10")
        total = 0.0
        for number, (task, one) in enumerate((("a", a), ("b", second))):
            wide = model.for_task(task)
            [group] = [g for g in units if ("8.weight", 0) in spec.carriers(g)]
            with torch.no_grad():
                features = wide[:10](x)[:, units[group][number]]
                total += float((features - one[:10](x)).norm())
        distances.append(total)
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-3 < distances[-2]


def test_zipping_merges_what_is_alike_in_one_model_or_two():
    narrow, x = mlp().double(), vectors(64).double()
    spec = nlm.trace(narrow, x[:16])
    widening = Widening.find(narrow, spec, x[:16])
    units = zip_matching([narrow, narrow], widening, [x])
    for group, index in units.items():
        live = widening.written[group] and index[0] == index[1]
        assert float(live.double().mean()) > 0.7  # units that never fire are alike to none
    other = mlp(3).double()
    apart = zip_matching([narrow, other], widening, [x], width=2.0)
    model = merge_partial({"a": narrow, "b": other}, widening, apart, heads="4")
    with torch.no_grad():
        torch.testing.assert_close(model(x, task="b"), other(x), rtol=1e-12, atol=1e-12)
        # each hidden unit twice over: half of the units are copies, and zipping finds them
        state = narrow.state_dict()
        twice = {
            group: torch.stack([torch.arange(of.size), torch.arange(of.size) + of.size])
            for group, of in spec.groups.items()
        }
        wide = widening.resize(
            narrow, {**state, **widening.apply({0: state, 1: state}, twice)}, twice
        )
        in_wide = Widening.find(wide, nlm.trace(wide, x[:16]), x[:16])
        half = zip_matching([wide], in_wide, [x], width=0.5)
        small = merge_partial({"a": wide}, in_wide, half).for_task("a")
        assert [module.weight.shape for module in small[::2]] == [
            module.weight.shape for module in narrow[::2]
        ]
        torch.testing.assert_close(small(x), narrow(x), rtol=1e-9, atol=1e-9)


def test_bad_calls_are_named():
    a, _, spec, widening, found = aligned()
    group = next(iter(widening.written))
    for options in ({}, {"share": 0.5, "budget": 2.0}):
        with pytest.raises(ValueError, match="one of share and budget is given, got share="):
            partial_matching(found, widening, **options)
    for share in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"lies in 0..1, got {share} for {group!r}"):
            partial_matching(found, widening, share={group: share})
    with pytest.raises(ValueError, match="a budget is at least the parameters of one model"):
        partial_matching(found, widening, budget=0.9)
    with pytest.raises(ValueError, match=r"can be widened are .*, got 'x' \(unknown\)"):
        partial_matching(found, widening, share={"x": 0.5})
    bare = AlignmentResult(found.permutation, found.report)
    with pytest.raises(ValueError, match="the similarity of every unit, got none for"):
        partial_matching(bare, widening, share=0.5)
    for width in (0.0, 2.5):
        with pytest.raises(ValueError, match=rf"at most the number of models \(2\), got {width}"):
            zip_matching([a, a], widening, [vectors()], width=width)
    assert partial_matching(found, Widening(spec), budget=2.0) == {}
