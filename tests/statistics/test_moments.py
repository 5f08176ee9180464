"""Streamed moments equal those of all samples at once."""

import socket

import pytest
import torch
from _distributed import align_together, reduce_moments
from _networks import convnet, images, mlp, vectors

import nlm
from nlm.align import AlignmentResult
from nlm.statistics import CrossMoments, Moments, collect_cross_moments, collect_moments


def stream(seed: int = 0, samples: int = 4000, channels: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, channels, generator=generator) @ torch.randn(
        channels, channels, generator=generator
    )
    return (1e4 + mixed / mixed.std(0)).float()  # mean 1e4 and standard deviation 1


@pytest.mark.parametrize(
    "sizes", [[1] * 40 + [3960], [500] * 8, [4000], [1, 3999], [7] * 571 + [3]]
)
def test_a_stream_far_from_zero(sizes):
    x, y = stream(0), stream(1)
    y = y + 0.5 * (x - 1e4)
    moments, cross = None, CrossMoments.zeros(6, 6)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        moments = Moments.of(a) if moments is None else moments + Moments.of(a)
        cross.update(a, b)
    exact = x.double()
    assert int(moments.count) == int(cross.count) == 4000
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, exact.var(0, unbiased=False), rtol=1e-6, atol=0)
    torch.testing.assert_close(cross.x.variance, exact.var(0, unbiased=False), rtol=1e-6, atol=0)
    expected = torch.corrcoef(torch.cat([x, y], 1).double().T)[:6, 6:]
    torch.testing.assert_close(cross.correlation(), expected, rtol=0, atol=2e-6)


def test_sums_of_parts():
    x, y = stream(2), stream(3)
    whole, first, second = (CrossMoments.zeros(6, 6) for _ in range(3))
    whole.update(x, y)
    first.update(x[:1234], y[:1234])
    second.update(x[1234:], y[1234:])
    for name, tensor in (first + second).tensors().items():
        # a co-moment is as exact as its channels' own moments are large
        limit = 2e-6 * float(whole.m2_x.max()) if name == "comoment" else 0
        torch.testing.assert_close(tensor, whole.tensors()[name], rtol=1e-6, atol=limit)
    empty = CrossMoments.zeros(6, 6)
    for name, tensor in (first + empty).tensors().items():
        assert torch.equal(tensor, first.tensors()[name])


def test_a_stream_against_itself():
    x = stream(4)
    cross = CrossMoments.zeros(6)
    cross.update(x)
    assert torch.equal(cross.comoment, cross.comoment.T)
    torch.testing.assert_close(cross.comoment.diagonal(), cross.m2_x, rtol=1e-6, atol=0)


def test_dead_channels_correlate_with_nothing():
    x, y = stream(5), stream(6)
    x[:, 2] = 1e4
    y[:, 4] = 0
    cross = CrossMoments.zeros(6, 6)
    cross.update(x, y)
    correlation = cross.correlation()
    assert torch.isfinite(correlation).all()
    assert not correlation[2].any() and not correlation[:, 4].any()


def test_files(tmp_path):
    moments = Moments.of(stream(7))
    moments.save(tmp_path / "moments.safetensors")
    again = Moments.load(tmp_path / "moments.safetensors")
    assert all(torch.equal(again.tensors()[n], tensor) for n, tensor in moments.tensors().items())
    with pytest.raises(ValueError, match="a file of CrossMoments is read, got Moments"):
        CrossMoments.load(tmp_path / "moments.safetensors")


def test_a_walk_collects_what_the_modules_compute():
    model, data = convnet(), [images(20, seed) for seed in range(3)]
    points = {"0": 1, "3": 1, "8": -1}
    found = collect_moments(model, points, data)
    outputs = {}
    for name in points:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.__setitem__(name, out.detach().clone())
        )
    model(torch.cat(data))
    for name in points:
        exact = outputs[name].double().movedim(1, 0).flatten(1)
        torch.testing.assert_close(found[name].variance, exact.var(1, unbiased=False))
        assert int(found[name].count) == exact.shape[1]


def test_a_walk_takes_every_form_of_batch_and_cuts_it():
    model, x = convnet(), images(20)
    labels = torch.zeros(20)
    whole = collect_moments(model, {"8": -1}, [x[:13]])["8"]
    for data in ([(x, labels)], [[x, labels]], [x[:5], x[5:]]):
        part = collect_moments(model, {"8": -1}, data, max_samples=13)["8"]
        torch.testing.assert_close(part.m2, whole.m2)
    named = collect_moments(model, {"8": -1}, [{"input": x[:13]}])["8"]
    assert torch.equal(named.m2, whole.m2)
    custom = collect_moments(model, {"8": -1}, [("id", x)], max_samples=None,
                             forward=lambda model, batch: model(batch[1][:13]))  # fmt: skip
    assert torch.equal(custom["8"].m2, whole.m2)


def test_a_mask_leaves_positions_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    x = torch.randn(2, 5, 3)
    keep = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    found = collect_moments(model, {"0": -1}, [x], mask=lambda batch: keep)["0"]
    exact = model(x)[keep].double()
    assert int(found.count) == 7
    torch.testing.assert_close(found.variance, exact.var(0, unbiased=False))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "holds at least one sample, got none"),
        ([torch.zeros(0, 1, 8, 8)], ValueError, "holds at least one sample"),
        (iter([images()]), TypeError, "a re-iterable of batches"),
        (images(), TypeError, "a re-iterable of batches.*got Tensor"),
        ([3], TypeError, "a batch is a tensor"),
        ([images().fill_(float("nan"))], ValueError, "activations are finite, got .* at '0'"),
    ],
)
def test_bad_data(data, error, message):
    with pytest.raises(error, match=message):
        collect_moments(convnet(), {"0": 1}, data)


def test_models_come_back_as_they_were_after_an_exception():
    first, second = convnet(0).train(), convnet(1)
    first[1].eval()
    with pytest.raises(ValueError):
        collect_cross_moments(first, second, {"0": 1}, [images().fill_(float("inf"))])
    assert first.training and not first[1].training and not second.training
    assert not any(m._forward_hooks for net in (first, second) for m in net.modules())
    with pytest.raises(ValueError, match="a point is the name of a module of the model, got 'no'"):
        collect_moments(first, {"no": 1}, [images()])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_align_on_shares_of_the_data(tmp_path):
    """As one process does on all of it: correlations to 1e-12."""
    x = vectors(400)
    parts = [x[:150], x[150:]]
    torch.multiprocessing.spawn(align_together, (free_port(), str(tmp_path), parts), nprocs=2)
    first, second = mlp(0), mlp(1)
    spec = nlm.trace(first, x[:150])
    alone = nlm.align(first, second, spec, "activations", data=[*parts])
    for rank in range(2):
        found = AlignmentResult.load(tmp_path / f"{rank}.safetensors")
        assert found.report.samples == alone.report.samples
        assert all(torch.equal(found.permutation[g], p) for g, p in alone.permutation.items())
        for group, similarity in alone.similarity.items():
            assert (found.similarity[group] - similarity).abs().max() < 1e-12


def test_moments_of_two_processes_add_up(tmp_path):
    port = free_port()
    x = stream(8)
    parts = [x[:1000], x[1000:]]
    torch.multiprocessing.spawn(reduce_moments, (port, str(tmp_path), parts), nprocs=2)
    expected = Moments.of(parts[0]) + Moments.of(parts[1])
    for rank in range(2):
        found = Moments.load(tmp_path / f"{rank}.safetensors")
        torch.testing.assert_close(found.m2, expected.m2, rtol=1e-12, atol=0)
