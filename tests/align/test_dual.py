"""Weights and activations at the same time: on one scale, in one objective that never falls."""

import copy

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from _structured import STRUCTURED
from torch import nn

import nlm
from nlm.align.scale import on_one_scale
from nlm.align.seen import correlate
from nlm.align.similarity import Comparison


def planted(model: nn.Module, spec, noise: float, seed: int):
    """A permuted copy with noise of so many standard deviations on each tensor."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    permutation = spec.random(seed)
    state = {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    other.load_state_dict(spec.apply(permutation, state))
    return other, permutation


def share_in_place(spec, planted_permutation, found) -> float:
    whole = spec.compose(planted_permutation, found)
    still = spec.identity()
    right = sum(int((whole[group] == still[group]).sum()) for group in spec.groups)
    return right / sum(index.numel() for index in still.values())


def test_a_permutation_comes_back_where_neither_space_alone_tells():
    torch.manual_seed(0)
    model, spec, inputs = STRUCTURED["attention, fused as a sum"]()
    spec.verify(model.eval(), inputs[:8])
    found = dict.fromkeys(("weights", "activations", "dual"), 0.0)
    for seed in range(4):
        other, permutation = planted(model, spec, 1.4, seed)
        for method in found:
            given = None if method == "weights" else [inputs]
            result = nlm.align(model, other, spec, method, data=given, seed=seed, layerwise=False)
            found[method] += share_in_place(spec, permutation, result.permutation) / 4
    assert found["dual"] > 0.95 > 0.7 > max(found["weights"], found["activations"])


@pytest.mark.parametrize("case", ["convnet", "attention, fused as a family", "experts"])
def test_a_share_of_nothing_is_weight_matching_bit_for_bit(case):
    if case == "convnet":
        model, other, inputs = convnet(0), convnet(1), images(64)
        spec = nlm.trace(model, inputs[:8])
    else:
        torch.manual_seed(0)
        model, spec, inputs = STRUCTURED[case]()
        other = STRUCTURED[case]()[0].eval()
        spec.verify(model.eval(), inputs[:8])
    options = {"order": "alternating", "restarts": 1}
    both = nlm.align(model, other, spec, "dual", data=[inputs], dual=0.0, **options)
    alone = nlm.align(model, other, spec, "weights", **options)
    assert all(torch.equal(both.permutation[g], p) for g, p in alone.permutation.items())
    assert both.report.objective == alone.report.objective
    assert both.report.correlation == alone.report.correlation


@pytest.mark.parametrize("case", STRUCTURED)
def test_the_objective_never_falls_and_reports_both(case):
    """Of models that have nothing in common."""
    torch.manual_seed(0)
    model, spec, inputs = STRUCTURED[case]()
    other = STRUCTURED[case]()[0].eval()
    spec.verify(model.eval(), inputs[:8])
    found = {d: nlm.align(model, other, spec, "dual", data=[inputs], dual=d) for d in (0.1, 0.9)}
    for result in found.values():
        report = result.report
        assert report.method == "dual" and report.objective == sorted(report.objective)
        assert report.objective[-1] > report.objective[0]
        assert set(report.samples) == set(report.correlation) == set(spec.free)
    ends = {}
    for dual, result in found.items():
        aligned = copy.deepcopy(other)
        aligned.load_state_dict(spec.apply(result.permutation, other.state_dict()))
        stay = correlate(model, aligned, spec, [inputs])
        ends[dual] = sum(float(each.b.diagonal().sum()) for each in stay.comparisons)
    assert ends[0.9] > ends[0.1]


def test_both_spaces_have_one_scale():
    """The similarities of unrelated weights deviate as much as the scaled correlations do."""
    a, b, inputs = mlp(0, width=128), mlp(1, width=128), vectors(512)
    spec = nlm.trace(a, inputs[:8])
    states = [dict(model.state_dict()) for model in (a, b)]
    for state in states:
        state["0.bias"] = 1 + 0.01 * state["0.bias"]  # what all units share tells nothing
    comparisons = [Comparison(states[0][n], states[1][n], of) for n, of in spec.params.items()]
    scaled = on_one_scale(comparisons, correlate(a, b, spec, [inputs]), spec.groups, 0.75)
    similarities = {}
    for first, second in zip((0, 2), (2, 4), strict=True):
        rows, columns = f"{first}.weight", f"{second}.weight"
        bias = f"{first}.bias"
        similarities[f"g{first // 2}"] = (
            states[0][rows] @ states[1][rows].T
            + torch.outer(states[0][bias], states[1][bias])
            + states[0][columns].T @ states[1][columns]
        )

    def deviation(matrix):
        centred = matrix - matrix.mean(0)
        return float((centred - centred.mean(1, keepdim=True)).square().mean().sqrt())

    for each in scaled:
        similarity = similarities[each.layouts[1].group]
        assert deviation(each.products()) == pytest.approx(3 * deviation(similarity), rel=0.1)


def test_what_no_module_shows_is_matched_by_weights():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(12, 24)), nn.Linear(24, 16)
            self.act, self.last = nn.ReLU(), nn.Linear(16, 5)

        def forward(self, x):
            return self.last(self.act(self.second(torch.relu(x @ self.first))))

    torch.manual_seed(0)
    model = Bare()
    spec = nlm.trace(model, vectors(64))
    other, permutation = planted(model, spec, 0.1, 3)
    result = nlm.align(model, other, spec, "dual", data=[vectors(256)])
    assert share_in_place(spec, permutation, result.permutation) == 1.0
    [hidden] = [name for name, group in spec.groups.items() if group.size == 24]
    assert result.report.by_weights == [hidden] and hidden not in result.report.samples


def test_progress_tells_of_batches_and_then_of_both_descents():
    a, b = mlp(0), mlp(1)
    spec, seen = nlm.trace(a, vectors(8)), []
    result = nlm.align(
        a, b, spec, "dual", data=[vectors(32), vectors(32, 1)], progress=lambda *of: seen.append(of)
    )
    assert [number for number, _ in seen[:2]] == [1, 2] and 0 < seen[0][1] < seen[1][1]
    values = [value for _, value in seen[2:]]
    assert len(result.report.descents) == 2 and set(result.report.objective[1:]) <= set(values)


@pytest.mark.parametrize("dual", [1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(dual):
    a, b = mlp(0), mlp(1)
    with pytest.raises(ValueError, match=f"at least 0 and less than 1, got {dual}"):
        nlm.align(a, b, nlm.trace(a, vectors(8)), "dual", data=[vectors(8)], dual=dual)
