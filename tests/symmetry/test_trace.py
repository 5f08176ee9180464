"""``nlm.trace``: what it is given, what it selects, what it leaves behind, what it says."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from _networks import convnet, images, mlp, vectors
from torch import nn
from torch.nn.utils import prune

import nlm
from nlm.symmetry import parse
from nlm.symmetry.discover import discover


class TwoHeads(nn.Module):
    """Logits, boxes with weights of their own, and a hidden state."""

    def __init__(self):
        super().__init__()
        self.trunk, self.classes, self.boxes = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x, scale=1.0):
        hidden = torch.relu(self.trunk(x)) * scale
        return {
            "logits": self.classes(hidden),
            "boxes": {"corners": self.boxes(hidden)},
            "last_hidden_state": hidden,
        }


def pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", amount=0.3)


def test_outputs_are_the_logits_and_what_has_weights_of_its_own():
    spec = nlm.trace(TwoHeads(), torch.randn(5, 4))
    assert spec.outputs == ("logits", "boxes.corners")
    assert spec.params["trunk.weight"] == (parse("g0:8"), parse("4"))
    assert spec.params["boxes.weight"] == (parse("4"), parse("g0:8"))
    assert spec.pinned["classes.weight:0"] == "output"


def test_outputs_can_be_chosen():
    model, x = TwoHeads(), torch.randn(5, 4)
    spec = nlm.trace(model, x, outputs=["logits"])
    assert spec.params["boxes.weight"] == (parse("4"), parse("8"))
    assert spec.pinned["boxes.weight:1"] == "not read"
    assert not nlm.trace(model, x, outputs=["last_hidden_state", "logits"]).free
    with pytest.raises(ValueError, match=r"outputs of the model \(logits, .*, got 'scores'"):
        nlm.trace(model, x, outputs=["scores"])


def test_inputs_are_a_tensor_a_tuple_or_a_dict():
    model, x = TwoHeads(), torch.randn(5, 4)
    one = nlm.trace(model, x)
    assert one == nlm.trace(model, (x,)) == nlm.trace(model, {"x": x})
    assert one.groups == nlm.trace(model, x, {"scale": torch.tensor(2.0)}).groups


def test_a_model_without_weights_is_traced_and_not_proven():
    with torch.device("meta"):
        model = convnet()
    spec = nlm.trace(model, torch.ones(2, 1, 8, 8, device="meta"))
    assert not spec.proven
    assert spec.groups == nlm.trace(convnet(), images(8)).groups
    with pytest.raises(nlm.SymmetryError, match="one that is not verified"):
        nlm.align(convnet(0), convnet(1), spec)
    assert nlm.align(convnet(0), convnet(1), spec, example_inputs=images(8)).permutation


def test_mode_hooks_and_warnings_stay_as_they_were():
    model = convnet().train()
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nlm.trace(model, images(8))
    assert model.training and model[0].training and list(model[0]._forward_hooks) == [handle.id]
    assert all(not module._forward_hooks for module in model.modules() if module is not model[0])


def test_what_cannot_be_exported_says_why(capfd):
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"traced by torch.export .* prove it with its verify"):
        nlm.trace(Branching(4, 4), torch.randn(2, 4))
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match="got NotImplementedError"):
        nlm.trace(nn.ModuleList([nn.Linear(4, 4)]), torch.ones(2, 4))

    with pytest.raises(ValueError, match=r"a torch.nn.Module that is not scripted, got function"):
        nlm.trace(lambda x: x, torch.randn(2, 4))
    computed = mlp()
    computed.kept = [2 * computed[0].weight]
    with pytest.raises(ValueError, match=r"a copy of the model, got one that cannot be copied"):
        nlm.trace(computed, vectors(8))

    class Silent(nn.Linear):
        def forward(self, x):
            return 1.0

    with pytest.raises(ValueError, match="returns tensors, got none"):
        nlm.trace(Silent(4, 4), torch.randn(2, 4))


def test_settings_around_operations_are_looked_through():
    class Careful(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                x = self[0](x)
                x.relu_()
            with torch.enable_grad():
                return self[1](x)

    spec = nlm.trace(Careful(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(8, 4))
    assert spec.permutation_count == 1 and not spec.opaque_ops and "0" in spec.sites


def test_state_that_a_model_writes_follows_its_units():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("mean", torch.rand(6))

        def forward(self, x):
            hidden = torch.relu(self.a(x))
            self.mean.mul_(0.9).add_(0.1 * hidden.mean(0))
            return self.b(hidden - self.mean)

    spec = nlm.trace(Remembering(), torch.randn(8, 4))
    assert spec.permutation_count == 1 and spec.params["mean"] == (parse("g0:6"),)


def test_units_without_effect_stay():
    class Wasteful(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
            self.spare = nn.Linear(4, 5)

        def forward(self, x):
            return self.body(x) + 0 * self.spare(x).sum(1, keepdim=True)

    spec = nlm.trace(Wasteful(), torch.randn(8, 4))
    assert list(spec.free) == ["g0"] and spec.proven
    assert "without effect" in spec.pinned.values()


def test_shared_parameters_have_one_layout():
    tied = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    tied[4].weight = tied[2].weight
    spec = nlm.trace(tied, torch.randn(8, 4))
    assert spec.params["2.weight"] == spec.params["4.weight"] == (parse("g0:8"), parse("g0:8"))
    layer = nn.Linear(4, 4)
    twice = nlm.trace(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4))
    assert not twice.free  # its units are inputs and outputs too


def test_parameters_that_share_memory():
    def network(shared: str = "") -> nn.Module:
        model = nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)
        )
        weight = model[2].weight.data
        if shared:
            model[4].weight.data = weight.t() if shared == "transpose" else weight
        return model

    x = torch.randn(8, 4)
    for shared, unit in (("data", "g0:8"), ("transpose", "8")):
        model = network(shared)
        spec = nlm.trace(model, x)
        for name in ("2.weight", "4.weight"):
            assert spec.params[name] == (parse(unit), parse(unit))
        before = model(x)
        model.load_state_dict(spec.apply(spec.random(1), model.state_dict()))
        torch.testing.assert_close(model(x), before)
    with pytest.raises(nlm.SymmetryError, match="shares memory with one of another form"):
        nlm.trace(network(), x).verify(network("transpose"), x)


@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.spectral_norm, pruned])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_hooks_compute(make):
    model = nn.Sequential(make(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))
    model(torch.randn(8, 4))
    spec = nlm.trace(model, torch.randn(8, 4))
    assert spec.permutation_count == 1 and spec.params["0.bias"] == (parse("g0:6"),)


def test_complex_weights_stay():
    class Rotating(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.turn = nn.Parameter(torch.randn(1, dtype=torch.complex64))

        def forward(self, x):
            return self.b((self.a(x) * self.turn).abs())

    spec = nlm.trace(Rotating(), torch.randn(8, 4))
    assert spec.permutation_count == 1 and spec.verified.dtype == "float64"
    assert spec.verified.max_error < 1e-12


def test_channels_that_are_sampled_move_with_their_heads():
    class Sampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.values, self.places = nn.Conv2d(3, 8, 1), nn.Linear(3, 2 * 3 * 2)
            self.leave = nn.Linear(8, 2)

        def forward(self, x):  # two heads of four channels, three places for each
            values = self.values(x).view(-1, 4, *x.shape[2:])
            places = self.places(x.mean((2, 3))).view(len(values), 1, 3, 2).tanh()
            read = F.grid_sample(values, places, align_corners=False).sum((2, 3))
            return self.leave(read.view(len(x), 8))

    spec = nlm.trace(Sampling(), torch.randn(2, 3, 6, 6))
    assert spec.params["values.weight"][0] == parse("g0:2 x g1:4")
    assert spec.params["places.weight"][0] == parse("g0:2 x g2:3 x 2")
    assert spec.permutation_count == 1 + 2 + 2 and not spec.opaque_ops


def test_what_is_dropped_also_in_evaluation_stays():
    class Dropping(nn.Sequential):
        def forward(self, x):
            return self[1](F.dropout(self[0](x), 0.5, training=True))

    model = Dropping(nn.Linear(4, 6), nn.Linear(6, 2))
    assert not discover(model, (torch.randn(8, 4),), {}).free


def test_a_state_dict_that_holds_more_than_tensors_is_refused():
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

    with pytest.raises(ValueError, match=r"holds tensors, got dict for '0\._extra_state'$"):
        nlm.trace(nn.Sequential(Noted(4, 6), nn.Linear(6, 2)), torch.randn(8, 4))


def test_parametrized_and_added_parameters():
    class Gained(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return super().forward(x) * self.gain

    normed = nn.utils.parametrizations.weight_norm(Gained(4, 6))
    spec = nlm.trace(nn.Sequential(normed, nn.ReLU(), nn.Linear(6, 2)), torch.randn(8, 4))
    assert spec.params["0.parametrizations.weight.original0"] == (parse("g0:6"), parse("1"))
    assert spec.params["0.parametrizations.weight.original1"] == (parse("g0:6"), parse("4"))
    assert spec.params["0.gain"] == ()


def test_sites_are_the_outputs_of_modules_that_ran_once():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 6), shared, nn.Linear(6, 5), shared, nn.Linear(5, 2))
    spec = nlm.trace(model, torch.randn(8, 4))
    assert {name: (site.dim, str(site.layout)) for name, site in spec.sites.items()} == {
        "0": (1, "g0:6"),
        "2": (1, "g1:5"),
    }
    assert nlm.trace(mlp(), vectors(8)).observation_sites() == {"g0": "1", "g1": "3"}


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16])
def test_low_precision_models(other):
    spec = nlm.trace(mlp().to(other), vectors(8).to(other))
    assert spec.proven and spec.permutation_count == 2
