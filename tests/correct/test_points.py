"""Which modules are corrected, and on which dimension."""

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

import nlm
from nlm.correct import default_points


def points_of(network: nn.Module, x: torch.Tensor, **options) -> dict[str, int]:
    return default_points(network.eval(), lambda: network(x), **options)


class Residual(nn.Module):
    """A norm that reads the sum with the input, and a convolution whose output it is not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.second = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x)
        o = self.second(h.relu())
        if self.in_place:
            o += h
        else:
            o = o + h
        return self.head(self.norm(o).relu().mean((2, 3)))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_norm_after_an_addition_is_not_its_layers_norm(in_place):
    assert points_of(Residual(in_place), images(2)) == {"first": 1, "second": 1}


@pytest.mark.parametrize("in_place", [True, False])
def test_the_last_layer_is_a_head_whatever_stands_behind_it(in_place):
    for tail in (nn.LogSoftmax(-1), nn.ReLU(in_place)):
        network = nn.Sequential(nn.Linear(12, 8), nn.ReLU(in_place), nn.Linear(8, 3), tail)
        assert points_of(network, vectors(4)) == {"0": -1}
    features = nn.Sequential(*list(convnet())[:7])
    assert points_of(features, images(4)) == {"1": 1, "5": 1}  # a norm follows: no head


def test_modules_that_run_twice_are_left_alone():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.head = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = self.first(x).relu()
            return self.head(self.shared(self.shared(h).relu()).relu())

    assert points_of(Shared(), vectors(4)) == {"first": -1}


def test_a_layer_is_its_own_point_where_its_norm_runs_twice():
    class SharedNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 6), nn.Linear(6, 6)
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 2)

        def forward(self, x):
            h = self.norm(self.first(x)).relu()
            return self.head(self.norm(self.second(h)).relu())

    assert points_of(SharedNorm(), vectors(4)) == {"first": -1, "second": -1}


def test_heads_of_a_multi_task_model_are_no_points():
    class TwoHeads(nn.Module):
        """The head's output is not the network's, and another layer runs last."""

        def __init__(self, classes: int) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(12, 8), nn.Linear(8, classes)
            self.spare = nn.Linear(8, 1)

        def forward(self, x):
            h = self.body(x).relu()
            return self.head(h).log_softmax(-1) * self.spare(h).sigmoid()

    own = {"a": TwoHeads(3), "b": TwoHeads(4)}
    model = nlm.merge(own, TwoHeads(3), scale=0.5, heads=("head",)).model(own["a"])
    tact = nlm.Tact.fit(model, own, {"a": [vectors()], "b": [vectors()]})
    assert list(tact.points) == ["body"]
    for kind in (nlm.Tact, nlm.Repair):
        with pytest.raises(ValueError, match=r"as many channels for every task .* 3, 4 at 'head'"):
            kind.fit(model, own, {"a": [vectors()], "b": [vectors()]}, points=["head"])


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.Identity(), nn.Dropout2d(), nn.Sequential(nn.ReLU()), nn.PReLU()],
    ids=lambda module: type(module).__name__,
)
def test_a_channel_dimension_is_known_by_the_layer_behind_and_not_guessed(module):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), module, nn.Flatten(), nn.Linear(144, 2)).eval()
    own, data = {"a": network}, {"a": [images()]}
    assert nlm.Tact.fit(network, own, data, points=["1"]).points == {"1": 1}

    class Scaled(nn.Sequential):
        def forward(self, x):
            return super().forward(torch.stack([x.amax(1), x.amin(1)], 1))

    network[1] = Scaled(module)
    network[3] = nn.Linear(72, 2)
    with pytest.raises(ValueError, match=r"given with it, as in {'1': 1}, got .* at '1'"):
        nlm.Tact.fit(network, own, data, points=["1"])
    tact = nlm.Tact.fit(network, own, data, points={"1": 1})
    assert tact.correction("1")[0].shape == (1, 2)


def test_names_of_points_that_are_whole_blocks_may_be_passed_back():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def forward(self, x):
            return x + self.inner(x).relu()

    network = nn.Sequential(nn.Linear(12, 12), Block(), Block(), nn.Linear(12, 3)).eval()
    own, data = {"a": network}, {"a": [vectors()]}
    found = nlm.Tact.fit(network, own, data, points="residual").points
    assert found == {"1": -1, "2": -1}
    assert nlm.Tact.fit(network, own, data, points=list(found)).points == found


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d(2), nn.LPPool2d(2, 2), nn.AdaptiveMaxPool2d(2)]
)
def test_pooled_images_have_their_channels_second(pool):
    network = nn.Sequential(nn.Conv2d(1, 5, 3), pool, nn.Flatten(), nn.LazyLinear(2)).eval()
    network(images(2))
    tact = nlm.Tact.fit(network, {"a": network}, {"a": [images()]}, points=["1"])
    assert tact.points == {"1": 1} and tact.correction("1")[0].shape == (1, 5)


def test_a_point_that_one_tasks_data_skip():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = (nn.Linear(12, 12) for _ in range(3))

        def forward(self, x):
            h = self.first(x).relu()
            return self.head(self.second(h).relu() if x.mean() > 5 else h)

    own = {"a": Sometimes(), "b": Sometimes()}
    data = {"a": [vectors() + 10], "b": [vectors()]}
    for options in ({}, {"mode": "at_once"}, {"micro_batch": 16}):
        with pytest.raises(ValueError, match="runs on the data, got no run of second"):
            nlm.Tact.fit(Sometimes(), own, data, **options)
    with pytest.raises(ValueError, match="runs on the data, got no run of second"):
        nlm.correct.expert_moments(own, data)
    with pytest.raises(TypeError, match=r"a task is named by a string, got 0 \(int\)"):
        nlm.Tact.fit(mlp(), {0: mlp()}, {0: [vectors()]})


@pytest.mark.parametrize(
    "normed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_what_normalises_a_weight_is_no_norm(normed):
    def build() -> nn.Module:
        layer = normed(nn.Linear(12, 8))
        return nn.Sequential(layer, nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))

    tact = nlm.Tact.fit(build(), {"a": build()}, {"a": [vectors()]}, points="norm")
    assert tact.points == {"1": -1}
