"""Refit of whole models: attention, what is left alone, dtypes, masks, mistakes, the pipeline."""

import copy

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from small_transformers import Size, gpt
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

import nlm
from nlm.correct import correct
from nlm.pipeline import Aligned, choose

TASKS = ("a", "b")
DATA = {"a": [vectors(96, 0)], "b": [vectors(96, 1) * 2]}


def experts(**options) -> dict[str, nn.Module]:
    return {task: mlp(seed, **options) for seed, task in enumerate(TASKS, start=1)}


def sentences(count: int, seed: int) -> torch.Tensor:
    """Each character follows from the two before it, mostly; [count, 17]."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(11, (count, 17), generator=generator)
    for place in range(2, 17):
        sure = torch.rand(count, generator=generator) < 0.9
        told = (3 * found[:, place - 1] + found[:, place - 2]) % 11
        found[:, place] = torch.where(sure, told, found[:, place])
    return found


def loss(network: nn.Module, text: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(network(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


@pytest.fixture(scope="module")
def languages() -> list[nn.Module]:
    """Two small GPTs of other seeds and batches."""
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = gpt(11, 16, Size(24, 2, 2, 48))
        optimiser = torch.optim.AdamW(network.parameters(), 5e-3)
        for step in range(120):
            optimiser.zero_grad()
            loss(network, sentences(32, 1000 * seed + step)).backward()
            optimiser.step()
        networks.append(network.eval())
    return networks


@torch.no_grad()
def test_refit_lowers_the_loss_of_an_average_of_transformers(languages):
    own = dict(zip(TASKS, languages, strict=True))
    average = copy.deepcopy(languages[0])
    average.load_state_dict(nlm.merge(own, method="linear"))
    told, text = [], sentences(200, 5)
    fitted = nlm.refit(
        average, own, [text[:, :-1]], progress=lambda *step: told.append(step), micro_batch=64
    )
    assert [step[0] for step in told] == [
        ", ".join(f"blocks.{block}.{layer}" for layer in layers)
        for block in range(2)
        for layers in (("q", "k", "v"), ("o",), ("up",), ("down",))
    ]
    test = sentences(300, 6)
    losses = [float(loss(network, test)) for network in (*languages, average, fitted)]
    barrier, left = (end - sum(losses[:2]) / 2 for end in losses[2:])
    assert barrier > 0.05 and left < 0.5 * barrier


class Odd(nn.Module):
    """Layers that cannot be refitted, and one that can."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(12, 12)
        self.twice = nn.Linear(12, 12)
        self.tied, self.twin = nn.Linear(12, 12), nn.Linear(12, 12)
        self.twin.weight = self.tied.weight
        self.normed = weight_norm(nn.Linear(12, 12))
        self.up = nn.ConvTranspose1d(12, 12, 2)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        x = self.twice(self.twice(self.first(x).relu()).relu()).relu()
        x = self.normed(self.twin(self.tied(x).relu()).relu()).relu()
        return self.head(self.up(x[..., None]).flatten(1))


@torch.no_grad()
def test_what_cannot_be_refitted_is_left_alone():
    told, model = [], Odd().train()
    fitted = nlm.refit(
        model, {"a": Odd(1)}, {"a": [vectors()]}, progress=lambda *step: told.append(step)
    )
    assert told == [("first", 1, 1)]
    assert all(module.training for module in (*model.modules(), *fitted.modules()))
    changed = {
        name for name, weight in fitted.state_dict().items()
        if not torch.equal(weight, model.state_dict()[name])
    }  # fmt: skip
    assert changed == {"first.weight", "first.bias"}
    for name in ("twice", "twin", "normed", "up"):
        with pytest.raises(ValueError, match=f"with a weight of their own .*, got none of {name}"):
            nlm.refit(model, {"a": Odd(1)}, {"a": [vectors()]}, points=("first", name))


@torch.no_grad()
def test_a_multi_task_model_keeps_its_heads():
    own = {"a": mlp(1, classes=5), "b": mlp(2, classes=7)}
    merged = nlm.merge(own, mlp(0), scale=0.5, heads=("4",))
    model = merged.model(own["a"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fitted = nlm.refit(model, own, DATA, ridge=1e-3)
    assert type(fitted) is nlm.MultiTaskModel and fitted.tasks == TASKS
    after = fitted.state_dict()
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(after[name], tensor) == name.startswith("heads")
    plain = mlp(0)
    plain.load_state_dict({**merged.for_task("a")})
    alone = nlm.refit(plain, own, DATA, ridge=1e-3)
    torch.testing.assert_close(alone[2].weight, after["shared.2.weight"])
    tact = nlm.Tact.fit(fitted, own, DATA)
    assert tact(vectors(4), task="b").shape == (4, 7)
    with pytest.raises(ValueError, match="all tasks share, got none of them"):
        masked = nlm.merge(own, mlp(0), "tall_mask", heads=("4",)).model(own["a"])
        nlm.refit(masked, own, DATA)


@torch.no_grad()
def test_batch_norms_of_a_multi_task_model():
    own = {"a": convnet(1), "b": convnet(2)}
    data = {"a": [images(60)], "b": [images(60, 1) + 1]}
    for heads in (("10",), ("1", "10")):
        model = nlm.merge(own, convnet(0), scale=0.5, heads=heads).model(own["a"])
        fitted = nlm.refit(model, own, data)
        for task in TASKS:
            (x,) = data[task]
            near, far = (
                (each.for_task(task)[:9](x) - own[task][:9](x)).square().sum()
                for each in (fitted, model)
            )
            assert near < 0.5 * far


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_weights_keep_their_dtype(dtype):
    own = {task: expert.to(dtype) for task, expert in experts().items()}
    data = {task: [batch.to(dtype) for batch in batches] for task, batches in DATA.items()}
    fitted = nlm.refit(mlp(0).to(dtype), own, data, ridge=0.1)
    exact = {task: [batch.double() for batch in batches] for task, batches in data.items()}
    wide = {task: copy.deepcopy(expert).double() for task, expert in own.items()}
    truth = nlm.refit(mlp(0).to(dtype).double(), wide, exact, ridge=0.1)
    tolerance = {torch.bfloat16: 0.05, torch.float32: 1e-4}[dtype]
    for name, weight in truth.state_dict().items():
        found = fitted.state_dict()[name]
        assert found.dtype == dtype
        assert (found.double() - weight).abs().max() < tolerance * weight.abs().max()


@torch.no_grad()
def test_hidden_positions_do_not_count(languages):
    own = dict(zip(TASKS, languages, strict=True))
    text = sentences(60, 3)[:, :-1]
    garbled = torch.cat([text, torch.zeros_like(text[:, :0])], 1).clone()
    garbled[:, 12:] = 0
    counted = torch.arange(16)[None] < torch.full((60, 1), 12)
    whole = nlm.refit(languages[0], own, [text[:, :12]], ridge=0.01)
    masked = nlm.refit(languages[0], own, [garbled], ridge=0.01, mask=lambda batch: counted)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(masked.state_dict()[name], weight, rtol=1e-2, atol=1e-3)


class Conv1D(nn.Module):
    """A linear layer as transformers' GPT-2 has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


@torch.no_grad()
def test_a_weight_with_its_outputs_as_columns():
    torch.manual_seed(0)
    model, expert = (nn.Sequential(Conv1D(6, 12), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2))
    fitted = nlm.refit(model, {"a": expert}, {"a": [vectors()]}, ridge=1e-6)
    torch.testing.assert_close(fitted[0].weight, expert[0].weight, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_layers_that_are_called_by_a_keyword():
    class Called(nn.Module):
        def __init__(self, seed: int, keyword: bool) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.first, self.norm, self.second = (
                nn.Linear(12, 8),
                nn.BatchNorm1d(8),
                nn.Linear(8, 8),
            )
            self.head, self.keyword = nn.Linear(8, 2), keyword

        def forward(self, x):
            if self.keyword:
                x = self.norm(input=self.first(input=x)).relu()
                return self.head(input=x + self.second(input=x))
            x = self.norm(self.first(x)).relu()
            return self.head(x + self.second(x))

    found = []
    for keyword in (False, True):
        model, expert = (Called(seed, keyword).eval() for seed in (0, 1))
        for recompute in (False, True):
            fitted = nlm.refit(model, {"a": expert}, {"a": [vectors()]}, recompute=recompute)
            found.append(fitted.state_dict())
    assert not torch.equal(found[0]["second.weight"], Called(0, False).second.weight)
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor)


def test_mistakes():
    model, own = mlp(0), experts()
    bad = vectors()
    bad[5] = float("nan")
    for options, error, message in [
        ({"ridge": -1.0}, ValueError, "nlm.refit: the ridge is finite and at least 0, got -1.0"),
        ({"points": "9"}, ValueError, "nlm.refit: what is refitted are .*, got none of 9"),
        ({"max_samples": 0}, ValueError, "nlm.refit: at least one sample is used"),
        (
            {"ridge": 0.0, "max_samples": 4},
            ValueError,
            "take a larger ridge, got 12 of .0. whose normal",
        ),
        ({"device": "cpu", "micro_batch": 0}, ValueError, "a micro-batch has at least one sample"),
    ]:
        with pytest.raises(error, match=message):
            nlm.refit(model, own, DATA, **options)
    with pytest.raises(ValueError, match=r"nlm.refit: there is data for every .* a and"):
        nlm.refit(model, {"a": mlp(1)}, DATA)
    with pytest.raises(ValueError, match="experts for no task and data for no task"):
        nlm.refit(model, {}, [vectors()])
    with pytest.raises(ValueError, match="a model is corrected once"):
        nlm.refit(nlm.Tact.fit(model, own, DATA), own, DATA)
    with pytest.raises(ValueError, match=r"nlm.refit: data holds at least one sample, got none"):
        nlm.refit(model, own, {**DATA, "b": []})
    with pytest.raises(ValueError, match=r"activations are finite, got 12 NaN or inf of .* at '0'"):
        nlm.refit(model, own, {**DATA, "b": [bad]})
    with pytest.raises(ValueError, match="the merged model's channels, got 30 and 24 at '0'"):
        nlm.refit(model, experts(width=30), DATA)
    with pytest.raises(ValueError, match="a point is the name of a module of the model, got '2'"):
        nlm.refit(model, {task: mlp(1)[:2] for task in TASKS}, DATA)
    normed = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"nlm\.refit: activations are finite, .* before '1'"):
        nlm.refit(normed, {"a": normed}, {"a": [bad]})
    with pytest.raises(ValueError, match="units are selected in one process, got a process group"):
        nlm.refit(model, own, [vectors()], select=True, process_group=object())
    multi = nlm.merge(own, mlp(0), heads=("4",)).model(own["a"])
    with pytest.raises(ValueError, match="a multi-task model takes data per task"):
        nlm.refit(multi, own, [vectors()])

    class Cancelled(Exception):
        pass

    def cancel(*step: object) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        nlm.refit(model, own, DATA, progress=cancel)
    networks = (model, *own.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in networks for m in n.modules())


@torch.no_grad()
def test_the_pipeline_refits_and_chooses_the_ridge():
    own = experts()
    merged = nlm.merge(own, mlp(0), scale=0.5, heads=("4",))
    model = merged.model(own["a"])
    refitted = correct(model, own, DATA, "refit", ridge=0.01)
    for name, weight in nlm.refit(model, own, DATA, ridge=0.01).state_dict().items():
        assert torch.equal(refitted.state_dict()[name], weight)
    both = correct(model, own, DATA, "refit+tact", ridge=0.01, points=["2"])
    assert torch.equal(
        both.correction("2")[0], nlm.Tact.fit(refitted, own, DATA, points=["2"]).correction("2")[0]
    )
    validation = {t: [(x, expert(x).argmax(1))] for t, expert in own.items() for x in [vectors(80)]}
    base = {name: tensor for name, tensor in mlp(0).state_dict().items() if name[0] != "4"}
    aligned = Aligned(base, own, [])
    scores = []
    for correction in ("refit", "refit+tact"):
        choice = choose(
            aligned, DATA, validation, correction=correction, scales=(0.3, 0.6), heads=("4",),
            ridges=(1e-3, 10.0), progress=lambda *told: scores.append(told),
        )  # fmt: skip
        grid = [(scale, ridge) for scale in (0.3, 0.6) for ridge in (1e-3, 10.0)]
        best = max(range(4), key=lambda place: scores[place][1])
        assert (choice.scale, choice.ridge) == grid[best]
        assert choice.scores == {s: max(n for at, n in scores if at == s) for s in (0.3, 0.6)}
        scores.clear()


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.b.bias = self.a.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def test_layers_that_share_a_bias_are_left_alone():
    torch.manual_seed(0)
    one, two = SharedBias(), SharedBias()
    merged = copy.deepcopy(one)
    merged.load_state_dict(nlm.merge({"a": one, "b": two}, method="linear"))
    with pytest.raises(ValueError, match="got none of them"):
        nlm.refit(merged, {"a": one, "b": two}, [torch.randn(50, 6)])


def test_a_padded_encoder_is_refitted_and_inference_mode_changes_nothing():
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.embed, self.encoder = nn.Embedding(20, 16), nn.TransformerEncoder(layer, 1)
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.encoder(self.embed(x), src_key_padding_mask=x == 0)
            return self.head(h.mean(1))

    one, two = Encoder().eval(), Encoder().eval()
    merged = copy.deepcopy(one)
    merged.load_state_dict(nlm.merge({"a": one, "b": two}, method="linear"))
    words = torch.randint(1, 20, (30, 6))
    words[::3, 4:] = 0
    plain = nlm.refit(merged, {"a": one}, [words])
    with torch.inference_mode():
        other = nlm.refit(merged, {"a": one}, [words])
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    was, now = (each.encoder.layers[0].linear1.weight for each in (merged, plain))
    assert not torch.equal(was, now)
