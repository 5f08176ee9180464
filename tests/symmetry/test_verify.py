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


def test_zero_parameters_hide_nothing():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    nn.init.zeros_(model[1].weight)
    assert nlm.trace(model, torch.randn(8, 4)).verified is not None


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


def test_a_batch_is_run_as_told():
    spec = nlm.trace(mlp(), vectors(8))
    spec.verify(mlp(1), {"x": vectors(8)}, forward=lambda model, batch: model(batch["x"]))
    assert spec.proven
