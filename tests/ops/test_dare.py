"""dare beyond the rules of all operators: Random123's known answers, chunks, layouts, chances."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nlm._random import philox
from nlm.ops import dare
from nlm.ops.dare import random_words

# Counter, key, and the output of philox4x32-10: Random123's kat_vectors.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def kept(count: int, drop: float, seed: int, offset: int = 0) -> Tensor:
    """Which entries the operation keeps."""
    return dare(torch.ones(count), torch.zeros(count), drop, seed, offset, rescale=False).bool()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    drawn = philox([torch.tensor([word]) for word in counter], key)
    assert [word.item() for word in drawn] == list(words)
    drawn = philox([np.array([word]) for word in counter], key)
    assert [word.item() for word in drawn] == list(words)


@pytest.mark.parametrize("seed", [0, 1, 0x299F31D0A4093822, 2**63 - 1])
@pytest.mark.parametrize("offset", [0, 3, 4 * (2**32 - 3) + 1, 2**62])
def test_kernel_draws_numpys_philox(seed: int, offset: int) -> None:
    """The same algorithm once more in numpy's integers, at the median of its words."""

    def rounds(counter: int) -> list[int]:
        x0, x1, x2, x3 = counter & 0xFFFFFFFF, counter >> 32, 0, 0
        key0, key1 = seed & 0xFFFFFFFF, seed >> 32
        for _ in range(10):
            a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
            x0, x1, x2, x3 = (
                (b >> 32) ^ x1 ^ key0, b & 0xFFFFFFFF, (a >> 32) ^ x3 ^ key1, a & 0xFFFFFFFF,
            )  # fmt: skip
            key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
        return [x0, x1, x2, x3]

    expected = [word for c in range(offset // 4, offset // 4 + 260) for word in rounds(c)]
    expected = expected[offset % 4 :][:1030]
    assert random_words(seed, offset, 1030, torch.device("cpu")).tolist() == expected
    for drop in (0.25, 0.5, 0.9):
        assert kept(1030, drop, seed, offset).tolist() == [w >= drop * 2**32 for w in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_chunks_are_the_whole(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    expert, base = torch.randn(2, 100_003, generator=make, dtype=torch.float64).to(dtype)
    whole = dare(expert, base, 0.6, seed=5, offset=6)
    for cut in (1, 2, 1023, 32768, 99_999):
        parts = [
            dare(expert[begin:end], base[begin:end], 0.6, seed=5, offset=6 + begin)
            for begin, end in ((0, cut), (cut, 100_003))
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_layout_does_not_matter() -> None:
    expert, base = torch.ones(6, 10), torch.zeros(6, 10)
    turned = dare(expert.T.contiguous().T, base, 0.5, seed=1)
    assert turned.is_contiguous() and torch.equal(turned, dare(expert, base, 0.5, seed=1))


def test_entries_are_the_bases_or_rescaled() -> None:
    make = torch.Generator().manual_seed(1)
    expert, base = torch.randn(2, 1001, generator=make)
    choice = kept(1001, 0.7, seed=3)
    out = dare(expert, base, 0.7, seed=3)
    assert torch.equal(out[~choice], base[~choice])
    moved = base.numpy() + np.float32(1 / (1 - 0.7)) * (expert - base).numpy()
    assert np.array_equal(out[choice].numpy(), moved[choice.numpy()])
    plain = dare(expert, base, 0.7, seed=3, rescale=False)
    assert torch.equal(plain, torch.where(choice, base + (expert - base), base))
    assert torch.equal(dare(expert, base, 0.0, seed=3), base + (expert - base))


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9, 0.99])
def test_share_and_expected_value(drop: float) -> None:
    """Within five standard deviations, of neighbours and of neighbouring seeds too."""
    count = 400_000
    first, second = kept(count, drop, seed=0), kept(count, drop, seed=1)
    p = 1 - drop
    for flags, share in (
        (first, p), (first[1:] & first[:-1], p * p), (first[4:] & first[:-4], p * p),
        (first & second, p * p),
    ):  # fmt: skip
        deviation = (share * (1 - share) * 3 / count) ** 0.5  # overlapping pairs: at most 3 times
        assert abs(flags.double().mean().item() - share) < 5 * deviation
    out = dare(torch.full((count,), 3.0), torch.ones(count), drop, seed=0)
    assert abs(out.double().mean().item() - 3) < 10 * (drop / p / count) ** 0.5


def test_what_is_no_tensor_and_what_is_differentiated() -> None:
    x = torch.ones(3)
    with pytest.raises(TypeError, match=r"nlm\.dare: base must be a tensor, got NoneType"):
        dare(x, None, 0.5, 0)
    with pytest.raises(TypeError, match=r"nlm\.dare: .* must be detached"):
        torch.func.grad(lambda e: dare(e, x, 0.5, 0).sum())(x)
    assert not dare(x.requires_grad_(), x, 0.5, 0).requires_grad
