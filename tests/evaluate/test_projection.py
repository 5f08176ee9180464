"""Projections: like features lie close; what cannot be projected is refused."""

import copy
import sys

import pytest
import torch
from _networks import mlp, vectors

import nlm
from nlm.evaluate import projection


def test_like_features_lie_close() -> None:
    expert, other = mlp(0), mlp(1)
    data = [(vectors(30), torch.zeros(30)), (vectors(20, 1), torch.zeros(20))]
    models = {"same": copy.deepcopy(expert), "other": other}
    found = projection(models, expert, "2", data, perplexity=10, max_samples=40).places
    assert list(found) == ["expert", "same", "other"]
    places = {name: torch.tensor(each) for name, each in found.items()}
    assert all(each.shape == (40, 2) and each.isfinite().all() for each in places.values())
    distance = {name: (each - places["expert"]).norm(dim=1).mean() for name, each in places.items()}
    spread = (places["expert"][:, None] - places["expert"]).norm(dim=2).mean()
    assert distance["same"] < 0.1 * spread < distance["other"]


def test_a_task_reaches_the_merged_models_alone() -> None:
    experts = {"a": mlp(0), "b": mlp(1)}
    merged = nlm.merge(experts, method="linear", heads="4").model(mlp())
    found = projection({"merged": merged}, experts["a"], "2", [vectors(12)], task="a").places
    assert [len(each) for each in found.values()] == [12, 12]


def test_bad_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="names of their own, got 'expert'"):
        projection({"expert": model}, model, "2", [vectors()])
    with pytest.raises(ValueError, match=r"two or more samples .*, got \[1, 24\]"):
        projection({"merged": model}, model, "2", [vectors(1)])
    with pytest.raises(ValueError, match=r"got \[8, 12\], \[8, 24\]"):
        projection({"merged": mlp(width=12)}, model, "2", [vectors(8)])
    with pytest.raises(ValueError, match="activations are finite"):
        projection({"merged": model}, model, "2", [vectors(8) * float("nan")])
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn, got no such package: pip install"):
        projection({"merged": model}, model, "2", [vectors(8)])
