"""Tensor descriptors: what they may stand for, and the kernels that read by them."""

import pytest
import torch
from _triton_interpreter import interpreted

from nlm.ops._channels import channels_view

pytest.importorskip("triton", reason="triton is not installed")
_descriptors = pytest.importorskip("nlm.kernels._descriptors")


def fits(x: torch.Tensor, dim: int, block: tuple[int, int] = (64, 32)) -> bool:
    rows = _descriptors.as_rows(channels_view(x, dim))
    return rows is not None and _descriptors.fits(rows, block)


def test_interpreted() -> None:
    results = interpreted("descriptors", NLM_TMA="1")
    assert len(results) == 3 * 5 + 1 + 5 + 2
    for result in results:
        assert result["count"] and result["specials"], result
        assert result["m2"] <= 1e-6, result
        assert result.get("mean", 0.0) <= 1e-6, result
        assert result.get("comoment", 0.0) <= 2e-6, result
        assert result.get("symmetric", True) and result.get("diagonal", True), result


def test_channels_side_by_side_in_16_bytes_fit() -> None:
    rows = torch.empty(10, 32)
    assert fits(rows, 1)
    assert fits(rows[::2, 4:], 1)
    assert fits(rows.bfloat16()[:, 8:], 1)
    assert fits(torch.empty(3, 7, 24), 2)
    assert fits(torch.empty(2, 8, 3, 5).to(memory_format=torch.channels_last), 1)


def test_what_tma_cannot_copy_does_not_fit() -> None:
    rows = torch.empty(10, 32)
    assert not fits(rows[:, 1:], 1)  # begins between two multiples of 16 bytes
    assert not fits(torch.empty(10, 31), 1)  # rows are not a multiple of 16 bytes apart
    assert not fits(rows[:, ::2], 1)
    assert not fits(rows.double(), 1)
    assert not fits(rows[:1].expand(10, 32), 1)
    assert not fits(torch.empty(2, 8, 4, 8), 1)  # channels are not side by side
    assert not fits(torch.empty(4, 8, 3, 5).to(memory_format=torch.channels_last)[::2], 1)
    assert not fits(rows, 1, (512, 8))
    assert not fits(rows, 1, (64, 2))


def test_only_asked_for_and_from_sm_90_on() -> None:
    assert not _descriptors.ASKED_FOR
    assert _descriptors.descriptor(torch.empty(64, 32), (64, 32)) is None
    found = {each: _descriptors.has_tma(each) for each in ((8, 0), (8, 9), (9, 0), (10, 0))}
    assert found == {(8, 0): False, (8, 9): False, (9, 0): True, (10, 0): True}
