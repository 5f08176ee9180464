"""The options of weight matching."""

import pytest
import torch
from _networks import mlp, vectors

import nlm


def test_every_order_is_a_descent_and_restarts_keep_the_best():
    a, b = mlp(0), mlp(1)
    spec = nlm.trace(a, vectors(8))
    found = {
        order: nlm.align(a, b, spec, order=order, layerwise=False)
        for order in ("random", "forward", "backward", "alternating")
    }
    for result in found.values():
        objective = result.report.objective
        assert objective == sorted(objective) and objective[-1] > objective[0] + 1
        assert result.report.descents == [objective[-1]]
    first = {order: result.report.objective[1] for order, result in found.items()}
    assert first["forward"] == first["alternating"] != first["backward"]
    report = nlm.align(a, b, spec, restarts=3, layerwise=False).report
    assert (
        len(set(report.descents)) == 4
        and report.descents[0] == found["random"].report.objective[-1]
    )
    assert report.objective[-1] == max(report.descents)


def test_a_start_layer_by_layer_is_kept_where_it_leads_higher():
    """Of networks whose hidden layers are as wide as their input it mostly does."""
    gained = 0
    for seed in range(4):
        a, b = mlp(seed, 48, features=48), mlp(seed + 10, 48, features=48)
        spec = nlm.trace(a, vectors(4, features=48))
        for method in ("weights", "frank-wolfe"):
            once = nlm.align(a, b, spec, method, layerwise=False).report
            report = nlm.align(a, b, spec, method, layerwise=True).report
            assert report.descents[0] == once.objective[-1] and len(report.descents) == 2
            assert report.objective[-1] == max(report.descents)
            gained += method == "weights" and report.objective[-1] > 1.01 * once.objective[-1]
    assert gained >= 3


def test_a_start_layer_by_layer_finds_more_under_noise():
    a = mlp(0, 64, features=64).state_dict()
    spec = nlm.trace(mlp(0, 64, features=64), vectors(4, features=64))
    back = spec.inverse(spec.random(1))
    shares = {False: 0.0, True: 0.0, None: 0.0}
    for seed in range(3):
        generator = torch.Generator().manual_seed(1000 + seed)
        b = {
            name: x + 3 * x.std() * torch.randn(x.shape, generator=generator)
            for name, x in a.items()
        }
        for layerwise in shares:
            found = nlm.align(a, spec.apply(spec.random(1), b), spec, layerwise=layerwise)
            same = [(found.permutation[name] == back[name]).double().mean() for name in spec.free]
            shares[layerwise] += float(sum(same)) / len(same) / 3
    assert shares[True] > shares[False] + 0.1, shares  # 0.46 and 0.28
    assert shares[None] == shares[True]


def test_a_start_layer_by_layer_is_the_default_where_the_first_end_is_not_clear():
    a = mlp(0, 48, features=48).state_dict()
    spec = nlm.trace(mlp(0, 48, features=48), vectors(4, features=48))
    other = mlp(1, 48, features=48).state_dict()
    near = {name: x + 0.5 * x.std() * torch.randn_like(x) for name, x in a.items()}
    for b, descents in ((spec.apply(spec.random(1), near), 1), (other, 2)):
        report = nlm.align(a, b, spec).report
        assert (min(report.correlation.values()) >= 0.5) == (descents == 1)
        assert len(report.descents) == descents
        same = nlm.align(a, b, spec, layerwise=descents == 2)
        assert same.report.objective == report.objective
        assert same.report.correlation == report.correlation
    assert len(nlm.align(a, other, spec, "frank-wolfe").report.descents) == 1
    for strategy, descents in (("mean", 1), ("reference", 2)):
        [found] = nlm.align_many([a, other], spec, "weights", strategy).report.alignments
        assert len(found.descents) == descents


def test_normalised_contributions_do_not_depend_on_the_scale_of_an_entry():
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    spec = nlm.trace(mlp(0), vectors(8))
    result = nlm.align(a, b, spec, normalise=True)
    aligned = spec.apply(result.permutation, b)
    cosines = [
        float(torch.cosine_similarity(a[n].double().flatten(), aligned[n].double().flatten(), 0))
        for n in a
        if n != "4.bias"
    ]
    assert result.report.objective[-1] == pytest.approx(sum(cosines), rel=1e-9)
    scaled = {name: tensor * (64 if name == "2.weight" else 1) for name, tensor in a.items()}
    again = nlm.align(scaled, b, spec, normalise=True)
    assert all(torch.equal(p, result.permutation[g]) for g, p in again.permutation.items())
    assert again.report.correlation == pytest.approx(result.report.correlation)
    plain = nlm.align(scaled, b, spec)
    assert any(not torch.equal(p, result.permutation[g]) for g, p in plain.permutation.items())


def test_layerwise_is_one_of_three():
    spec = nlm.trace(mlp(0), vectors(8))
    with pytest.raises(ValueError, match="layerwise is True, False or None, got 'always'"):
        nlm.align(mlp(0), mlp(1), spec, layerwise="always")
