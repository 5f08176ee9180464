"""A correction at run time: threads, users' hooks, tasks, dtypes, devices and files."""

import threading

import numpy as np
import pytest
import torch
from _networks import convnet, mlp, vectors
from torch import nn

import nlm
from nlm.checkpoint import read_tensors, write_tensors

DATA = {"a": [vectors(64, 0)], "b": [vectors(64, 1) * 2]}


def experts() -> dict[str, nn.Module]:
    return {"a": mlp(1), "b": mlp(2)}


def multi_task() -> nn.Module:
    own = experts()
    return nlm.merge(own, mlp(0), scale=0.5, heads=("4",)).model(own["a"])


def test_threads_do_not_mix_corrections():
    model = mlp(0)
    tact, other = (nlm.Tact.fit(model, experts(), DATA, points=p) for p in (["0", "2"], ["2"]))
    x = vectors(64, 5)
    with torch.no_grad():
        plain = model(x)
        expected = {(c, t): c(x, task=t) for c in (tact, other) for t in DATA}
    wrong: list[object] = []

    def work(correction: nlm.Tact, task: str) -> None:
        with torch.no_grad():
            for _ in range(100):
                if not torch.equal(correction(x, task=task), expected[correction, task]):
                    wrong.append(task)

    threads = [threading.Thread(target=work, args=key) for key in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with torch.no_grad():
        assert torch.equal(model(x), plain)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_users_hook_stands_behind_the_correction():
    hooked, own = mlp(0), experts()
    hooked[0].register_forward_hook(lambda module, args, output: 10 * output + 3)
    tact, plain = (nlm.Tact.fit(model, own, DATA, points=["0"]) for model in (hooked, mlp(0)))
    assert torch.equal(tact.correction("0")[0], plain.correction("0")[0])
    several = nlm.Tact.fit(hooked, own, DATA, points=["0"], micro_batch=16)
    torch.testing.assert_close(several.correction("0"), plain.correction("0"))


def test_a_batch_of_several_tasks_on_a_multi_task_model():
    tact = nlm.Tact.fit(multi_task(), experts(), DATA)
    x, ids = vectors(7, 4), torch.tensor([1, 0, 0, 1, 1, 0, 1])
    with torch.no_grad():
        mixed = tact(x, task=ids)
        for number, task in enumerate(DATA):
            torch.testing.assert_close(mixed[ids == number], tact(x[ids == number], task=task))
        assert torch.equal(tact(x, task=[tact.tasks[number] for number in ids]), mixed)
        assert torch.equal(tact(x, task=torch.ones(7).int()), tact(x, task="b"))
    with pytest.raises(ValueError, match="one task id per sample, got 2 for inputs of shapes"):
        tact(x, task=torch.tensor([0, 1]))


def test_every_kind_of_integer_is_a_task_id():
    tact = nlm.Tact.fit(mlp(0), experts(), DATA)
    x = vectors(3)
    ids = np.array([1, 1, 1])
    with torch.no_grad():
        expected = tact(x, task="b")
        for one in (np.int64(1), torch.tensor(1), torch.tensor(1, dtype=torch.int32)):
            assert torch.equal(tact(x, task=one), expected)
        for many in (ids, ids.tolist(), list(ids), torch.tensor(ids).int()):
            torch.testing.assert_close(tact(x, task=many), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_stay_wide(dtype):
    tact = nlm.Tact.fit(mlp(0), experts(), DATA)
    scale, x = tact.correction("0")[0].clone(), vectors(4)
    with torch.no_grad():
        expected = tact(x, task="a")
        tact.to(dtype)
        torch.testing.assert_close(
            tact(x.to(dtype), task="a").float(), expected, rtol=0.1, atol=0.1
        )
    assert tact.correction("0")[0].dtype == max(dtype, torch.float32, key=lambda d: d.itemsize)
    assert torch.equal(tact.correction("0")[0].float(), scale)
    tact.float()
    assert tact(x, task="a").dtype == torch.float32


def test_tables_go_where_the_model_is(tmp_path):
    nlm.Tact.fit(mlp(0), experts(), DATA).save(tmp_path / "tact")
    tact = nlm.Tact.load(tmp_path / "tact", mlp(0).to("meta"))
    assert tact.correction("0")[0].device.type == "meta"
    assert tact(vectors(2).to("meta"), task=["a", "b"]).shape == (2, 5)


def test_files_of_other_things(tmp_path):
    class Mine(nlm.Tact):
        pass

    mine = Mine.fit(mlp(0), experts(), DATA)
    mine.save(tmp_path / "mine")
    again = nlm.Tact.load(tmp_path / "mine", mlp(0))
    assert torch.equal(again.correction("2")[1], mine.correction("2")[1])
    assert type(Mine.load(tmp_path / "mine", mlp(0))) is Mine
    with pytest.raises(ValueError, match="have the model's channels, got 24 for 30 at '0'"):
        nlm.Tact.load(tmp_path / "mine", mlp(0, width=30))
    with pytest.raises(ValueError, match="the points are modules of the model"):
        nlm.Tact.load(tmp_path / "mine", convnet()[:2])
    tensors, metadata = read_tensors(tmp_path / "mine")
    write_tensors(tmp_path / "bare", tensors, {"nlm": "Tact"})
    del tensors["0.shift"]
    write_tensors(tmp_path / "partial", tensors, metadata)
    for name in ("bare", "partial"):
        with pytest.raises(ValueError, match="names its points and rows and has tables"):
            nlm.Tact.load(tmp_path / name, mlp(0))


def test_masked_positions_may_hold_anything():
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval()

    keep = torch.rand(8, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    x = vectors(40, features=3).view(8, 5, 3)
    padded = x.masked_fill(~keep[..., None], float("nan"))
    own = {"a": build(1)}
    clean, masked = (
        nlm.Tact.fit(build(0), own, {"a": [data]}, mask=lambda batch: keep) for data in (x, padded)
    )
    assert torch.equal(clean.correction("0")[0], masked.correction("0")[0])
    padded[keep] = float("nan")
    with pytest.raises(ValueError, match=r"activations are finite, got .* at '0'"):
        nlm.Tact.fit(build(0), own, {"a": [padded]}, mask=lambda batch: keep)


def test_the_point_that_overflows_is_named():
    model, own = mlp(0).double(), {"a": mlp(1).double()}
    with torch.no_grad():
        own["a"][0].weight.mul_(1e60)
    model, data = model.float(), {"a": [vectors()]}
    moments = nlm.correct.expert_moments(own, {"a": [vectors().double()]}, points=["0"])
    with pytest.raises(ValueError, match=r"a correction is finite in torch.float32, got .* of '0'"):
        nlm.Tact.fit(model, own, data, points=["0"], moments=moments)


def test_most_channels_dead():
    model, own = mlp(0), experts()
    for network in (model, *own.values()):
        with torch.no_grad():
            network[0].weight[:20] = 0
            network[0].weight[23] *= 1e-7
    scale = nlm.Tact.fit(model, own, DATA).correction("0")[0]
    assert bool((scale[:, [*range(20), 23]] == 1).all()) and bool((scale[:, 20:23] != 1).all())


def test_the_users_forward_gets_the_whole_batch_and_the_task():
    seen = []

    def forward(model, batch, **kwargs):
        seen.append((sorted(batch), kwargs))
        return model(batch["x"], **kwargs)

    data = {task: [{"x": batches[0], "id": torch.arange(64)}] for task, batches in DATA.items()}
    model, own = multi_task(), experts()
    tact = nlm.Tact.fit(model, own, data, forward=forward)
    expected = nlm.Tact.fit(model, own, DATA)
    for point in expected.points:
        assert torch.equal(tact.correction(point)[0], expected.correction(point)[0])
    assert {tuple(keys) for keys, _ in seen} == {("id", "x")}
    assert {"task": "b"} in [kwargs for _, kwargs in seen] and {} in [kwargs for _, kwargs in seen]


def test_progress_of_a_repair():
    calls = []
    nlm.Repair.fit(mlp(0), experts(), DATA, progress=lambda *call: calls.append(call))
    nlm.Repair.fit(
        mlp(0), {"a": mlp(1)}, {"a": DATA["a"]}, progress=lambda *call: calls.append(call)
    )
    assert calls == [("0", 1, 2), ("2", 2, 2)] * 2
