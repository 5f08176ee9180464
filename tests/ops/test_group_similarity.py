"""group_similarity_ against numpy, and what it promises of its own."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nlm._registry import operations
from nlm.ops import group_similarity_, permute


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def test_the_layer_of_weight_matching() -> None:
    """Rows of a layer whose inputs are in the order of the layer before it (Git Re-Basin)."""
    a, b, order = _random(40, 300), _random(40, 300, seed=1), torch.randperm(300)
    out = _zeros(40, 40)
    group_similarity_(out, a, b, [0], indices=[order], axes=[1])
    exact = a.double().numpy() @ b.double().numpy()[:, order.numpy()].T
    np.testing.assert_allclose(out, exact, atol=2e-6 * np.abs(exact).max())


def test_against_numpy_for_random_axes_parents_and_strides() -> None:
    """Axes of all sorts, shuffled strides, gathers with parents, b of other sizes."""
    random = np.random.default_rng(0)
    for case in range(80):
        count = int(random.integers(1, 6))
        sort = random.integers(0, 3, count)  # units, kept, summed
        units, kept = ([int(x) for x in np.flatnonzero(sort == s)] for s in (0, 1))
        shape = random.integers(1, 5, count)
        closed = [x for x in range(count) if x not in units]
        axes = [x for x in closed if random.random() < 0.6]
        parents = [[p for p in closed if p != x and random.random() < 0.4] for x in axes]
        shape_b = shape.copy()
        shape_b[[*units, *axes]] = random.integers(1, 5, len(units) + len(axes))
        tensors = []
        for number, each in enumerate((shape, shape_b)):
            order = random.permutation(count).tolist()
            wide = _random(*(int(each[x]) * 2 for x in order), seed=2 * case + number)
            tensors.append(wide.permute(np.argsort(order).tolist())[tuple(map(slice, each))])
        a, b = tensors
        indices = [
            torch.from_numpy(random.integers(0, shape_b[x], [*shape[own], shape[x]]))
            for x, own in zip(axes, parents, strict=True)
        ]
        sizes = [*shape[kept], *shape[units], *shape_b[units]]
        expected = np.zeros(sizes)
        for i in np.ndindex(*shape):
            source = list(i)
            for x, own, index in zip(axes, parents, indices, strict=True):
                source[x] = int(index[(*(i[p] for p in own), i[x])])
            for j in np.ndindex(*shape_b[units]):
                for x, position in zip(units, j, strict=True):
                    source[x] = position
                at = (*(i[x] for x in kept), *(i[x] for x in units), *j)
                expected[at] += float(a[i]) * float(b[tuple(source)])
        out = _zeros(*(int(size) for size in sizes))
        group_similarity_(out, a, b, units, kept, indices, axes, parents)
        np.testing.assert_allclose(out, expected, atol=1e-5, err_msg=f"{case}: {shape} {sort}")


def test_a_changed_part_is_taken_away_and_added_again() -> None:
    """What weight matching saves: only the terms whose partner changed are computed anew."""
    a, b, old = _random(30, 90), _random(30, 90, seed=1), torch.randperm(90)
    new = old.clone()
    new[[3, 50, 7]] = old[[50, 7, 3]]
    changed = torch.tensor([3, 7, 50])
    out, expected = _zeros(30, 30), _zeros(30, 30)
    group_similarity_(out, a, b, [0], indices=[old], axes=[1])
    for weight, order in ((-1.0, old), (1.0, new)):
        part = a.index_select(1, changed)
        group_similarity_(out, part, b, [0], [], [order[changed]], [1], weight=weight)
    group_similarity_(expected, a, b, [0], indices=[new], axes=[1])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_heads_are_compared_in_all_pairs_into_any_layout() -> None:
    a, b = _random(4, 6, 50), _random(4, 6, 50, seed=1)
    pairs = _zeros(4, 4, 6, 6)
    group_similarity_(pairs.transpose(1, 2), a, b, [0, 1])
    expected = np.einsum("hir,gjr->hgij", a.double(), b.double())
    np.testing.assert_allclose(pairs, expected, atol=1e-5)


@pytest.mark.parametrize("terms", [63, 256, 1000, 5000])
@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
def test_the_worst_case_keeps_the_promised_error(terms: int, value: float) -> None:
    """All terms equal: every sum in float32 rounds the same way."""
    a = torch.full((3, terms), value)
    out = _zeros(3, 3)
    group_similarity_(out, a, a, [0])
    exact = terms * float(a[0, 0]) ** 2
    assert abs(float(out[1, 2]) / exact - 1) < 2e-6


def test_integers_are_exact() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randint(-8, 9, (2, 50, 700), generator=random).float()
    order = torch.randperm(700, generator=random)
    out = _zeros(50, 50)
    group_similarity_(out, a, b, [0], indices=[order], axes=[1])
    (gathered,) = permute([b], [[order]], [[1]])
    assert torch.equal(out, a.double() @ gathered.double().T)


LARGE = {
    "units first": ((300, 900), [0], [], 1),
    "units last": ((900, 300), [1], [], 0),
    "convolution, in": ((90, 300, 3, 3), [1], [], 0),
    "heads": ((10, 30, 900), [0, 1], [], 2),
    "one head each": ((2, 300, 900), [1], [0], 2),
    "in order": ((300, 900), [0], [], None),
    "many terms": ((150, 5000), [0], [], 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_large_products_by_blas(case: str, dtype: torch.dtype) -> None:
    shape, units, kept, axis = LARGE[case]
    a, b = (_random(*shape, seed=seed).to(dtype) for seed in range(2))
    indices = [] if axis is None else [torch.randperm(shape[axis])]
    axes = [] if axis is None else [axis]
    call = (a, b, units, kept, indices, axes)
    sizes = [shape[x] for x in units]
    out, expected = (_zeros(*(shape[x] for x in kept), *sizes, *sizes) for _ in range(2))
    group_similarity_(out, *call, weight=-0.5)
    operation = operations()["group_similarity_"]
    operation.reference(expected, a, b, units, kept, indices, axes, [], [0] * len(axes), -0.5)
    error = (out - expected).abs().max() / expected.abs().max()
    assert error < (1e-14 if dtype == torch.float64 else 1e-6)


def test_products_that_pytorch_may_shorten_are_not_left_to_it() -> None:
    a = _random(300, 900)
    before = torch.get_float32_matmul_precision()
    out = _zeros(300, 300)
    try:
        torch.set_float32_matmul_precision("medium")
        group_similarity_(out, a, a, [0])
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ a.double().T
    assert (out - exact).abs().max() < 1e-6 * exact.max()
