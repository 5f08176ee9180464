"""Corrections that several processes fit together, each on samples of its own."""

import socket

import pytest
import torch
from _distributed import correct_together, corrections, refit_together, refitted
from _networks import images, vectors


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_two_processes_correct_as_one_does_on_all_samples(tmp_path):
    """Scales and shifts to 1e-12, and the same bits in both processes."""
    a, b = vectors(90, 0).double(), 2 * vectors(70, 1).double() + 1
    parts = [{"a": [a[:20]], "b": [b[:40]]}, {"a": [a[20:50], a[50:]], "b": [b[40:]]}]
    alone = corrections({"a": [a], "b": [b]})
    port = free_port()
    torch.multiprocessing.spawn(correct_together, (port, str(tmp_path), parts), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert alone.keys() == first.keys() == second.keys() and len(alone) > 6
    apart = corrections(parts[0])
    for key, wanted in alone.items():
        for each, found, other in zip(wanted, first[key], second[key], strict=True):
            torch.testing.assert_close(found, each, rtol=1e-12, atol=1e-12)
            assert torch.equal(found, other)
        assert not torch.allclose(apart[key][0], wanted[0], rtol=1e-6)  # all samples count


def test_two_processes_refit_as_one_does_on_all_samples(tmp_path):
    """Weights to 1e-9, and the same bits in both processes; NaN in one of them stops both."""
    a, b = images(90, 0).double(), 2 * images(70, 1).double() + 1
    parts = [{"a": [a[:20]], "b": [b[:40]]}, {"a": [a[20:50], a[50:]], "b": [b[40:]]}]
    alone = refitted({"a": [a], "b": [b]})
    torch.multiprocessing.spawn(refit_together, (free_port(), str(tmp_path), parts), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    apart = refitted(parts[0])
    for name, wanted in alone.items():
        torch.testing.assert_close(first[name], wanted, rtol=1e-9, atol=1e-9)
        assert torch.equal(first[name], second[name])
    assert not torch.allclose(apart["4.weight"], alone["4.weight"], rtol=1e-6)
    bad = [parts[0], {**parts[1], "b": [b[40:] * float("nan")]}]
    with pytest.raises(Exception, match="activations are finite, got NaN or inf"):
        torch.multiprocessing.spawn(refit_together, (free_port(), str(tmp_path), bad), nprocs=2)
