"""Planted permutations come back; the reports say how; bad input is named."""

import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

import nlm
from nlm.align import AlignmentResult
from nlm.statistics import collect_moments


def planted(model, spec, noise: float, seed: int):
    """A copy of a model with noise of so many standard deviations on each tensor, permuted."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    permutation = spec.random(seed)
    return spec.apply(permutation, state), permutation


def recovered(spec, planted_permutation, found) -> float:
    """The share of units that are back in their place."""
    whole = spec.compose(planted_permutation, found)
    right = sum(int((whole[g] == torch.arange(len(whole[g]))).sum()) for g in spec.groups)
    return right / sum(group.size for group in spec.groups.values())


def wide_mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("noise", "least"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (2.0, 0.08)])
def test_the_recovery_curve(noise, least):
    model = wide_mlp(0)
    spec = nlm.trace(model, torch.randn(16, 20))
    shares = []
    for seed in range(10):
        state, permutation = planted(model, spec, noise, seed)
        result = nlm.align(model, state, spec, seed=seed)
        shares.append(recovered(spec, permutation, result.permutation))
    assert sum(shares) / len(shares) >= least


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_an_exact_copy_of_a_convnet_comes_back(method):
    model, copy = convnet(), convnet()
    spec = nlm.trace(model, images())
    permutation = spec.random(3)
    copy.load_state_dict(spec.apply(permutation, model.state_dict()))
    data = [images(128)] if method == "activations" else None
    result = nlm.align(model, copy, spec, method, data=data)
    if method == "weights":
        aligned = spec.apply(result.permutation, copy.state_dict())
        assert all(torch.equal(aligned[n], tensor) for n, tensor in model.state_dict().items())
    moments = collect_moments(model, {"3": 1, "6": 1, "9": -1}, [images(128)])
    whole = spec.compose(permutation, result.permutation)
    for group, site in spec.observation_sites().items():
        fires = moments[site].variance > 0  # a unit that never fires correlates with nothing
        assert fires.sum() >= 8
        assert torch.equal(whole[group][fires], torch.arange(len(fires))[fires])


def test_the_objective_never_falls_and_is_reported():
    a, b = wide_mlp(0), wide_mlp(1)
    spec = nlm.trace(a, torch.randn(16, 20))
    seen = []
    result = nlm.align(
        a, b, spec, layerwise=False, progress=lambda sweep, value: seen.append((sweep, value))
    )
    report = result.report
    assert report.method == "weights" and report.seconds > 0
    assert set(report.correlation) == set(spec.groups)
    assert report.objective == sorted(report.objective)
    assert [value for _, value in seen] == report.objective[1:]
    aligned = spec.apply(result.permutation, b.state_dict())
    product = sum(
        float((tensor.double() * aligned[name].double()).sum())
        for name, tensor in a.state_dict().items()
        if name != "6.bias"  # no group stands on it
    )
    assert product == pytest.approx(report.objective[-1], rel=1e-12)


def test_the_same_seed_gives_the_same_permutation():
    a, b = wide_mlp(0), wide_mlp(1)
    spec = nlm.trace(a, torch.randn(16, 20))
    first, again = (nlm.align(a, b, spec, seed=5).permutation for _ in range(2))
    assert all(torch.equal(first[g], again[g]) for g in spec.groups)


def test_progress_can_cancel():
    a, b = wide_mlp(0), wide_mlp(1)
    spec = nlm.trace(a, torch.randn(16, 20))

    def stop(sweep, objective):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nlm.align(a, b, spec, progress=stop)


def test_running_statistics_are_no_part_of_the_cost():
    a, b = convnet(0), convnet(1)
    spec = nlm.trace(a, images())
    plain = nlm.align(a, b, spec).permutation
    for model in (a, b):
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(1, 1e4)
    again = nlm.align(a, b, spec).permutation
    assert all(torch.equal(plain[group], again[group]) for group in plain)


def test_biases_are_matched_as_vectors():
    a = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    spec = nlm.trace(a, torch.randn(32, 2) * 4)
    state = {name: torch.zeros_like(tensor) for name, tensor in a.state_dict().items()}
    state["0.bias"] = torch.arange(6.0)
    permutation = spec.random(0)
    result = nlm.align(state, spec.apply(permutation, state), spec)
    assert recovered(spec, permutation, result.permutation) == 1.0


class Quadratic(nn.Module):
    """sum_ij v_i tanh(x w_ij) v_j: the units of ``p`` stand on both axes of w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.v = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return torch.einsum("i,nij,j->n", self.v, torch.tanh(x[:, None, None] * self.w), self.v)


def test_a_group_on_two_axes_of_one_parameter_never_loses():
    model = Quadratic()
    table = {"w": ("p", "p"), "v": ("p",)}
    spec = nlm.PermutationSpec.from_axes_to_perm(table, model.state_dict())
    spec.verify(model, torch.randn(16))
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        a, b = (
            {"w": torch.randn(8, 8, generator=generator), "v": torch.zeros(8)} for _ in range(2)
        )
        objective = nlm.align(a, b, spec, seed=seed).report.objective
        assert objective == sorted(objective)


def test_heads_of_other_classes_are_left_out():
    a, b = mlp(0, classes=5), mlp(1, classes=7)
    spec = nlm.trace(a, vectors(8))
    assert nlm.align(a, b, spec).report.excluded == ["4.weight"]
    assert nlm.align(a, mlp(1), spec).report.excluded == []
    assert nlm.align(a, mlp(1), spec, exclude=("4",)).report.excluded == ["4.weight"]


def test_units_are_matched_with_their_sign():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        other[0].weight[0], other[0].bias[0] = -model[0].weight[0], -model[0].bias[0]
    x = torch.randn(256, 3)
    spec = nlm.trace(model, x)
    result = nlm.align(model, other, spec, "activations", data=[x])
    assert result.report.objective[0] == pytest.approx(4 * result.report.correlation["g0"])
    assert result.report.samples == {"g0": 256}


def test_files(tmp_path):
    a, b = mlp(0), mlp(1)
    result = nlm.align(a, b, nlm.trace(a, vectors(8)))
    result.save(tmp_path / "p.safetensors")
    again = AlignmentResult.load(tmp_path / "p.safetensors")
    assert again.report == result.report
    assert all(torch.equal(again.permutation[g], result.permutation[g]) for g in again.permutation)


def _poisoned(value):
    model = mlp(1)
    with torch.no_grad():
        model[0].weight[0, 0] = value
    return model


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (mlp(1, width=16), ValueError, r"must have the shape of its layout .* got \[16, 12\]"),
        (convnet(), ValueError, "a state dict has the entries of its specification, got missing"),
        (
            _poisoned(float("nan")),
            ValueError,
            "weights are finite, got 1 NaN or inf of 288 in '0.weight' of 'model_b'",
        ),
        (_poisoned(float("inf")), ValueError, "weights are finite"),
        (
            {name: tensor.to(torch.complex64) for name, tensor in mlp(1).state_dict().items()},
            TypeError,
            "weights are real floating-point numbers, got torch.complex64",
        ),
        (
            {name: tensor.to(torch.int8) for name, tensor in mlp(1).state_dict().items()},
            TypeError,
            "got torch.int8 for '0.weight'",
        ),
    ],
)
def test_bad_models(other, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        nlm.align(model, other, nlm.trace(model, vectors(8)))


def test_bad_calls():
    a, b = mlp(0), mlp(1)
    spec = nlm.trace(a, vectors(8))
    with pytest.raises(ValueError, match="orthogonal, got 'magic'"):
        nlm.align(a, b, spec, "magic")
    with pytest.raises(ValueError, match=r"the order is one of random, .*, got 'magic'"):
        nlm.align(a, b, spec, order="magic")
    with pytest.raises(ValueError, match="the number of restarts is at least 0, got -1"):
        nlm.align(a, b, spec, restarts=-1)
    with pytest.raises(ValueError, match="the method 'activations' needs two modules and data"):
        nlm.align(a, b, spec, "activations")
    with pytest.raises(ValueError, match="holds at least one sample"):
        nlm.align(a, b, spec, "activations", data=[])
    with pytest.raises(ValueError, match="needs at least two positions, got 1"):
        nlm.align(a, b, spec, "activations", data=[vectors(1)])
    with pytest.raises(ValueError, match="observed where it stands"):
        nlm.align(a, b, spec, "activations", data=[vectors(8)], observe={"g0": "4"})
    with pytest.raises(ValueError, match=r"what is observed are groups .* got 'g7'"):
        nlm.align(a, b, spec, "activations", data=[vectors(8)], observe={"g7": "1"})
    with pytest.raises(ValueError, match=r"a dimension of its size, got \[5, 5\] for 'g0' of 24"):
        nlm.align(a, b, spec, "activations", data=[vectors(8)], observe={"g0": ("4", 1)})
    with pytest.raises(ValueError, match=r"observed on one dimension, got 1 and 0 of '1'"):
        observe = {"g0": ("1", 1), "g1": ("1", 0)}
        nlm.align(a, b, spec, "activations", data=[vectors(24)], observe=observe)
    with pytest.raises(ValueError, match="prove a specification on a module, got OrderedDict"):
        nlm.align(a.state_dict(), b.state_dict(), spec, example_inputs=vectors(8))


def test_a_changed_specification_is_not_matched_with():
    a, b = mlp(0), mlp(1)
    spec = nlm.trace(a, vectors(8))
    spec.params["2.weight"] = spec.params["2.weight"][:1] + spec.params["0.weight"][:1]
    nlm.align(a, b, spec)  # the same layouts again
    spec.params["2.weight"] = spec.params["2.weight"][1:] + spec.params["2.weight"][:1]
    with pytest.raises(nlm.SymmetryError, match="got one that is changed since it was verified"):
        nlm.align(a, b, spec)


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_the_proof_is_repeated_on_the_model_at_hand(method):
    class Ramp(nn.Sequential):
        def forward(self, x):
            first = self[1](self[0](x))
            return self[4](self[3](self[2](first * torch.arange(24.0, dtype=x.dtype))))

    spec = nlm.trace(mlp(), vectors(8))
    a, b = Ramp(*mlp(0)), Ramp(*mlp(1))
    with pytest.raises(nlm.SymmetryError, match="group 'g0'"):
        nlm.align(a, b, spec, method, data=[vectors(64)])


def test_data_proves_a_table_and_observe_places_it():
    a, b = mlp(0), mlp(0, classes=7)  # the same but for the head
    spec = nlm.PermutationSpec.from_axes_to_perm(
        nlm.trace(a, vectors(8)).to_axes_to_perm(), a.state_dict()
    )
    permutation = spec.random(3)
    b.load_state_dict(spec.apply(permutation, b.state_dict()))
    batches = [{"input": vectors(256)}]
    with pytest.raises(ValueError, match=r"or at observe=.*got no module for 'g0' at None"):
        nlm.align(a, b, spec, "activations", data=batches)
    spec.verified = None
    result = nlm.align(
        a, b, spec, "activations", data=batches, observe={"g0": ("1", 1), "g1": ("3", -1)}
    )
    assert recovered(spec, permutation, result.permutation) == 1.0
    assert nlm.align(a, b, spec).report.excluded == ["4.weight"]


def test_the_contract_of_forward_and_progress_with_activations():
    a, b = mlp(0), mlp(1)
    spec = nlm.trace(a, vectors(8))
    data = [(vectors(32, 1), torch.zeros(32)), (vectors(32, 2), torch.zeros(32))]
    seen = []
    result = nlm.align(
        a, b, spec, "activations", data=data, progress=lambda *report: seen.append(report),
        forward=lambda model, batch: model(batch[0]),
    )  # fmt: skip
    assert [number for number, _ in seen] == [1, 2] and 0 < seen[0][1] < seen[1][1]
    assert result.report.samples == {"g0": 64, "g1": 64}

    def stop(batch, seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nlm.align(a, b, spec, "activations", data=data, progress=stop)


def test_a_plain_string_is_one_pattern():
    a, b = mlp(0), mlp(1)
    spec = nlm.trace(a, vectors(8))
    assert nlm.align(a, b, spec, exclude="4").report.excluded == ["4.weight"]
    assert nlm.align(a, b, spec, exclude="2.weight").report.excluded == ["2.weight"]


def test_the_rooms_can_be_called_after_their_modules_were_imported():
    code = """
import nlm.align.weights as weights
import nlm.merge.ties as ties
import nlm
assert weights is nlm.align.weights and ties is nlm.merge.ties
for room in (nlm.align, nlm.merge):
    try:
        room()
    except TypeError as error:
        assert "() missing" in str(error), error
    else:
        raise SystemExit(f"{room} was called without arguments")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_callable_room_has_the_signature_of_its_function():
    assert inspect.signature(nlm.align) == inspect.signature(nlm.align.align)
    assert nlm.align.__doc__.startswith("align(model_a")
    assert nlm.align.__doc__.endswith(nlm.align.align.__doc__)
    assert pickle.loads(pickle.dumps(nlm.align)) is nlm.align


def test_data_that_is_not_finite_leaves_the_proof_as_it_was():
    a, b = mlp(0), mlp(1)
    spec = nlm.trace(a, vectors(8))
    with pytest.raises(ValueError, match="proven on finite inputs, got 24 NaN or inf of 24"):
        nlm.align(a, b, spec, "activations", data=[vectors(8) * float("nan")])
    assert spec.proven and nlm.align(a, b, spec).report.method == "weights"


class Bare(nn.Module):
    """Two hidden layers whose weights are parameters of its own: no module shows its units."""

    def __init__(self):
        super().__init__()
        shapes = {"a": (12, 24), "b": (24,), "c": (24, 16), "d": (16,), "e": (16, 5)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * shape[0] ** -0.5))

    def forward(self, x):
        return torch.relu(torch.relu(x @ self.a + self.b) @ self.c + self.d) @ self.e


def test_a_network_of_bare_parameters_is_matched_by_weights():
    torch.manual_seed(0)
    model, other = Bare(), Bare()
    spec = nlm.trace(model, vectors(64))
    assert not spec.sites and [group.origin for group in spec.groups.values()] == ["b", "d"]
    planted = spec.random(3)
    noisy = {n: t + 0.05 * t.std() * torch.randn_like(t) for n, t in model.state_dict().items()}
    other.load_state_dict(spec.apply(planted, noisy))
    seen = []
    result = nlm.align(
        model, other, spec, "activations", data=[vectors(64)],
        progress=lambda *report: seen.append(report),
    )  # fmt: skip
    assert recovered(spec, planted, result.permutation) == 1.0
    report = result.report
    assert report.method == "activations" and report.samples == {}
    assert report.by_weights == ["g0", "g1"]
    assert min(report.correlation.values()) > 0.9 and set(report.correlation) == {"g0", "g1"}
    assert report.objective == nlm.align(model, other, spec).report.objective
    assert [value for _, value in seen] == report.objective[1:]
