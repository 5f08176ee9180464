"""Each task's part of low rank: what it is, what it weighs, and how it is kept and served."""

import json

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import nlm
from nlm.correct import LowRank

TASKS = ("a", "b")


def experts(build=mlp) -> dict[str, nn.Module]:
    return {task: build(seed).double() for seed, task in enumerate(TASKS, start=1)}


def calibration(draw=vectors, count: int = 64) -> dict[str, list[torch.Tensor]]:
    return {t: [draw(count, seed).double() * (1 + seed)] for seed, t in enumerate(TASKS)}


def normed(seed: int = 0) -> nn.Sequential:
    """Convolutions with groups and without a bias, batch norms behind them."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10),
    )  # fmt: skip
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].weight[2] = 0
    return model.eval()


@pytest.mark.parametrize(("build", "draw"), [(mlp, vectors), (convnet, images), (normed, images)])
@torch.no_grad()
def test_with_full_rank_it_is_the_refit_of_each_task_alone(build, draw, monkeypatch):
    """But for the statistics of batch norms, which stay here."""
    model, own, data = build().double(), experts(build), calibration(draw)
    found = LowRank.fit(model, own, data, share=100.0, ridge=0.1)
    monkeypatch.setattr("nlm.correct.solving.write_statistics", lambda *_: None)
    for task in TASKS:
        alone = nlm.refit(model, {task: own[task]}, {task: data[task]}, ridge=0.1)
        for name, weight in found.for_task(task).state_dict().items():
            torch.testing.assert_close(weight, alone.state_dict()[name], rtol=1e-7, atol=1e-8)


def error(found: nn.Module, expert: nn.Module, x: torch.Tensor, layers: int) -> float:
    part = slice(0, layers)
    return float((found[part](x) - expert[part](x)).square().sum())


@torch.no_grad()
def test_no_update_of_the_rank_is_nearer_in_the_metric():
    """Against the truncation of random restarts: alternating least squares from other starts."""
    model, own, data = mlp().double(), experts(), calibration(count=200)
    x, y = data["a"][0], own["a"][0](data["a"][0])
    weight, size = model[0].weight, model[0].weight.numel()
    rank = 2
    share = (len(weight) + rank * sum(weight.shape)) / size + 1e-9
    found = LowRank.fit(model, own, data, share=share, ridge=1e-9, points="0")
    assert found.ranks["a"] == {"0.weight": rank}
    best = error(found.for_task("a"), own["a"], x, 1)
    x0, target = x - x.mean(0), (y - y.mean(0)) - (x - x.mean(0)) @ weight.T
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        left = torch.randn(len(weight), rank, generator=generator, dtype=torch.float64)
        for _ in range(200):
            right = torch.linalg.lstsq(x0, target @ torch.linalg.pinv(left).T).solution.T
            left = torch.linalg.lstsq(x0 @ right.T, target).solution.T
        reached = float((x0 @ right.T @ left.T - target).square().sum())
        assert best <= reached * (1 + 1e-6)
    assert reached == pytest.approx(best, rel=1e-3)  # the search does reach it
    shared = nlm.refit(model, {"a": own["a"]}, {"a": data["a"]}, ridge=1e-9, points="0")
    assert error(shared, own["a"], x, 1) < best < error(model, own["a"], x, 1)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.5])
@torch.no_grad()
def test_a_task_weighs_no_more_than_its_share(share, tmp_path):
    model, own, data = normed().double(), experts(normed), calibration(images)
    found = LowRank.fit(model, own, data, share=share)
    trunk = sum(layer.weight.nbytes for layer in (model[0], model[3]))
    sizes = [sum(t.nbytes for t in each.tensors().values()) for each in found.updates.values()]
    assert found.parameter_bytes == sum(sizes) and all(size <= share * trunk for size in sizes)
    if share == 0.5:
        assert min(sizes) > 0.15 * trunk
        assert "1.running_mean" in found.updates["a"].values  # the layer before it has no bias
        assert torch.equal(found.for_task("a")[1].running_var, model[1].running_var)
    found.save(tmp_path / "parts.safetensors")
    assert 0 <= (tmp_path / "parts.safetensors").stat().st_size - found.parameter_bytes < 4096


@torch.no_grad()
def test_it_is_served_by_task_kept_and_corrected_further(tmp_path):
    own, data = experts(convnet), calibration(images)
    merged = nlm.merge(own, own["a"].state_dict(), method="task_arithmetic", scale=0.5, heads="10")
    model = nlm.refit(merged.model(own["a"]), own, data)
    found = LowRank.fit(model, own, data, share=0.3)
    x = images(6).double()
    for task in TASKS:
        torch.testing.assert_close(found(x, task=task), found.for_task(task)(x))
        assert not torch.allclose(found(x, task=task), model(x, task=task))
    mixed = found(x, task=["a", "b", "b", "a", "a", "b"])
    torch.testing.assert_close(mixed[1:3], found(x[1:3], task="b"))
    torch.testing.assert_close(mixed[3:5], found(x[3:5], task=0))
    with pytest.raises(ValueError, match="the task is one of a, b, got 'c'"):
        found(x, task="c")
    path = tmp_path / "parts.safetensors"
    found.save(path)
    again = LowRank.load(path, model)
    assert again.ranks == found.ranks and again.parameter_bytes == found.parameter_bytes
    for task in TASKS:
        assert torch.equal(again(x, task=task), found(x, task=task))
    state = found.state_dict()
    assert any(name.startswith("update.1.") for name in state)
    again.load_state_dict(state)
    half = LowRank.load(path, model).float()
    assert half(x.float(), task="a").dtype == torch.float32
    tact = nlm.Tact.fit(found, own, data)
    ids = torch.tensor([0, 1, 1, 0, 1, 0])
    mixed = tact(x, task=ids)
    torch.testing.assert_close(mixed[ids == 1], tact(x[ids == 1], task="b"))
    for layer in ("0", "4", "8"):  # each task has a bias of its own at least
        with pytest.raises(ValueError, match=r"nlm\.refit: what is refitted are linear"):
            nlm.refit(found, own, data, points=layer)


@torch.no_grad()
def test_the_result_does_not_depend_on_the_micro_batch():
    model, own, data = mlp().double(), experts(), calibration()
    told: list[str] = []
    whole = LowRank.fit(model, own, data, progress=lambda what, *_: told.append(what))
    parts = LowRank.fit(model, own, data, micro_batch=7, recompute=True)
    assert told[0] == "a: 0" and told[-1].startswith("b: ")
    for task in TASKS:
        for name, weight in whole.for_task(task).state_dict().items():
            torch.testing.assert_close(parts.for_task(task).state_dict()[name], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_outputs_as_columns_and_other_dtypes(dtype):
    own = {task: nn.Sequential(Conv1D(6, 12), nn.ReLU(), nn.Linear(6, 2)) for task in TASKS}
    model = nn.Sequential(Conv1D(6, 12), nn.ReLU(), nn.Linear(6, 2))
    data = {task: [vectors(200).to(dtype)] for task in TASKS}
    nets = [model, *own.values()]
    for net in nets:
        net.to(dtype)
    found = LowRank.fit(model, own, data, share=100.0, ridge=1e-4)
    for task in TASKS:
        plain = found.for_task(task)
        assert plain[0].weight.dtype == dtype and found.ranks[task] == {"0.weight": 6}
        close = (
            {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
        )
        torch.testing.assert_close(plain[0].weight, own[task][0].weight, **close)


def test_bad_input(tmp_path):
    model, own, data = mlp(), {t: mlp(s) for s, t in enumerate(TASKS)}, calibration()
    data = {task: [batch.float() for batch in batches] for task, batches in data.items()}
    with pytest.raises(ValueError, match="the share is positive and finite, got 0"):
        LowRank.fit(model, own, data, share=0)
    with pytest.raises(ValueError, match="the ridge is finite and at least 0, got -1"):
        LowRank.fit(model, own, data, ridge=-1)
    for wrong in ("share", "ridge"):
        with pytest.raises(TypeError, match=rf"nlm\.LowRank: the {wrong} is a number, got 'x'"):
            LowRank.fit(model, own, data, **{wrong: "x"})
    with pytest.raises(TypeError, match=r"nlm\.refit: the ridge is a number, got 'x'"):
        nlm.refit(model, own, data, ridge="x")
    bad = {**data, "b": [data["b"][0] * float("nan")]}
    with pytest.raises(ValueError, match=r"nlm\.LowRank: .*NaN"):
        LowRank.fit(model, own, bad)
    found = LowRank.fit(model, own, data, share=0.5)
    path = tmp_path / "parts.safetensors"
    found.save(path)
    with pytest.raises(ValueError, match="fit the model's entries"):
        LowRank.load(path, nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="fit the model's entries"):
        LowRank.load(path, mlp().double())
    with pytest.raises(FileExistsError):
        found.save(path)


@pytest.mark.parametrize(
    ("tasks", "change", "message"),
    [
        ([], lambda own: {}, "tasks whose names are none or alike"),
        (["a", "a"], lambda own: own, "tasks whose names are none or alike"),
        (["a", "b"], lambda own: {"-1.0.bias": own["0.0.bias"]}, "no '-1'"),
        (["a", "b"], lambda own: own | {"0.0.weight:right": None}, "no '0.weight:right'"),
        (["a", "b"], lambda own: own | {"1.0.weight:left": None}, "no '0.weight:left'"),
        (
            ["a", "b"],
            lambda own: own | {"0.0.weight:both": own["0.0.weight:left"].clone()},
            "fit the model's entries",
        ),
        (
            ["a", "b"],
            lambda own: (
                own
                | {"0.0.weight:left": own["0.0.weight:right"].mT.contiguous()}
                | {"0.0.weight:right": own["0.0.weight:left"].mT.contiguous()}
            ),
            "fit the model's entries",
        ),
    ],
    ids=["no task", "one task twice", "a task from behind", "left", "right", "both", "turned"],
)
def test_a_file_that_is_not_whole_is_named(tasks, change, message, tmp_path):
    model, own, data = mlp(), {t: mlp(s) for s, t in enumerate(TASKS)}, calibration()
    data = {task: [batch.float() for batch in batches] for task, batches in data.items()}
    found, path = LowRank.fit(model, own, data, share=0.5), tmp_path / "parts.safetensors"
    found.save(path)
    parts = {name: t for name, t in change(load_file(path)).items() if t is not None}
    save_file(parts, path, {"nlm": "LowRank", "tasks": json.dumps(tasks)})
    with pytest.raises(ValueError, match=message):
        LowRank.load(path, model)
