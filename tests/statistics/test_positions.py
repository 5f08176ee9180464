"""Positions that count: masks that fit, strides and most tokens, memory that does not grow."""

import gc
from collections.abc import Iterator

import pytest
import torch
from _networks import convnet, images
from torch import Tensor, nn

from nlm.statistics import (
    CrossMoments,
    attention_mask,
    collect_cross_moments,
    observe,
    tokens_except,
)
from nlm.statistics.positions import Positions


def taken(shape: tuple[int, ...], mask: Tensor | None = None, **more: int) -> Tensor | None:
    """The positions of the first batch's outputs of that shape, channels last."""
    positions = Positions(lambda batch: mask, **more)
    positions.begin(None)
    return positions.of(torch.zeros(*shape, 3), -1)


def test_one_position_of_every_stride_is_drawn():
    found = taken((5, 16), stride=4)
    assert found.reshape(20, 4).sum(1).eq(1).all()
    assert torch.equal(found, taken((5, 16), stride=4))
    assert not torch.equal(found, taken((5, 16), stride=4, seed=1))
    assert len(set(found.nonzero()[:, 1].tolist())) > 8  # of 16 places in a sequence
    assert int(taken((5, 16), stride=4, max_tokens=7).sum()) == 7
    assert int(taken((3, 1), stride=2).sum()) == 2
    assert taken((5, 16)) is None and taken((5, 16), max_tokens=80) is None


def test_only_what_the_mask_counts_is_drawn():
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    found = taken((6, 9), mask, stride=3)
    assert not (found & ~mask).any()
    assert int(found.sum()) == -(-int(mask.sum()) // 3)
    assert not taken((6, 9), torch.zeros(6, 9, dtype=torch.bool), stride=3).any()


def test_a_mask_fits_outputs_of_other_forms():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    assert torch.equal(taken((2, 3), mask), mask)
    assert torch.equal(taken((6,), mask), mask.reshape(-1))
    assert taken((2,), mask).tolist() == [True, False]
    assert torch.equal(taken((2, 3, 4), mask), mask[..., None].expand(2, 3, 4))
    with pytest.raises(ValueError, match=r"bool \[2, 3\] for outputs with positions \[2, 4\]"):
        taken((2, 4), mask)
    with pytest.raises(ValueError, match=r"got torch.int64 \[2, 3\]"):
        taken((2, 3), mask.long())


def test_masks_of_batches_by_name():
    ids, seen = torch.tensor([[1, 7, 2, 0]]), torch.tensor([[1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": seen}
    assert attention_mask(batch).tolist() == [[True, True, True, False]]
    assert attention_mask({"input_ids": ids}) is None and attention_mask(ids) is None
    assert attention_mask({**batch, "decoder_input_ids": ids}) is None
    assert tokens_except([1, 2])(batch).tolist() == [[False, True, False, False]]
    assert tokens_except([1])((ids, None)).tolist() == [[False, True, True, True]]
    assert tokens_except([])(ids).all()


@pytest.mark.parametrize(("point", "dim"), [("3", 1), ("8", -1)])
def test_both_models_are_seen_at_the_same_positions(point, dim, monkeypatch):
    monkeypatch.setattr(observe, "_AT_ONCE", 1)  # the sums of every batch, to the bit
    first, second, data = convnet(0), convnet(1), [images(16, 0), images(8, 1)]
    found = collect_cross_moments(first, second, {point: dim}, data, stride=3, seed=5)[point]
    positions, expected = Positions(stride=3, seed=5), CrossMoments.zeros(*found.comoment.shape)
    for batch in data:
        outputs = [net[: int(point) + 1](batch).detach() for net in (first, second)]
        positions.begin(batch)
        rows = positions.of(outputs[0], dim)
        expected.update(*(output.movedim(dim, -1)[rows] for output in outputs))
    assert int(found.count) == sum(-(-(len(x) * (16 if dim == 1 else 1)) // 3) for x in data)
    assert torch.equal(found.comoment, expected.comoment)
    same = collect_cross_moments(first, first, {point: dim}, data, max_tokens=8)[point]
    assert same.correlation().diagonal().sort().values[4:].allclose(torch.ones(()).double())


@pytest.mark.parametrize("most", [1, 40, 10**6])
def test_positions_that_are_summed_together_are_those_of_all_batches(most, monkeypatch):
    """However many wait for one another; those of the last batches are not forgotten."""
    model, other = convnet(0).eval(), convnet(1).eval()
    data = [images(n, seed=n) for n in (8, 1, 5)]
    monkeypatch.setattr(observe, "_AT_ONCE", most)
    [found] = collect_cross_moments(model, other, {"0": 1}, data, stride=3).values()
    positions, parts = Positions(stride=3), ([], [])
    for batch in data:
        positions.begin(batch)
        for each, part in zip((model, other), parts, strict=True):
            output = each[0](batch)
            part.append(output.movedim(1, -1)[positions.of(output, 1)].detach())
    x, y = (torch.cat(part).double() for part in parts)
    assert int(found.count) == len(x)
    wanted = (x - x.mean(0)).T @ (y - y.mean(0))
    torch.testing.assert_close(found.comoment, wanted, rtol=1e-5, atol=1e-4)


def test_batches_with_other_channels_are_refused_by_name():
    net, data = nn.Identity(), [torch.randn(4, 5, channels) for channels in (6, 7)]
    with pytest.raises(ValueError, match=r"nlm\..* must have shape"):
        collect_cross_moments(net, net, {"": -1}, data, stride=2)


def test_precision_is_that_of_the_operation():
    net, data = convnet(), [images()]
    exact, rough = (
        collect_cross_moments(net, net, {"3": 1}, data, precision=each)["3"].comoment
        for each in ("float32", "bf16")
    )
    assert (exact - rough).abs().max() <= 1e-2 * exact.abs().max()
    with pytest.raises(ValueError, match="precision must be one of float32, bf16x3, bf16"):
        collect_cross_moments(net, net, {"3": 1}, data, precision="half")


@pytest.mark.parametrize("options", [{"stride": 0}, {"max_tokens": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="one position of every stride is taken, and at least one"):
        collect_cross_moments(convnet(), convnet(), {"3": 1}, [images()], **options)


def alive() -> int:
    """The bytes of all tensors."""
    tensors = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
    storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in tensors}
    return sum(each.nbytes() for each in storages.values())


class Stream:
    """Batches made as they are asked for; notes the bytes of all tensors alive before each."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.alive: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.length):
            self.alive.append(alive())
            yield images(64, number)


def test_memory_does_not_grow_with_the_data():
    """Positions wait for those of other batches, eight of them at "6", not for all."""
    data = Stream(32)
    found = collect_cross_moments(convnet(0), convnet(1), {"3": 1, "6": 1}, data, stride=2)
    assert int(found["3"].count) == 32 * 64 * 16 // 2
    assert max(data.alive[16:]) <= max(data.alive[:16])


def test_a_mask_of_other_positions_is_named():
    net = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"nlm.align: a mask is bool over the positions"):
        collect_cross_moments(
            net, net, {"0": -1}, [torch.ones(2, 5, 3)], caller="nlm.align",
            mask=lambda batch: torch.ones(5, 2, dtype=torch.bool),
        )  # fmt: skip
