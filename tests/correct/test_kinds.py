"""Points of every kind on every architecture: found, matched, served, and folded where exact."""

import pytest
import torch
from correct._architectures import NETWORKS, PreNorm, called, encoder, pair, resnet
from torch import nn
from transformers.pytorch_utils import Conv1D

import nlm
from nlm.correct.points import find_points
from nlm.evaluate import layer_statistics

KINDS = ("before_activation", "after_activation", "residual", "norm")
EXPECTED = {
    ("resnet", "before_activation"): "0 2.bn1 2.bn2 3.shortcut 3.bn1 3.bn2",
    ("resnet", "after_activation"): "1 2:relu 2 3:relu 3",
    ("resnet", "residual"): "2:add 3:add",
    ("resnet", "norm"): "2.bn1 2.bn2 3.bn1 3.bn2",
    ("resnet without norms", "before_activation"): "0 2.conv1 2.conv2 3.shortcut 3.conv1 3.conv2",
    ("vision transformer", "before_activation"): (
        "patches layers.0.attention layers.0.mlp.0 layers.0.mlp.2 layers.1.attention "
        "layers.1.mlp.0 layers.1.mlp.2"
    ),
    ("vision transformer", "after_activation"): "layers.0.mlp.1 layers.1.mlp.1",
    ("vision transformer", "residual"): "layers.0:add layers.0 layers.1:add layers.1",
    ("vision transformer", "norm"): "layers.0.ln_1 layers.0.ln_2 layers.1.ln_1 layers.1.ln_2 norm",
    ("encoder", "before_activation"): (
        "0.layers.0.self_attn 0.layers.0.linear1 0.layers.0.linear2 0.layers.1.self_attn "
        "0.layers.1.linear1 0.layers.1.linear2"
    ),
    ("encoder", "residual"): "0.layers.0:add 0.layers.0:add.1 0.layers.1:add 0.layers.1:add.1",
    ("bert", "residual"): (
        "bert.encoder.layer.0.attention.output:add bert.encoder.layer.0.output:add "
        "bert.encoder.layer.1.attention.output:add bert.encoder.layer.1.output:add"
    ),
    ("gpt2", "before_activation"): (
        "transformer.h.0.attn.c_attn transformer.h.0.attn.c_proj transformer.h.0.mlp.c_fc "
        "transformer.h.0.mlp.c_proj transformer.h.1.attn.c_attn transformer.h.1.attn.c_proj "
        "transformer.h.1.mlp.c_fc transformer.h.1.mlp.c_proj"
    ),
    ("gpt2", "after_activation"): "transformer.h.0.mlp.act transformer.h.1.mlp.act",
    ("gpt2", "residual"): "transformer.h.0:add transformer.h.0 transformer.h.1:add transformer.h.1",
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return request.param, *pair(NETWORKS[request.param])


def fitted(network, data, kind, **options) -> nlm.Tact | None:
    """None where a network has no such points, which is said."""
    name, model, expert, _ = network
    if (name, kind) == ("resnet without norms", "norm"):
        with pytest.raises(ValueError, match="at least one point to correct, got none"):
            nlm.Tact.fit(model, dict.fromkeys(data, expert), data, points=kind, **options)
        return None
    return nlm.Tact.fit(model, dict.fromkeys(data, expert), data, points=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_point_of_a_kind_is_matched_and_served(network, kind):
    name, model, expert, x = network
    if (name, kind) in EXPECTED:
        assert " ".join(find_points(model, lambda: model(x), kind).dims) == EXPECTED[name, kind]
    halves = {"a": x[:7], "b": x[7:].flip(0)}
    data = {task: [part] for task, part in halves.items()}
    tact = fitted(network, data, kind)
    if tact is None:
        return
    for task in data:
        found = layer_statistics(tact, expert, tact.points, data[task], task=task)
        assert found.variance_ratio == pytest.approx(dict.fromkeys(tact.points, 1), rel=1e-3)
    mixed = called(tact, x, task=[*"aaaaaaabbbbb"])
    torch.testing.assert_close(mixed[:7], called(tact, x[:7], task="a"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[7:], called(tact, x[7:], task=1), rtol=1e-4, atol=1e-4)
    small = fitted(network, data, kind, micro_batch=4)
    for point in tact.points:
        for one, other in zip(tact.correction(point), small.correction(point), strict=True):
            assert (one - other).abs().max() <= 1e-4 * one.abs().max(), point


@pytest.mark.parametrize("kind", KINDS)
def test_what_folds_is_exact_and_the_rest_is_named(network, kind):
    _, model, expert, x = network
    tact = fitted(network, {"a": [x]}, kind)
    if tact is None:
        return
    left = tact.unfoldable()
    if left:
        with pytest.raises(ValueError) as error:
            tact.fold("a")
        assert all(f"{point!r} ({reason})" in str(error.value) for point, reason in left.items())
    kept = {point: dim for point, dim in tact.points.items() if point not in left}
    if kind in ("before_activation", "norm"):
        assert kept == tact.points
    if not kept:
        return
    some = nlm.Tact.fit(model, {"a": expert}, {"a": [x]}, points=kept)
    plain = some.fold("a")
    torch.testing.assert_close(called(plain, x), called(some, x, task="a"), rtol=1e-3, atol=1e-4)
    assert (called(model, x) - called(plain, x)).abs().max() > 1e-2


def test_the_reasons():
    model, expert, x = pair(resnet)
    tact = nlm.Tact.fit(model, {"a": expert}, {"a": [x]}, points={"1": 1, "2:add": 1, "3": 1})
    reasons = tact.unfoldable()
    assert reasons["1"].endswith("read by '2.conv1', which pads with zeros and '2:add'")
    assert reasons["2:add"] == "a function has no weights, and it is read by '2:relu.1'"
    assert "AdaptiveAvgPool2d" not in reasons["3"] and "adaptive_avg_pool2d" in reasons["3"]
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    tied[2].weight = tied[0].weight
    x = torch.randn(20, 6)
    own = {"a": nn.Sequential(*(type(m)(*m.weight.shape[::-1]) if hasattr(m, "weight") else m
                                for m in tied))}  # fmt: skip
    assert nlm.Tact.fit(tied, own, {"a": [x]}).unfoldable() == {
        "0": "its weights are shared, and it is read by ':relu'",
        "2": "its weights are shared, and it is read by ':relu.1'",
    }


@pytest.mark.parametrize(
    "reader",
    [
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
    ],
)
def test_points_behind_an_activation_go_into_the_next_layer(reader):
    def build():
        body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), reader(), nn.ReLU(), nn.Flatten())
        return nn.Sequential(*body, nn.LazyLinear(3)), torch.randn(12, 1, 8, 8)

    torch.manual_seed(0)
    model, x = build()
    expert = build()[0]
    for each in (model, expert):
        each(x)
    for points in ({"1": 1}, {"0": 1, "1": 1, "2": 1}):
        tact = nlm.Tact.fit(model, {"a": expert}, {"a": [x]}, points=points)
        folded = called(tact.fold("a"), x)
        torch.testing.assert_close(folded, called(tact, x, task="a"), rtol=1e-3, atol=1e-4)


def test_a_length_first_batch_is_run_task_by_task():
    class LengthFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder(batch_first=False)[0]

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model, expert, x = pair(lambda: (LengthFirst(), torch.randn(5, 5, 12)))
    tact = nlm.Tact.fit(model, {"a": expert, "b": model}, {"a": [x[:4]], "b": [x[:3] + 1]})
    assert tact.apart
    mixed = called(tact, x, task=[0, 1, 1, 0, 1])
    torch.testing.assert_close(mixed[[1, 2, 4]], called(tact, x[[1, 2, 4]], task="b"))
    with pytest.raises(ValueError, match="inlined for one of a, b, got none"):
        tact.inline()


def test_padding_masks_and_the_fast_path():
    model, expert, x = pair(encoder)
    hidden = torch.zeros(12, 5, dtype=torch.bool)
    hidden[:, 4] = True
    x[:, 4] = 3.0

    def forward(network, batch, **kwargs):
        return network[1](network[0](batch, src_key_padding_mask=hidden[: len(batch)]))

    def keep(batch):
        return ~hidden[: len(batch)]

    tact = nlm.Tact.fit(model, {"a": expert}, {"a": [x]}, forward=forward, mask=keep, points="norm")
    ratio = layer_statistics(
        tact.fold("a"), expert, tact.points, [x], forward=forward, mask=keep
    ).variance_ratio
    assert ratio == pytest.approx(dict.fromkeys(tact.points, 1), rel=1e-3)
    assert model[0].use_nested_tensor and expert[0].use_nested_tensor


def test_one_activation_module_may_serve_many_places():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.head(self.act(self.second(self.act(self.first(x)))))

    model, expert, x = pair(lambda: (Shared(), torch.randn(12, 6)))
    tact = nlm.Tact.fit(model, {"a": expert}, {"a": [x]}, points="after_activation")
    assert tact.points == {":relu": -1, ":relu.1": -1} and tact.unfoldable() == {}
    torch.testing.assert_close(called(tact.fold("a"), x), called(tact, x, task="a"))


def test_names_patterns_and_mistakes():
    model, expert, x = pair(
        lambda: (nn.Sequential(PreNorm(), nn.Linear(12, 2)), torch.randn(8, 5, 12))
    )
    own, data = {"a": expert}, {"a": [x]}
    for points, found in [
        ("*.ln_?", {"0.ln_1": -1, "0.ln_2": -1}),
        (["0.mlp.*[02]", "0:add*"], {"0:add": -1, "0.mlp.0": -1, "0.mlp.2": -1, "0:add.1": -1}),
        ({"0.mlp.1": 2}, {"0.mlp.1": 2}),
    ]:
        assert nlm.Tact.fit(model, own, data, points=points).points == found
    for points, message in [
        ("*.bn", r"runs once in a forward pass, got 0 runs of '\*.bn'"),
        ("0:add.2", "got 0 runs of '0:add.2'"),
        ("1.x", "the name of a module of the model, got '1.x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            nlm.Tact.fit(model, own, data, points=points)


def test_side_cars_remember_places(tmp_path):
    model, expert, x = pair(resnet)
    tact = nlm.Tact.fit(model, {"a": expert}, {"a": [x]}, points="residual")
    tact.save(tmp_path / "tact")
    again = nlm.Tact.load(tmp_path / "tact", model)
    assert torch.equal(called(again, x, task="a"), called(tact, x, task="a"))
    assert again.unfoldable() == tact.unfoldable() and again.apart == tact.apart
    _, metadata = nlm.checkpoint.read_tensors(tmp_path / "tact")
    assert metadata["parameter_bytes"] == str(tact.parameter_bytes) == str(4 * 2 * (6 + 8))


def test_functions_that_the_model_lacks_are_told_by_the_first_call(tmp_path):
    class Added(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.first, self.head, self.twice = nn.Linear(6, 6), nn.Linear(6, 2), twice

        def forward(self, x):
            x = x + self.first(x)
            return self.head(x + x if self.twice else x)

    x = torch.randn(20, 6)
    other = Added(True)
    tact = nlm.Tact.fit(other, {"a": Added(True)}, {"a": [x]}, points={":add": 1, ":add.1": 1})
    tact.save(tmp_path / "tact")
    model = Added(False)
    again = nlm.Tact.load(tmp_path / "tact", model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"that the model's modules call, got :add\.1$"):
            again(x, task="a")
    assert torch.equal(nlm.Tact.load(tmp_path / "tact", other)(x, task="a"), tact(x, task="a"))


@pytest.mark.parametrize("reader", [lambda: nn.Linear(6, 6), lambda: Conv1D(6, 6)])
def test_a_norm_without_bias_goes_into_all_that_read_it(reader):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 2)
            self.left, self.right = reader(), reader()

        def forward(self, x):
            h = self.norm(self.first(x))
            return self.head(self.left(h) * self.right(h).tanh())

    model, expert, x = pair(lambda: (Branches(), torch.randn(20, 6)))
    tact = nlm.Tact.fit(model, {"a": expert}, {"a": [x]}, points="norm")
    assert tact.points == {"norm": -1} and tact.readers == {"norm": ["left", "right"]}
    folded = called(tact.fold("a"), x)
    torch.testing.assert_close(folded, called(tact, x, task="a"), rtol=1e-4, atol=1e-5)
