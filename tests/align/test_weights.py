"""The options of weight matching."""

import pytest
import torch
from _networks import mlp, vectors

import nlm


def test_every_order_is_a_descent_and_restarts_keep_the_best():
    a, b = mlp(0), mlp(1)
    spec = nlm.trace(a, vectors(8))
    found = {
        order: nlm.align(a, b, spec, order=order)
        for order in ("random", "forward", "backward", "alternating")
    }
    for result in found.values():
        objective = result.report.objective
        assert objective == sorted(objective) and objective[-1] > objective[0] + 1
        assert result.report.descents == [objective[-1]]
    first = {order: result.report.objective[1] for order, result in found.items()}
    assert first["forward"] == first["alternating"] != first["backward"]
    report = nlm.align(a, b, spec, restarts=3).report
    assert (
        len(set(report.descents)) == 4
        and report.descents[0] == found["random"].report.objective[-1]
    )
    assert report.objective[-1] == max(report.descents)


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
