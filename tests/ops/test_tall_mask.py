"""tall_mask and its siblings beyond the rules of all operators: numpy's packed bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nlm.ops import tall_mask, tall_mask_agreement, tall_mask_apply
from nlm.ops.tall_mask import unpack


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(flags: np.ndarray) -> Tensor:
    return torch.from_numpy(np.packbits(flags, bitorder="little"))


@pytest.mark.parametrize("count", [1, 7, 8, 100, 1003])
def test_bits_are_numpys_in_little_order(count: int) -> None:
    expert, base, merged = (random(count, seed=seed).numpy() for seed in range(3))
    flags = np.abs(expert - base) > np.float32(0.4) * np.abs(expert - merged)
    mask = tall_mask(*map(torch.from_numpy, (expert, base, merged)), 0.4)
    assert torch.equal(mask, packed(flags))
    assert unpack(mask, (count,)).numpy().tolist() == flags.tolist()


def test_an_entry_that_nobody_moved_belongs_to_nobody() -> None:
    x = random(9)
    assert not tall_mask(x, x, x, 0.4).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_applying_is_a_choice_between_bits(dtype: torch.dtype) -> None:
    """Every 16-bit pattern comes out as it went in, also where it is no number."""
    words = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    base = words if dtype.itemsize == 2 else words.repeat(dtype.itemsize // 2)
    merged = base.flip(0)
    base, merged = (x.view(dtype) for x in (base, merged))
    flags = np.random.default_rng(0).random(base.numel()) < 0.5
    out = tall_mask_apply(packed(flags), base, merged)
    bits = [x.view(torch.int16).numpy().reshape(base.numel(), -1) for x in (out, merged, base)]
    assert np.array_equal(bits[0], np.where(flags[:, None], bits[1], bits[2]))


def test_applying_is_the_base_plus_the_masked_vector() -> None:
    base, vector = (torch.arange(60.0).reshape(3, 4, 5) * k for k in (1, 10))
    flags = np.random.default_rng(1).random(60) < 0.5
    out = tall_mask_apply(packed(flags), base, base + vector)
    assert torch.equal(out, base + torch.from_numpy(flags).reshape(base.shape) * vector)


@given(
    tasks=st.integers(1, 20),
    count=st.integers(0, 700),
    least=st.integers(1, 22),
    seed=st.integers(0, 99),
)
def test_agreement_is_numpys_count(tasks: int, count: int, least: int, seed: int) -> None:
    flags = np.random.default_rng(seed).random((tasks, count)) < 0.4
    masks = torch.from_numpy(np.packbits(flags, axis=1, bitorder="little"))
    kept, agreed = tall_mask_agreement(masks, least)
    expected = flags.sum(0) >= least
    assert torch.equal(kept, packed(expected)) and agreed.item() == expected.sum()


def test_compiled_and_exported_applying_is_the_plain_expression() -> None:
    class Choice(torch.nn.Module):
        def forward(self, mask: Tensor, base: Tensor, merged: Tensor) -> Tensor:
            return tall_mask_apply(mask, base, merged)

    args = (torch.tensor([0b101, 1], dtype=torch.uint8), random(3, 3), random(3, 3, seed=1))
    program = torch.export.export(Choice(), args)
    assert not any("nlm" in str(node.target) for node in program.graph.nodes)
    for call in (program.module(), torch.compile(Choice(), backend="eager", fullgraph=True)):
        assert torch.equal(call(*args), tall_mask_apply(*args))


def test_derivatives_under_torch_func() -> None:
    mask, base, merged = torch.tensor([0b101], dtype=torch.uint8), random(3), random(3, seed=1)
    flags = unpack(mask, (3,))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        to_base, to_merged = transform(tall_mask_apply, argnums=(1, 2))(mask, base, merged)
        assert torch.equal(to_base, torch.diag((~flags).float()))
        assert torch.equal(to_merged, torch.diag(flags.float()))
    with pytest.raises(TypeError, match=r"nlm\.tall_mask: .* must be detached"):
        torch.func.jacfwd(lambda x: tall_mask(x, base, merged, 0.4))(merged)


def test_what_is_no_tensor() -> None:
    x = random(3)
    with pytest.raises(TypeError, match=r"nlm\.tall_mask: base must be a tensor, got float"):
        tall_mask(x, 1.0, x, 0.4)
    with pytest.raises(TypeError, match=r"nlm\.tall_mask_apply: mask must be a tensor, got list"):
        tall_mask_apply([1], x, x)
    with pytest.raises(TypeError, match=r"nlm\.tall_mask_agreement: masks must be a tensor, got"):
        tall_mask_agreement([x, x], 1)
