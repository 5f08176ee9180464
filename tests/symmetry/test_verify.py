"""A specification that does not hold is refused, with the name of the group; so is a dead proof."""

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

import nlm
from nlm.symmetry import AxisGroup, PermutationSpec, Ref


def test_the_proof_is_kept_with_the_specification():
    spec = nlm.trace(convnet(), images(8))
    assert spec.verified.dtype == "float64"
    assert spec.verified.max_error < 1e-12 < 1e-3 < spec.verified.control


def test_a_table_that_forgets_a_reader_is_refused():
    model = mlp()
    table = nlm.trace(model, vectors(8)).to_axes_to_perm()
    table["2.weight"] = ("g1", None)
    spec = PermutationSpec.from_axes_to_perm(table, model.state_dict())
    with pytest.raises(nlm.SymmetryError, match="group 'g0'"):
        spec.verify(model, vectors(8))
    assert spec.verified is None
    with pytest.raises(nlm.SymmetryError, match="proven before anything is matched"):
        nlm.align(model, mlp(1), spec)


def test_permuted_logits_are_refused():
    model = mlp()
    spec = nlm.trace(model, vectors(8))
    classes = Ref("classes", 5)
    wrong = PermutationSpec(
        {**spec.groups, "classes": AxisGroup("classes", 5)},
        {**spec.params, "4.weight": (classes, spec.params["4.weight"][1]), "4.bias": (classes,)},
    )
    with pytest.raises(nlm.SymmetryError, match="group 'classes'"):
        nlm.align(model, mlp(1), wrong, example_inputs=vectors(8))


def test_a_dead_network_proves_nothing():
    model = mlp()
    nn.init.constant_(model[0].bias, -1e3)  # no unit of the first layer ever fires
    with pytest.raises(nlm.SymmetryError, match="can be proven only where its units matter"):
        nlm.trace(model, vectors(8))


def test_zero_parameters_hide_nothing():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    nn.init.zeros_(model[1].weight)
    assert nlm.trace(model, torch.randn(8, 4)).verified is not None


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1)), torch.ones(2, 4), "got Softmax at '1'"),
        (nn.ModuleList([nn.Linear(4, 4)]), torch.ones(2, 4), "got ModuleList at ''"),
        (
            nn.Sequential(nn.Conv1d(4, 8, 1), nn.Conv1d(8, 8, 1, groups=2)),
            torch.ones(2, 4, 4),
            "got 2 groups of 8",
        ),
    ],
)
def test_networks_that_are_not_read_yet(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        nlm.trace(model.eval(), inputs)


def test_a_module_used_twice_is_refused():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="stands once in a sequential network"):
        nlm.trace(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4))


def test_the_model_is_left_as_it_was():
    model = convnet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nlm.trace(model, images(8))
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e3])
def test_networks_of_any_scale_are_proven(scale):
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    assert nlm.trace(model, vectors(8)).proven


def test_the_example_is_left_as_it_was():
    x = vectors(8).double()
    before = x.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), *mlp()).double()
    spec = nlm.trace(model, x)
    spec.verify(model, x)
    assert torch.equal(x, before)


def test_buffers_that_are_not_saved_are_used():
    class Scaled(nn.Sequential):
        def __init__(self, *modules):
            super().__init__(*modules)
            self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

        def forward(self, x):
            return super().forward(x) * self.scale

    plain = nlm.trace(mlp(), vectors(8))
    spec = PermutationSpec(plain.groups, plain.params)
    spec.verify(Scaled(*mlp()), vectors(8))
    assert spec.proven


def test_shared_parameters():
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    message = r"shared has one layout under all its names, got \[g0:8, 8\] for '0.weight' and"
    with pytest.raises(nlm.SymmetryError, match=message):
        nlm.trace(tied, torch.randn(8, 8))
    same = nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2)
    )
    same[3].weight, same[3].bias = same[1].weight, same[1].bias
    assert nlm.trace(same, torch.randn(8, 4)).proven


def test_entries_that_are_not_known_are_named():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    with pytest.raises(ValueError, match=r"'parametrizations.weight.original0' at '0'; .* verify"):
        nlm.trace(nn.Sequential(normed, nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4))

    class Gained(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.gain = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="entries of a Gained are known by name, got 'gain'"):
        nlm.trace(nn.Sequential(Gained(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4))


def test_what_is_not_read_says_what_to_do():
    with pytest.raises(ValueError, match=r"write the specification .* prove it with its verify"):
        nlm.trace(nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1)), torch.ones(2, 4))
    with pytest.raises(ValueError, match="write the specification"):
        nlm.trace(mlp(), (vectors(2), vectors(2)))


def test_a_batch_is_run_as_told():
    spec = nlm.trace(mlp(), vectors(8))
    spec.verify(mlp(1), {"x": vectors(8)}, forward=lambda model, batch: model(batch["x"]))
    assert spec.proven
