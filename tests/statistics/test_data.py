"""The forms that data may have, and those that are refused."""

import numpy as np
import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn

from nlm.statistics import CrossMoments, collect_cross_moments, collect_moments, run
from nlm.statistics.data import batches, micro_batches


def test_shared_tensors_are_neither_cut_nor_joined():
    def batch(count: int) -> dict[str, torch.Tensor]:
        return {"pos": torch.ones(1, 8), "x": torch.zeros(count, 8), "scale": torch.tensor(2.0)}

    [first, second] = batches([batch(6), batch(6)], 8)
    shapes = {"pos": (1, 8), "scale": (), "x": (2, 8)}
    assert {name: tuple(tensor.shape) for name, tensor in second.items()} == shapes
    assert len(first["x"]) == 6
    for size, counts in ((None, [6, 6, 1]), (4, [4, 2, 4, 2, 1])):
        pieces = micro_batches([batch(6), batch(6), batch(1)], size)
        assert [len(piece["x"]) for piece in pieces] == counts
        assert all(piece["pos"].shape == (1, 8) for piece in pieces)


def test_a_batch_of_unequal_lengths_is_not_cut():
    odd = {"x": torch.zeros(6, 8), "table": torch.zeros(100, 2)}
    [whole] = batches([odd], 6)
    assert len(whole["table"]) == 100
    with pytest.raises(
        ValueError, match="one entry per sample, or one for all, got lengths 6, 100"
    ):
        list(batches([odd], 5))


def test_arrays_stand_for_tensors():
    x, labels = vectors(20), np.arange(20)
    joined = micro_batches([(x[:9], labels[:9]), (x[9:], labels[9:])], None)
    assert len(joined) == 1 and torch.equal(joined[0][1], torch.arange(20))
    found = collect_moments(mlp(), {"0": -1}, [np.flip(x.numpy())])["0"]
    expected = collect_moments(mlp(), {"0": -1}, [x.flip(0, 1)])["0"]
    assert torch.equal(found.mean, expected.mean)


def test_models_that_write_into_their_input():
    class Writing(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    data = [images(4)]
    run(Writing(), data[0])
    run(Writing(), data, lambda model, batch, **kwargs: model(batch[0], **kwargs))
    assert torch.equal(data[0], images(4))


class Loader:
    """Re-iterable; counts how often it is begun."""

    begun = 0

    def __iter__(self):
        self.begun += 1
        return iter([vectors()])


def test_a_loader_is_begun_once():
    loader = Loader()
    list(batches(loader))
    assert loader.begun == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((vectors(), torch.zeros(64)), r"got tuple of tensors .*data=\[\(inputs, labels\)\]"),
        (3, "a re-iterable of batches.*got int"),
        ({"a": 3}, "a re-iterable of batches.*got dict"),
        (vectors, "a re-iterable of batches.*got function"),
        (np.zeros((3, 4)), "a re-iterable of batches.*got ndarray"),
        ([{"a": 3}], "a batch is a tensor.*got dict"),
        ([torch.tensor(3.0)], "a batch is a tensor"),
    ],
)
def test_other_things_are_refused(data, message):
    with pytest.raises(TypeError, match=message):
        list(batches(data))


@pytest.mark.parametrize("count", [0, -1])
def test_at_least_one_sample_is_used(count):
    with pytest.raises(ValueError, match=f"at least one sample is used, got max_samples={count}"):
        list(batches([vectors()], count))


def test_masked_positions_may_be_nan_in_both_streams():
    layer = nn.Sequential(nn.Linear(3, 4))
    keep = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    x = vectors(10, features=3).view(2, 5, 3)
    padded = x.masked_fill(~keep[..., None], float("inf"))
    found, expected = (
        collect_cross_moments(layer, layer, {"0": -1}, [data], mask=lambda batch: keep)["0"]
        for data in (padded, x)
    )
    torch.testing.assert_close(found.comoment, expected.comoment)
    with pytest.raises(ValueError, match=r"activations are finite, got .* at '0'"):
        collect_cross_moments(layer, layer, {"0": -1}, [padded])


def test_progress_and_modules_that_run_otherwise():
    calls: list[int] = []
    data = [images(4), images(4, 1)]
    collect_cross_moments(convnet(0), convnet(1), {"0": 1}, data, progress=calls.append)
    assert calls == [1, 2]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spare = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.layer(self.layer(x))

    with pytest.raises(ValueError, match="runs once in both models, got other runs of 'layer'"):
        collect_cross_moments(Twice(), Twice(), {"layer": -1}, [vectors()])
    with pytest.raises(ValueError, match="runs on the data, got no run of spare"):
        collect_moments(Twice(), {"spare": -1}, [vectors()])


def test_a_pair_and_a_stream_against_itself_have_no_sum():
    with pytest.raises(ValueError, match="have no sum, got one of each"):
        CrossMoments.zeros(6, 6) + CrossMoments.zeros(6)
