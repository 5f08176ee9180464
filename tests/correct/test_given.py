"""What is no model, no data or no point is refused in one sentence that names it."""

import pytest
import torch
from _networks import mlp, vectors

import nlm
from nlm.correct import DataFree, LeastSquares, LowRank, calibration_size, expert_moments

OWN = {"a": mlp(1), "b": mlp(2)}
DATA = {task: [vectors(20)] for task in OWN}
STATES = {task: expert.state_dict() for task, expert in OWN.items()}
FITS = [
    nlm.Tact.fit, nlm.Repair.fit, LeastSquares.fit, LowRank.fit, nlm.refit, calibration_size,
]  # fmt: skip
NAMES = ["tact", "repair", "least squares", "low rank", "refit", "calibration size"]


@pytest.mark.parametrize("fit", FITS, ids=NAMES)
def test_models_and_data_of_other_kinds(fit):
    with pytest.raises(TypeError, match=r"nlm.*: the expert of 'a' is a module, got OrderedDict"):
        fit(mlp(0), STATES, DATA)
    with pytest.raises(TypeError, match=r"nlm.*: (a|the) merged model is a module, got Ord"):
        fit(mlp(0).state_dict(), OWN, DATA)
    with pytest.raises(TypeError, match=r"nlm.*: experts are given by task, got list"):
        fit(mlp(0), list(OWN.values()), DATA)
    with pytest.raises(TypeError, match=r"nlm.*: max_samples is an integer, or None, got 'x'"):
        fit(mlp(0), OWN, DATA, max_samples="x")


def test_experts_in_a_module_of_modules():
    tact = nlm.Tact.fit(mlp(0), torch.nn.ModuleDict(OWN), DATA)
    assert tuple(tact.tasks) == ("a", "b")


def test_other_entrances():
    with pytest.raises(TypeError, match=r"nlm\.DataFree: the expert of 'a' is a module, got Order"):
        DataFree.fit(mlp(0), STATES)
    with pytest.raises(TypeError, match="the merged model is a module, got OrderedDict"):
        expert_moments(STATES, DATA)
    with pytest.raises(TypeError, match=r"nlm\.Tact: data is given by task, got list"):
        nlm.Tact.fit(mlp(0), OWN, [vectors(20)])
    with pytest.raises(TypeError, match=r"a micro-batch's size is an integer, or None, got 2\.5"):
        nlm.Tact.fit(mlp(0), OWN, DATA, micro_batch=2.5)
    with pytest.raises(
        TypeError, match=r"nlm\.refit: select is True, False or a Selection, got 'x'"
    ):
        nlm.refit(mlp(0), OWN, [vectors(20)], select="x")
    with pytest.raises(TypeError, match="patterns of names are strings, got 5"):
        nlm.refit(mlp(0), OWN, [vectors(20)], points=5)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (5, "points are a kind or names of modules, got 5"),
        ([0], r"points are a kind or names of modules, got \[0\]"),
        ({"0": "x"}, "a channel dimension is an integer, got 'x'"),
    ],
)
def test_points_of_other_kinds(points, message):
    with pytest.raises(TypeError, match=f"nlm.correct: {message}"):
        nlm.Tact.fit(mlp(0), OWN, DATA, points=points)
