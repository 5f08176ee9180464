"""permute and permute_add_ against numpy's indexing."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from nlm.ops import permute, permute_add_

DTYPES = [
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
]  # fmt: skip


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(shape, generator=generator)).to(dtype)


def _permutation(*shape: int, seed: int = 0) -> Tensor:
    """Independent permutations of the last size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).argsort(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_size(dtype: torch.dtype) -> None:
    x, rows, columns = _random((13, 37), dtype), _permutation(13), _permutation(37)
    both, first, last = permute([x] * 3, [[rows, columns], [rows], [columns]], [[0, 1], [0], [-1]])
    assert torch.equal(both, x[rows][:, columns])
    assert torch.equal(first, x[rows])
    assert torch.equal(last, x[:, columns])
    assert both.dtype == dtype and both.is_contiguous()


def test_against_numpy_for_random_axes_parents_and_strides() -> None:
    """Each case is written out element by element: j_a = index_a[i_parents, i_a]."""
    random = np.random.default_rng(0)
    for case in range(60):
        shape = tuple(random.choice([1, 2, 3, 4], size=random.integers(1, 5)).tolist())
        order = random.permutation(len(shape)).tolist()
        wide = _random(tuple(shape[a] * 2 for a in order), torch.float32, seed=case)
        x = wide.permute(np.argsort(order).tolist())[tuple(slice(n) for n in shape)]
        assert x.shape == shape
        axes = [a for a in range(len(shape)) if random.random() < 0.6]
        parents = [
            [p for p in random.permutation(len(shape)).tolist() if p != a and random.random() < 0.4]
            for a in axes
        ]
        indices = [
            torch.from_numpy(random.integers(0, shape[a], [*(shape[p] for p in own), shape[a]]))
            for a, own in zip(axes, parents, strict=True)
        ]
        expected = np.empty(shape, np.float32)
        for i in itertools.product(*map(range, shape)):
            j = list(i)
            for a, own, index in zip(axes, parents, indices, strict=True):
                j[a] = index[(*(i[p] for p in own), i[a])]
            expected[i] = x[tuple(j)]
        (result,) = permute([x], [indices], [axes], [parents])
        assert np.array_equal(result, expected), (shape, axes, parents)


def test_features_permuted_within_their_head() -> None:
    """Rows of an attention projection: heads, then the features of the head that is read."""
    heads, features = _permutation(4), _permutation(4, 8, seed=1)
    weight = _random((32, 10), torch.float32)
    view = weight.view(4, 8, 10)
    (result,) = permute([view], [[heads, features]], [[0, 1]], [[(), (0,)]])
    expected = np.concatenate([view[heads[h], features[h]] for h in range(4)])
    assert np.array_equal(result.view(32, 10), expected)


def test_experts_with_a_permutation_each() -> None:
    experts, hidden = _permutation(5), _permutation(5, 7, seed=1)
    up, down = _random((5, 7, 6), torch.bfloat16), _random((5, 6, 7), torch.bfloat16, seed=1)
    new_up, new_down = permute(
        [up, down], [[experts, hidden]] * 2, [[0, 1], [0, 2]], [[(), (0,)]] * 2
    )
    for e in range(5):
        assert torch.equal(new_up[e], up[experts[e]][hidden[e]])
        assert torch.equal(new_down[e], down[experts[e]][:, hidden[e]])


def test_a_parent_may_follow_its_axis() -> None:
    x, index = _random((6, 4), torch.float32), _permutation(4, 6)
    (result,) = permute([x], [[index]], [[0]], [[[1]]])
    assert torch.equal(result, torch.stack([x[index[c], c] for c in range(4)], 1))


def test_inverse_gives_the_tensors_back() -> None:
    tensors = [_random((64, 48, 3, 3), torch.float32), _random((64,), torch.float32, seed=1)]
    out_channels, in_channels = _permutation(64), _permutation(48, seed=1)
    there = permute(tensors, [[out_channels, in_channels], [out_channels]], [[0, 1], [0]])
    back = permute(there, [[out_channels.argsort(), in_channels.argsort()],
                           [out_channels.argsort()]], [[0, 1], [0]])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True))
    assert not torch.equal(there[0], tensors[0])


def test_nothing_gathered_is_a_copy() -> None:
    x = _random((5, 4), torch.float32).T
    scalar, empty = torch.tensor(3.0), torch.empty(0, 3)
    copies = permute([x, scalar, empty], [[], [], []], [[], [], []])
    assert all(torch.equal(a, b) for a, b in zip(copies, [x, scalar, empty], strict=True))
    assert copies[0].data_ptr() != x.data_ptr() and copies[0].is_contiguous()
    assert permute([], [], []) == []


def test_ranges_of_many_and_of_large_tensors() -> None:
    """Tensors that are cut inside a row, inside a plane, and not at all, in one call."""
    long, plane = _random((300_001,), torch.int16), _random((3, 700, 331), torch.float32)
    small = [_random((n,), torch.float64, seed=n) for n in range(1, 40)]
    order = [_permutation(n, seed=n) for n in range(1, 40)]
    index, columns = _permutation(300_001), _permutation(3, 331)
    result = permute(
        [long, plane, *small], [[index], [columns], *([p] for p in order)],
        [[0], [2], *([0] for _ in small)], [[()], [(0,)], *([()] for _ in small)],
    )  # fmt: skip
    assert torch.equal(result[0], long[index])
    expected = torch.stack([plane[b][:, columns[b]] for b in range(3)])
    assert torch.equal(result[1], expected)
    for x, p, gathered in zip(small, order, result[2:], strict=True):
        assert torch.equal(gathered, x[p])


def test_short_rows_are_taken_together() -> None:
    """Trailing axes whose offsets are computed once: kernels of 3x3, heads of input features."""
    out_channels, in_channels = _permutation(70), _permutation(20)
    convolution = _random((70, 20, 3, 3), torch.float32)
    heads, features = _permutation(5), _permutation(5, 8)
    projection = _random((300, 5, 8), torch.float32)
    # The index of the rows depends on the head: here the heads cannot be taken with the features.
    rows = _permutation(5, 300)
    results = permute(
        [convolution, projection, projection, convolution.view(70, 20, 9, 1)],
        [[out_channels, in_channels], [heads, features], [rows, features], [in_channels]],
        [[0, 1], [1, 2], [0, 2], [1]],
        [[(), ()], [(), (1,)], [(1,), (1,)], [()]],
    )
    head = torch.arange(5)[:, None]
    assert torch.equal(results[0], convolution[out_channels][:, in_channels])
    assert torch.equal(results[1], projection[:, heads[:, None], features])
    assert torch.equal(results[2], projection[rows.T[..., None], head, features])
    assert torch.equal(results[3].view(70, 20, 3, 3), convolution[:, in_channels])


def test_strides_beyond_two_to_the_31() -> None:
    stride = 2**30 + 48  # the last row begins behind element 2^31; untouched pages take no memory
    storage = torch.empty(2 * stride + 64, dtype=torch.int8)
    x = storage.as_strided((3, 64), (stride, 1))
    x.copy_(_random((3, 64), torch.int8))
    rows, columns = torch.tensor([2, 0, 1]), _permutation(64)
    (result,) = permute([x], [[rows, columns]], [[0, 1]])
    assert torch.equal(result, x.contiguous()[rows][:, columns])


def test_an_expanded_tensor_is_read_in_place() -> None:
    x = _random((1, 9), torch.float32).expand(2**33, 9)[-4:]
    (result,) = permute([x], [[_permutation(9)]], [[1]])
    assert torch.equal(result, x[:, _permutation(9)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("axes", [[], [0], [1], [0, 1]])
def test_add_rounds_as_plain_arithmetic_does(dtype: torch.dtype, axes: list[int]) -> None:
    x, out = _random((19, 45), dtype), _random((19, 45), dtype, seed=1)
    index = [_permutation(19), _permutation(45)]
    (gathered,) = permute([x], [[index[a] for a in axes]], [axes])
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (out.to(exact) + gathered.to(exact) * torch.tensor(0.3, dtype=exact)).to(dtype)
    permute_add_([out], [x], [[index[a] for a in axes]], [axes], weights=0.3)
    assert torch.equal(out, expected)


def test_add_with_a_weight_per_tensor_and_strided_sources() -> None:
    sources = [_random((8, 6), torch.float32).T, _random((5,), torch.float64)]
    out = [torch.ones(6, 8), torch.ones(5, dtype=torch.float64)]
    rows, order = _permutation(6), _permutation(5)
    permute_add_(out, sources, [[rows], [order]], [[0], [0]], weights=[2.0, -1.0])
    assert torch.equal(out[0], 1 + sources[0][rows] * 2)
    assert torch.equal(out[1], 1 - sources[1][order])


@pytest.mark.parametrize(
    ("value", "label"), [(3, "0 to 3"), (-1, "-1 to 2"), (2**40, "0 to 10995")]
)
def test_an_index_out_of_range_is_refused_before_any_read(value: int, label: str) -> None:
    index = torch.tensor([0, value, 2])
    message = rf"nlm\.permute: the values of an index must lie in \[0, 3\), got {label}"
    with pytest.raises(ValueError, match=message + r".* for axis 1 of tensor 1"):
        permute([torch.ones(2), torch.ones(2, 3)], [[], [index]], [[], [1]])


X, Y, OUT = torch.ones(4), torch.ones(4), torch.zeros(4)
INTEGERS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("out", "tensors", "index", "overlap"),
    [
        ([X], [X], [], r"out\[0\] with tensors\[0\]"),
        ([OUT, Y], [Y, X], [], r"out\[1\] with tensors\[0\]"),
        ([OUT, OUT], [X, Y], [], r"out\[\d\] with out\[\d\]"),
        (
            [INTEGERS.view(torch.float64)],
            [torch.ones(4, dtype=torch.float64)],
            [INTEGERS],
            r"out\[0\] with the index of axis 0 of tensor 0",
        ),
    ],
)
def test_add_refuses_an_overlap(
    out: list[Tensor], tensors: list[Tensor], index: list[Tensor], overlap: str
) -> None:
    """With the other item's source, another out and an index, as with its own source."""
    own = [index] * len(out), [[0]] * len(out) if index else [[]] * len(out)
    before = [x.clone() for x in out]
    with pytest.raises(ValueError, match="must not share memory .* overlap of " + overlap):
        permute_add_(out, tensors, *own)
    assert all(torch.equal(a, b) for a, b in zip(out, before, strict=True))


def test_add_takes_neighbours_in_one_storage() -> None:
    storage = torch.arange(12.0)
    first, source, second = storage.split(4)
    permute_add_([first, second], [source, source], [[], []], [[], []])
    assert storage.tolist() == [4, 6, 8, 10, 4, 5, 6, 7, 12, 14, 16, 18]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_written_to_and_returned(dtype: torch.dtype) -> None:
    tensors = [_random((13, 1037), dtype).T, _random((5,), dtype)]
    rows, order = _permutation(1037), _permutation(5)
    out = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors]
    found = permute(tensors, [[rows], [order]], [[0], [0]], out=out)
    assert all(a is b for a, b in zip(found, out, strict=True))
    assert torch.equal(out[0], tensors[0][rows]) and torch.equal(out[1], tensors[1][order])
    assert permute([], [], [], out=[]) == []


def test_out_refuses_what_it_would_lose() -> None:
    """Another length, memory that is read, a gradient; nothing is written then."""
    x = torch.arange(4.0)
    call = [x], [[]], [[]]
    with pytest.raises(ValueError, match=r"nlm\.permute_out_: .* one length, got 0 and 1"):
        permute(*call, out=[])
    with pytest.raises(ValueError, match=r"nlm\.permute_out_: .* one length, got 1 and 0"):
        permute([], [], [], out=[x])
    with pytest.raises(ValueError, match=r"nlm\.permute_out_: .* overlap of out\[0\] with tensors"):
        permute([x], [[torch.tensor([3, 2, 1, 0])]], [[0]], out=[x])
    with pytest.raises(ValueError, match=r"nlm\.permute_out_: out\[0\] .*got requires_grad True"):
        permute(*call, out=[torch.zeros(4, requires_grad=True)])
    assert x.tolist() == [0, 1, 2, 3]


def test_results_require_no_gradient() -> None:
    x, index = torch.ones(3, requires_grad=True), torch.tensor([2, 0, 1])
    assert not permute([x], [[index]], [[0]])[0].requires_grad
    out = torch.zeros(3)
    permute_add_([out], [x], [[index]], [[0]])
    assert not out.requires_grad


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.jacrev])
def test_a_derivative_that_is_asked_for_is_refused(transform: Callable) -> None:
    function = transform(lambda x: permute([x], [[]], [[]])[0].sum())
    with pytest.raises(TypeError, match=r"nlm\.permute: .* got one of shape \(3,\)"):
        function(torch.ones(3))


def test_add_tells_autograd_that_out_has_changed() -> None:
    out, leaf = torch.ones(3), torch.ones(3, requires_grad=True)
    product = leaf * out
    permute_add_([out], [torch.ones(3)], [[]], [[]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_add_refuses_an_out_that_requires_a_gradient() -> None:
    out = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"nlm\.permute_add_: out\[0\] .*got requires_grad True"):
        permute_add_([out], [torch.ones(3)], [[]], [[]])
    with torch.no_grad():
        permute_add_([out], [torch.ones(3)], [[]], [[]])
    assert out.tolist() == [2, 2, 2] and out._version == 1


def test_arguments_of_other_types_are_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(TypeError, match=r"nlm\.permute: tensor 0 must be a tensor, got ndarray"):
        permute([x.numpy()], [[]], [[]])
    with pytest.raises(TypeError, match=r"nlm\.permute: the index for axis 0 .* got list"):
        permute([x], [[[0, 1, 2]]], [[0]])
    with pytest.raises(TypeError, match=r"nlm\.permute_add_: out\[0\] must be .* got ndarray"):
        permute_add_([x.numpy()], [x], [[]], [[]])
    for weights in ("ab", None, ["1"], x):
        with pytest.raises(TypeError, match=r"nlm\.permute_add_: weights must be a number"):
            permute_add_([torch.ones(3)], [x], [[]], [[]], weights=weights)


@pytest.mark.parametrize("weights", [2, np.float32(2), np.array([2.0]), (2.0,)])
def test_weights_may_be_any_numbers(weights: object) -> None:
    out = torch.ones(3)
    permute_add_([out], [torch.ones(3)], [[]], [[]], weights=weights)
    assert out.tolist() == [3, 3, 3]


IDENTITY = torch.arange(3)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, ([[IDENTITY.int()]], [[1]]), "must be int64, got torch.int32 for axis 1"),
        (ValueError, ([[IDENTITY]], [[2]]), "must be a dimension of its tensor, got axis 2"),
        (ValueError, ([[IDENTITY]], [[0]]), r"axis size\], \(2,\) for axis 0 .* got \(3,\)"),
        (ValueError, ([[IDENTITY]], [[1]], [[[0]]]), r"\(2, 3\) for axis 1 .* got \(3,\)"),
        (ValueError, ([[IDENTITY]], [[1]], [[[1]]]), r"other dimensions .* got parents \(1,\)"),
        (ValueError, ([[IDENTITY] * 2], [[1, -1]]), "gathered once, got axis 1 of tensor 0 twice"),
        (ValueError, ([[IDENTITY]], [[0, 1]]), r"as many indices as axes .* got \(1, 2, 2\)"),
        (ValueError, ([], []), r"must have one length, got \(1, 0, 0, 0\)"),
    ],
)
def test_errors_name_the_rule_and_the_values(
    error: type[Exception], arguments: tuple, message: str
) -> None:
    with pytest.raises(error, match=r"nlm\.permute: .*" + message):
        permute([torch.ones(2, 3)], *arguments)


@pytest.mark.parametrize(
    ("error", "out", "message"),
    [
        (TypeError, torch.ones(2, 3).double(), "type of its tensor, torch.float32, got torch.fl"),
        (ValueError, torch.ones(3, 2), r"shape and device .* \(2, 3\) on cpu, got \(3, 2\)"),
        (ValueError, torch.ones(3, 2).T, r"out must be contiguous, got strides \(1, 2\)"),
    ],
)
def test_add_errors_name_the_rule_and_the_values(
    error: type[Exception], out: Tensor, message: str
) -> None:
    with pytest.raises(error, match=r"nlm\.permute_add_: .*" + message):
        permute_add_([out], [torch.ones(2, 3)], [[]], [[]])
    with pytest.raises(error, match=r"nlm\.permute_out_: .*" + message):
        permute([torch.ones(2, 3)], [[]], [[]], out=[out])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 16), (3, 33), (301, 701), (5, 33_000), (4, 6, 300)])
def test_rows_that_share_their_index_are_gathered_together(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """In pairs, with one left over, over several tasks, and in rows too long for a copied index."""
    x, rows, columns = _random(shape, dtype), _permutation(shape[-2]), _permutation(shape[-1])
    last, repeated = torch.full_like(columns, shape[-1] - 1), columns // 2
    axes = [-2, -1]
    found = permute([x] * 4, [[rows, c] for c in (columns, last, repeated, columns.flip(0))],
                    [axes] * 4)  # fmt: skip
    for result, index in zip(found, (columns, last, repeated, columns.flip(0)), strict=True):
        assert torch.equal(result, x[..., rows, :][..., index])
    per_row = _permutation(shape[-2], shape[-1])
    (result,) = permute([x], [[per_row]], [[-1]], [[[-2]]])
    assert torch.equal(result, x.gather(-1, per_row.expand(shape)))
