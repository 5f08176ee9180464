"""Several models by what their modules show: the factors are exact, planted orders come back."""

import copy
import itertools

import pytest
import torch
from _networks import mlp, vectors
from _structured import STRUCTURED
from torch import nn

import nlm
from nlm.align.pairs import correlate_all, factors
from nlm.symmetry.layout import Fixed

JOINT = ("mean", "universe")


def copies(model: nn.Module, spec, count: int, noise: float):
    """Copies with noise of so many standard deviations, permuted but for the first; the orders."""
    generator = torch.Generator().manual_seed(0)
    planted = [spec.identity(), *(spec.random(number) for number in range(1, count))]
    models = []
    for permutation in planted:
        state = {
            name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in model.state_dict().items()
        }
        models.append(copy.deepcopy(model))
        models[-1].load_state_dict(spec.apply(permutation, state))
    return models, planted


def is_identity(spec, permutation) -> bool:
    return all(torch.equal(permutation[group], index) for group, index in spec.identity().items())


@pytest.mark.parametrize("case", ["attention, fused as a sum", "grouped queries", "dense"])
def test_products_of_factors_are_the_correlations(case):
    torch.manual_seed(0)
    model, spec, inputs = STRUCTURED[case]()
    models, _ = copies(model.eval(), spec, 3, 0.5)
    seen = correlate_all(models, spec, [inputs])
    found = factors({pair: each.comparisons for pair, each in seen.items()}, 3)
    assert len(found) == len(seen[0, 1].comparisons) > 0
    for number, (layouts, tensors) in enumerate(found.values()):
        assert layouts == (seen[0, 1].comparisons[number].layouts[1], Fixed(3 * len(tensors[0])))
        for (one, two), each in seen.items():
            expected = each.comparisons[number].products()
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(
                tensors[one] @ tensors[two].T, expected, rtol=0, atol=1e-13 * len(expected) ** 2
            )


@pytest.mark.parametrize("strategy", JOINT)
@pytest.mark.parametrize("method", ["activations", "dual"])
@pytest.mark.parametrize("case", ["mlp", "attention, fused as a sum", "grouped queries"])
def test_planted_permutations_come_back(case, method, strategy):
    torch.manual_seed(0)
    if case == "mlp":
        model, inputs = mlp(), vectors(256)
        spec = nlm.trace(model, inputs[:8])
    else:
        model, spec, inputs = STRUCTURED[case]()
    models, planted = copies(model.eval(), spec, 3, 0.05)
    found = nlm.align_many(models, spec, method, strategy, data=[inputs])
    for number in range(3):
        assert is_identity(spec, spec.compose(planted[number], found.between(0, number)))
    report = found.report
    assert report.method == method and report.objective == sorted(report.objective)
    assert bool(report.relaxed) == (strategy == "universe")
    assert [each.method for each in report.alignments] == [method] * 2


@pytest.mark.parametrize("method", ["activations", "dual"])
def test_no_strategy_is_worse_than_the_reference(method):
    """Of models that have nothing in common; the objective is what is seen, summed anew."""
    models, data = [mlp(seed) for seed in range(4)], [vectors(256)]
    spec = nlm.trace(models[0], data[0][:8])
    ends = {}
    for strategy in JOINT:
        found = nlm.align_many(models, spec, method, strategy, data=data)
        objective = found.report.objective
        assert objective == sorted(objective)
        ends[strategy] = objective[-1]
        products = found.report.products
        pairs = list(itertools.combinations(range(4), 2))
        assert sum(products[m][n] for m, n in pairs) == pytest.approx(objective[-1], rel=1e-12)
        assert ends[strategy] > objective[1] > objective[0]
        if method == "activations":
            for one, two in pairs:
                aligned = copy.deepcopy(models[two])
                state = spec.apply(found.between(one, two), models[two].state_dict())
                aligned.load_state_dict(state)
                seen = correlate_all([models[one], aligned], spec, data)[0, 1].comparisons
                matched = sum(float(each.b.diagonal().sum()) for each in seen)
                assert products[one][two] == pytest.approx(matched, rel=1e-5)
            assert products[0][0] == 0.0
        else:
            state = models[0].state_dict()
            norms = sum(float(t.double().square().sum()) for n, t in state.items() if n != "4.bias")
            assert products[0][0] == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize("strategy", JOINT)
def test_what_no_module_shows_is_matched_by_weights(strategy):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(12, 24)), nn.Linear(24, 16)
            self.act, self.last = nn.ReLU(), nn.Linear(16, 5)

        def forward(self, x):
            return self.last(self.act(self.second(torch.relu(x @ self.first))))

    torch.manual_seed(0)
    spec = nlm.trace(model := Bare(), vectors(64))
    models, planted = copies(model, spec, 3, 0.1)
    found = nlm.align_many(models, spec, "activations", strategy, data=[vectors(256)])
    for number in range(3):
        assert is_identity(spec, spec.compose(planted[number], found.between(0, number)))
    [hidden] = [name for name, group in spec.groups.items() if group.size == 24]
    assert found.report.alignments[0].by_weights == [hidden]


def test_variants_hold_for_all_pairs():
    torch.manual_seed(0)
    model, spec, inputs = STRUCTURED["attention, fused as a sum"]()
    models, planted = copies(model.eval(), spec, 3, 0.05)
    found = nlm.align_many(models, spec, "activations", data=[inputs], heads="monotonic")
    still = spec.identity()
    for number in range(3):
        between = found.between(0, number)
        assert torch.equal(between["h"], still["h"])
        whole = spec.compose(planted[number], between)
        assert torch.equal(whole["f"], still["f"]) and set(between) == set(spec.groups)


def test_the_data_prove_the_specification():
    models = [mlp(seed) for seed in range(3)]
    spec = nlm.trace(models[0], vectors(8))
    spec.verified = None
    nlm.align_many(models, spec, "activations", "mean", data=[vectors(64)])
    assert spec.proven
