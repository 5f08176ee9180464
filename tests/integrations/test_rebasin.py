"""The interface of rebasin, beside the package itself."""

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

from nlm.align import weight_matching
from nlm.integrations.rebasin import MergeMany, PermutationCoordinateDescent


def objective(a: nn.Module, b: nn.Module) -> float:
    """The inner product of the parameters."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.fsum(float((x.detach().double() * y.detach().double()).sum()) for x, y in pairs)


def residual(seed: int = 0) -> nn.Module:
    """A stream that two blocks write to, with norms."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(10), nn.Linear(10, 16), nn.Linear(16, 10)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(self.norm(x))))

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(12, 10), Block(), Block(), nn.Linear(10, 5)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


NETWORKS = {
    "mlp": (mlp, vectors(8)),
    "conv": (convnet, images(8)),
    "residual": (residual, vectors(8)),
}


@pytest.mark.host
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_objective_is_at_least_the_hosts(kind: str) -> None:
    host = pytest.importorskip("rebasin", reason="a host, of the extra [hosts]")
    make, x = NETWORKS[kind]
    a = make(seed=0)
    best = []
    for descent in (PermutationCoordinateDescent, host.PermutationCoordinateDescent):
        found = []
        for seed in range(2):
            b = make(seed=1)
            before = b(x)
            torch.manual_seed(seed)
            descent(a, b, x).rebasin()
            found.append(objective(a, b))
            if descent is PermutationCoordinateDescent:
                torch.testing.assert_close(b(x), before)
        best.append(max(found))
    assert best[0] >= best[1] * (1 - 1e-6)
    assert best[0] > objective(a, make(seed=1))


def test_the_second_start_gains() -> None:
    """On networks whose hidden layers are as wide as their input: always as good, mostly better."""
    gained = 0
    for seed in range(4):
        a, b = mlp(seed, 48, features=48), mlp(seed + 10, 48, features=48)
        search = PermutationCoordinateDescent(a, b, vectors(4, features=48))
        torch.manual_seed(seed)
        once = weight_matching(
            a.state_dict(), b.state_dict(), search.spec, seed=int(torch.randint(2**31, ())),
            layerwise=False,
        )  # fmt: skip
        torch.manual_seed(seed)
        search.rebasin()
        assert objective(a, b) >= once.report.objective[-1] - 1e-6
        gained += objective(a, b) > 1.01 * once.report.objective[-1]
    assert gained >= 3


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_planted_permutation_comes_back_in_place(kind: str) -> None:
    make, x = NETWORKS[kind]
    a, b = make(seed=2), make(seed=2)
    with torch.random.fork_rng():
        search = PermutationCoordinateDescent(a, b, x)
        b.load_state_dict(search.spec.apply(search.spec.random(3), b.state_dict()))
        entry = next(iter(b.parameters()))
        moved = entry.detach().clone()
        search.calculate_permutations()
        assert torch.equal(entry, moved) and search.report.objective[-1] > 0
        search.apply_permutations()
        search.apply_permutations()  # nothing more to apply
    for name, each in a.state_dict().items():
        assert torch.equal(each, b.state_dict()[name]), name


def test_inputs_of_several_arguments_and_by_name() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = nn.Linear(4, 9), nn.Linear(3, 9), nn.Linear(9, 2)

        def forward(self, x, y):
            return self.last(torch.tanh(self.one(x) + self.two(y)))

    torch.manual_seed(0)
    a, b, x, y = Pair(), Pair(), torch.randn(5, 4), torch.randn(5, 3)
    before = b(x, y)
    for data in ([x, y], (x, y), {"x": x, "y": y}):
        PermutationCoordinateDescent(a, b, data, device_a="cpu", device_b="cpu").rebasin(10)
        torch.testing.assert_close(b(x, y), before)


def test_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have the shape of its layout .*got \[25, 12\]"):
        PermutationCoordinateDescent(mlp(0, width=25), mlp(1), vectors(4))
    with pytest.raises(ValueError, match="a logging level is one of Python's, got 'loud'"):
        PermutationCoordinateDescent(mlp(0), mlp(1), vectors(4), logging_level="loud")


def test_sweeps_are_logged_where_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nlm.integrations.rebasin")
    PermutationCoordinateDescent(mlp(0), mlp(1), vectors(4)).rebasin(1)
    assert not caplog.messages
    PermutationCoordinateDescent(mlp(0), mlp(1), vectors(4), logging_level="info").rebasin(1)
    assert caplog.messages[0].startswith("sweep 1: ")


def test_several_models_are_merged(tmp_path: Path) -> None:
    """Permuted copies of one model, in memory and in files: their mean is the model."""
    x = images(8)
    a = convnet(0)
    spec = PermutationCoordinateDescent(a, convnet(0), x).spec
    states = [spec.apply(spec.random(seed), a.state_dict()) for seed in (1, 2)]
    module, file = convnet(5), tmp_path / "third.pt"
    module.load_state_dict(states[0])
    torch.save(states[1], file)
    working = convnet(6)
    many = MergeMany([a, module, file], working, x)
    with pytest.raises(AttributeError, match="a merged model after run"):
        _ = many.merged_model
    kept = copy.deepcopy(a.state_dict())
    merged = many.run()
    assert merged is many.merged_model and merged is not working
    for state in (a, module, merged, working):
        for name, each in state.state_dict().items():
            torch.testing.assert_close(each, kept[name])
    for name, each in torch.load(file, weights_only=True).items():
        assert torch.equal(each, kept[name])
    assert [path.name for path in tmp_path.iterdir()] == ["third.pt"]


def test_a_merge_that_fails_changes_nothing(tmp_path: Path) -> None:
    x = vectors(8)
    models = [mlp(0), mlp(1), tmp_path / "bad.pt"]
    bad = mlp(2).state_dict()
    bad["2.bias"][3] = math.inf
    torch.save(bad, models[2])
    before, file = copy.deepcopy(models[1].state_dict()), models[2].read_bytes()
    with pytest.raises(ValueError, match=r"1 NaN or inf of 24 in '2\.bias'"):
        MergeMany(models, mlp(3), x).run()
    assert models[2].read_bytes() == file
    assert all(torch.equal(each, before[n]) for n, each in models[1].state_dict().items())
    with pytest.raises(ValueError, match="there are at least two models, got 1"):
        MergeMany(models[:1], mlp(3), x)
