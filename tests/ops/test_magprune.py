"""magprune beyond the rules of all operators: chances by rank, parts, long rows, equal entries."""

import numpy as np
import pytest
import torch
from scipy import stats

from nlm._random import RANKED, chances_by_rank
from nlm.ops import magprune
from nlm.ops.dare import random_words
from nlm.ops.magprune import reference

CPU = torch.device("cpu")


def test_the_formula_entry_by_entry() -> None:
    """Written once more in numpy, with a stable argsort."""
    make = torch.Generator().manual_seed(0)
    for length in (1, 2, 31, 32, 33, 40, 500):
        x = torch.randint(-40, 40, (9, length), generator=make).double()
        found = magprune(x, 0.4, 0.3, seed=5, offset=3).numpy()
        for i, row in enumerate(x.numpy()):
            words = random_words(5, 3 + i * length, length, CPU).numpy()
            for rank, place in enumerate(np.argsort(np.abs(row), kind="stable")):
                share = 0.1 + 0.6 * rank / max(1, length - 1)
                kept = words[rank] >= (1 - share) * 2**32
                assert found[i, place] == pytest.approx(row[place] / share if kept else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_in_parts_are_the_whole(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(61, 37, generator=make).to(dtype)
    whole = magprune(x, 0.5, 0.2, seed=5, offset=6)
    for cut in (1, 7, 60):
        parts = [
            magprune(x[begin:end], 0.5, 0.2, seed=5, offset=6 + 37 * begin)
            for begin, end in ((0, cut), (cut, 61))
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_row_is_ranked_in_segments(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(1)
    x = torch.randn(2, RANKED + 1003, generator=make).to(dtype)
    found = magprune(x, 0.5, 0.2, seed=9)
    assert torch.equal(found, reference(x, 0.5, 0.2, 9, 0, True))
    for row in range(2):
        for begin, end in ((0, RANKED), (RANKED, RANKED + 1003)):
            offset = row * x.shape[1] + begin
            part = magprune(x[row : row + 1, begin:end], 0.5, 0.2, seed=9, offset=offset)
            assert torch.equal(found[row, begin:end], part[0])


def test_the_chances_of_ranks() -> None:
    rows, length = 20_000, 5
    x = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) + 0.5
    kept = magprune(x, 0.5, 0.3, seed=1, rescale=False) != 0
    counts = kept.gather(1, x.argsort(1)).sum(0)
    for count, share in zip(counts.tolist(), np.linspace(0.2, 0.8, length), strict=True):
        assert stats.binomtest(count, rows, share).pvalue > 1e-4
    mean = magprune(x, 0.5, 0.3, seed=1).mean() / x.mean()
    assert abs(float(mean) - 1) < 0.02


def test_chances_at_the_ends() -> None:
    least, factors = chances_by_rank(3, 0.5, 0.25, True)
    assert least.tolist() == [3 << 30, 1 << 31, 1 << 30] and factors.tolist() == [4, 2, 4 / 3]
    least, factors = chances_by_rank(3, 1.0, 0.25, True)
    assert least.tolist() == [0, 0, 0] and factors.tolist() == [1, 1, 1]


def test_what_is_no_tensor_and_what_is_differentiated() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(TypeError, match=r"nlm\.magprune: x must be a tensor, got NoneType"):
        magprune(None, 0.5, 0.1, 0)
    with pytest.raises(TypeError, match=r"nlm\.magprune: .* must be detached"):
        torch.func.grad(lambda v: magprune(v, 0.5, 0.1, 0).sum())(x)
    assert not magprune(x.requires_grad_(), 0.5, 0.1, 0).requires_grad
