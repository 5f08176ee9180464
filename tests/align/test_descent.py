"""A fall of the objective, which only a fault can bring about, is an error."""

import pytest
from _networks import mlp, vectors

import nlm
from nlm.align.descent import Descent
from nlm.align.joint import Joint
from nlm.align.similarity import Comparison


def test_a_fall_of_the_objective_is_an_error(monkeypatch):
    spec = nlm.trace(mlp(0), vectors(8))
    monkeypatch.setattr(Comparison, "gain", lambda self, before, after, value: -1e-3 * self.scale)
    monkeypatch.setattr(Descent, "_gained", lambda self, gains: True)
    with pytest.raises(RuntimeError, match=r"nlm\.align: the objective never falls, got -?\d"):
        nlm.align(mlp(0), mlp(1), spec)


def test_the_objective_of_many_models_may_not_fall_either(monkeypatch):
    models = [mlp(seed) for seed in range(3)]
    spec = nlm.trace(models[0], vectors(8))
    improve = Joint.improve

    def worse(joint, *args):
        improve(joint, *args)
        joint.move([spec.random(number) for number in range(3)])
        return True

    monkeypatch.setattr(Joint, "improve", worse)
    with pytest.raises(RuntimeError, match=r"nlm\.align: the objective never falls, got -?\d"):
        nlm.align_many(models, spec, strategy="mean")
