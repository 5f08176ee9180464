"""The CUDA kernels' bodies, over every block and thread of the grid, against the reference.

The ``_cuda`` launchers of ``nlm.ops`` run as they are; only the device below them is emulated.
"""

import mmap
from importlib import import_module

import pytest
import torch
from _compare import allowed_error, relative_error, same_bits
from _conformance import call, cases
from gpu_compile._emulation import EmulatedDevice, compile_emulation
from torch import Tensor

from nlm import _native
from nlm._registry import operations

FAR = (1 << 31) + 32  # elements: more than 32 bits count
MAP_NORESERVE = 0x4000  # Linux's; a name of mmap's from Python 3.13 on

#: Operator, its launcher, and which results are sums that the reference adds in another order.
LAUNCHERS = {
    "magnitude_threshold": ("_cuda", ()),
    "permute": ("_cuda", ()),
    "permute_out_": ("_cuda_out", ()),
    "permute_add_": ("_cuda_add", ()),
    "scale_shift": ("_cuda", ()),
    "scale_shift_out_": ("_cuda_out", ()),
    "scale_shift_backward": ("_cuda_backward", (1, 2)),
    "sign_merge": ("_cuda", ()),
    "tall_mask": ("_cuda", ()),
    "tall_mask_apply": ("_cuda_apply", ()),
    "tall_mask_agreement": ("_cuda_agreement", ()),
    "dare": ("_cuda", ()),
    "sign_merge_tied_": ("_cuda_tied", ()),
    "weighted_sum": ("_cuda", ()),
    "inner_products": ("_cuda", (0,)),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_emulation(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def device(library, monkeypatch) -> EmulatedDevice:
    emulated = EmulatedDevice(library)
    monkeypatch.setattr(_native, "cuda", emulated)
    monkeypatch.setattr(_native, "stream", lambda x: 0)
    return emulated


def launch(name: str, *args):
    module = import_module(f"nlm.ops.{operations()[name].stem}")
    return getattr(module, LAUNCHERS[name][0])(*args)


def far_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take address space, but no memory before they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_grid_equals_reference(name: str, device: EmulatedDevice) -> None:
    operation = operations()[name]
    names = []
    for sample in cases()[name].samples():
        results = call(operation, lambda *args: launch(name, *args), sample.args)
        expected = call(operation, operation.reference, sample.args)
        for i, (result, truth) in enumerate(zip(results, expected, strict=True)):
            if i in LAUNCHERS[name][1]:
                limit = allowed_error(0.0, truth.dtype)
                assert relative_error(result, truth) <= limit, sample.name
            else:
                assert same_bits(result, truth), sample.name
        names.append(sample.name)
    assert len(names) > 10


def permute_arguments(x: Tensor, gathers: list[tuple[int, tuple[int, ...]]]) -> tuple:
    """The operator's arguments that shuffle (axis, parents) of one tensor."""
    make = torch.Generator().manual_seed(0)
    indices = [
        torch.rand((*(x.shape[p] for p in parents), x.shape[axis]), generator=make).argsort(-1)
        for axis, parents in gathers
    ]
    axes = [axis for axis, _ in gathers]
    flat_parents = [p for _, parents in gathers for p in parents]
    counts = [len(parents) for _, parents in gathers]
    return [x], indices, [0] * len(gathers), axes, flat_parents, counts


@pytest.mark.parametrize(
    ("dtype", "shape", "axes", "word_bytes"),
    [
        (torch.float32, (6, 8), [0], 16),
        (torch.float32, (6, 6), [0], 8),
        (torch.float32, (6, 7), [0], 4),
        (torch.bfloat16, (5, 4, 2), [0, 1], 4),
        (torch.int8, (5, 48), [0], 16),
        (torch.int8, (5, 3), [0], 1),
        (torch.float32, (6, 8), [1], 4),
        (torch.complex128, (3, 5), [1], 16),
    ],
)
def test_runs_are_copied_in_wide_words(
    device: EmulatedDevice,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    axes: list[int],
    word_bytes: int,
) -> None:
    x = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    args = permute_arguments(x, [(axis, ()) for axis in axes])
    (result,) = launch("permute", *args)
    assert device.word_bytes == [word_bytes]
    assert same_bits(result, operations()["permute"].reference(*args)[0])


@pytest.mark.parametrize(
    ("dtype", "shape", "gathers"),
    [
        (torch.float32, (7, 8192), [(0, ()), (1, ())]),
        (torch.bfloat16, (7, 8192), [(1, (0,))]),  # no stack: every row has its own index
        (torch.bfloat16, (7, 8192), [(0, ()), (1, ())]),  # stacks of four rows
        (torch.bfloat16, (3, 8191), [(1, ())]),  # neither packs nor 16-byte words
        (torch.float32, (3, 1024, 3, 3), [(0, ()), (1, ())]),  # runs of nine
        (torch.float32, (2, 40000), [(1, ())]),  # longer than shared memory
        (torch.int8, (3, 5, 9000), [(0, ()), (2, (0,))]),
        (torch.complex128, (3, 2100), [(1, ())]),
    ],
)
def test_wide_rows(
    device: EmulatedDevice, dtype: torch.dtype, shape: tuple[int, ...], gathers: list
) -> None:
    """Rows of many threads, in shared memory and out of it; the samples' rows are short."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(50).to(dtype)
    for source in (x, torch.cat([x[:1].flatten()[:1], x.flatten()])[1:].view(shape)):
        args = permute_arguments(source, gathers)
        (result,) = launch("permute", *args)
        assert same_bits(result, operations()["permute"].reference(*args)[0])
        if dtype.is_floating_point:
            out, expected = torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
            launch("permute_add_", [out], args[0], [0.5], *args[1:])
            operations()["permute_add_"].reference([expected], args[0], [0.5], *args[1:])
            assert same_bits(out, expected)


@pytest.mark.parametrize("gathers", [[(0, ())], [(1, ())], [(0, ()), (1, (0,))], [(0, (1,))]])
@pytest.mark.parametrize("shape", [(3, 5), (3, 16)])
def test_permute_reads_beyond_32_bits(
    device: EmulatedDevice, shape: tuple[int, int], gathers: list
) -> None:
    x = far_memory(3 * FAR, torch.int8).as_strided(shape, (FAR, 1))
    x.copy_(torch.arange(x.numel()).reshape(shape))
    args = permute_arguments(x, gathers)
    (result,) = launch("permute", *args)
    assert same_bits(result, operations()["permute"].reference(*args)[0])


def test_permute_writes_beyond_32_bits(library) -> None:
    columns = (1 << 30) + 5  # three rows of them exceed 2^31, and 5 leaves no wider word
    source, target = far_memory(columns, torch.int8), far_memory(3 * columns, torch.int8)
    source[-5:] = torch.tensor([1, 2, 3, 4, 5])
    axes = [(3, 0, 0, ()), (columns, 1, 0, ())]
    item = (source.data_ptr(), target.data_ptr(), axes)
    EmulatedDevice(library, blocks=(-1, -1)).permute([item], [1], 0)
    assert target[-6:].tolist() == [0, 1, 2, 3, 4, 5]
    assert target[2 * columns - 5 : 2 * columns].tolist() == [0] * 5


@pytest.mark.parametrize("contiguous_dim", [1, 2])
def test_scale_shift_beyond_32_bits(device: EmulatedDevice, contiguous_dim: int) -> None:
    strides = [2 * FAR, FAR, FAR]
    strides[contiguous_dim] = 1
    x, grad = (far_memory(6 * FAR, torch.float16).as_strided((2, 3, 2), strides) for _ in range(2))
    x.copy_(torch.arange(12.0).reshape(x.shape))
    grad.copy_(torch.arange(12.0).reshape(x.shape).flip(0))
    scale, shift = torch.tensor([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]), torch.ones(2, 3)
    task = torch.tensor([1, 0])
    forward, backward = (x, scale, shift, task, 1), (grad, x, scale, task, 1)
    for name, args in (("scale_shift", forward), ("scale_shift_backward", backward)):
        operation = operations()[name]
        results = call(operation, lambda *a, name=name: launch(name, *a), args)
        for result, truth in zip(results, call(operation, operation.reference, args), strict=True):
            assert torch.equal(result, truth)


def test_scale_shift_counts_beyond_32_bits(library) -> None:
    inner = (1 << 29) + 8
    x, y = (far_memory(6 * inner, torch.float16) for _ in range(2))
    x[-2:] = torch.tensor([1.0, 2.0])
    scale, shift = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 0.0, 0.5])
    x3, y3 = ((t.data_ptr(), 0, 2, 3, inner, 3 * inner, inner, 1) for t in (x, y))
    EmulatedDevice(library, blocks=(-1, -1)).scale_shift(
        x3, y3, scale.data_ptr(), shift.data_ptr(), 0, 1, 1, 0
    )
    assert y[-3:].tolist() == [0.5, 4.5, 8.5]
    assert y[5 * inner - 2 : 5 * inner].tolist() == [0.0, 0.0]


def test_magnitude_threshold_counts_beyond_32_bits(library) -> None:
    x = far_memory(FAR + 3, torch.float16)
    x[-3:] = torch.tensor([1.0, -3.0, 2.0])
    result = torch.empty(())
    emulated = EmulatedDevice(library, blocks=(-1, -1))
    for rank, expected in ((1, 3.0), (3, 1.0), (4, 0.0)):
        scratch = torch.zeros(emulated.magnitude_threshold_scratch(), dtype=torch.uint8)
        items = [(x.data_ptr(), 0, 0, 0, x.numel())]
        emulated.magnitude_threshold(items, rank, 2, result.data_ptr(), scratch.data_ptr(), 0)
        assert result.item() == expected


@pytest.mark.parametrize("offset", [0, 1])
def test_sign_merge_counts_beyond_32_bits(library, offset: int) -> None:
    base, x, target = (far_memory(FAR + 8, torch.float16)[offset:] for _ in range(3))
    base[-1], x[-1] = 1.0, 5.0
    threshold, ballot = torch.ones(1), torch.zeros(2, dtype=torch.int64)
    contested = torch.zeros(FAR // 64 + 1, dtype=torch.uint8)
    outputs = (contested.data_ptr(), False)
    item = (base.data_ptr(), target.data_ptr(), 0, x.numel(), threshold.data_ptr(), 0.5, 0)
    item += outputs
    expert = (x.data_ptr(), 0, 1.0)
    EmulatedDevice(library, blocks=(-1, -1)).sign_merge(item, [expert], ballot.data_ptr(), 0)
    assert target[-2:].tolist() == [0.0, 3.0] and ballot.tolist() == [1, 0]


def test_weighted_sum_counts_beyond_32_bits(library) -> None:
    base, x, target = (far_memory(FAR + 3, torch.float16) for _ in range(3))
    base[-1], x[-1] = 1.0, 5.0
    EmulatedDevice(library, blocks=(-1, -1)).weighted_sum(
        base.data_ptr(), 0, [(x.data_ptr(), 0, 3.0)], 2.0, 0.5, target.data_ptr(), 0, x.numel(), 0
    )
    assert target[-2:].tolist() == [0.0, 4.0]


@pytest.mark.parametrize("offset", [0, 1])
def test_inner_products_of_many(device: EmulatedDevice, offset: int) -> None:
    """Several tiles; packs, and entries one by one."""
    make = torch.Generator().manual_seed(2)
    tensors = list(torch.randint(-9, 10, (7, 8200), generator=make).half()[:, offset:])
    base = torch.randint(-9, 10, (8200,), generator=make).half()[offset:]
    for start in (None, base):
        found = launch("inner_products", start, tensors)
        assert torch.equal(found, operations()["inner_products"].reference(start, tensors))


def test_inner_products_count_beyond_32_bits(library) -> None:
    x, y = (far_memory(FAR + 3, torch.float16) for _ in range(2))
    x[-2:], y[-2:] = torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0])
    first = EmulatedDevice(library, blocks=(0, 1))  # the block of the last segment
    partial = torch.zeros(first.inner_products_rows(x.numel(), 0), 2, 2, dtype=torch.float64)
    tensors = [(t.data_ptr(), 0) for t in (x, y)]
    first.inner_products(0, 0, tensors, x.numel(), partial.data_ptr(), 0)
    assert partial[0].tolist() == [[13, 23], [23, 41]]


def test_masks_beyond_32_bits(library) -> None:
    """The last block of 2^32 entries: bytes of bits, packs of entries, and random positions."""
    count = (1 << 32) + 11
    expert, merged, out = (far_memory(count, torch.float16) for _ in range(3))
    mask = far_memory((count + 7) // 8, torch.uint8)
    expert[-7:] = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 3.0, 0.0])
    last = EmulatedDevice(library, blocks=(-1, -1))
    addresses = [x.data_ptr() for x in (expert, merged, out, mask)]
    last.tall_mask(addresses[0], addresses[1], addresses[1], 0, count, 0.4, addresses[3], 0)
    assert mask[-2:].tolist() == [0b01010000, 0b010]
    last.tall_mask_apply(addresses[3], addresses[1], addresses[0], 2, count, addresses[2], 0)
    assert torch.equal(out[-7:], expert[-7:])
    last.dare(*addresses[:3], 0, count, 5, 4, 1 << 31, 1.0, 0)
    ends = expert[-11:], merged[-11:]
    tail = operations()["dare"].reference(*ends, 0.5, 5, 4 + count - 11, False)
    assert torch.equal(out[-11:], tail) and tail.any() and not torch.equal(tail, ends[0])


@pytest.mark.parametrize(
    ("dtype", "shape", "tasks", "dim"),
    [
        (torch.float32, (700, 260), 3, 1),  # four channels a thread, the last block not full
        (torch.bfloat16, (700, 260), 3, 1),
        (torch.float32, (301, 262), 8, 1),  # two channels, whose tasks just fit
        (torch.bfloat16, (301, 264), 7, 1),
        (torch.float32, (300, 33), 16, 1),
        (torch.float64, (257, 66), 4, 1),
        (torch.float16, (500, 24), 41, 1),  # blocks share the tasks
        (torch.float32, (9, 4, 140), 20, 1),
        (torch.float32, (6, 31, 132), 2, 2),
        (torch.float32, (5, 9, 34, 34), 2, 1),  # packs of four inner positions
        (torch.bfloat16, (5, 9, 40, 40), 2, 1),  # of eight
        (torch.float16, (5, 9, 30, 30), 2, 1),  # of four
        (torch.float64, (5, 9, 20, 20), 17, 1),
        (torch.float32, (40, 3, 31, 31), 1, 1),
        (torch.float32, (70000, 3), 1, 1),  # several rows of partial sums
    ],
)
def test_wide_backward(
    device: EmulatedDevice, dtype: torch.dtype, shape: tuple[int, ...], tasks: int, dim: int
) -> None:
    """Packs, whole blocks of walks and shared tasks, of which the samples are too small."""
    make = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(shape, generator=make).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.randn(tasks, shape[dim], generator=make).to(wide)
    task = torch.randint(tasks, shape[:1], generator=make)
    args = (grad, x, scale, task, dim)
    results = launch("scale_shift_backward", *args)
    truths = operations()["scale_shift_backward"].reference(*args)
    assert same_bits(results[0], truths[0])
    for sums, truth in zip(results[1:], truths[1:], strict=True):
        assert relative_error(sums, truth) <= allowed_error(0.0, truth.dtype)
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(shape) for t in (grad, x)]
    for other in (shifted, (grad.movedim(0, -1).contiguous().movedim(-1, 0), x)):
        again = launch("scale_shift_backward", *other, *args[2:])
        assert all(map(same_bits, again, results))  # neither address nor grad's layout matters


def test_task_out_of_range_is_nan(device: EmulatedDevice) -> None:
    x, scale = torch.ones(4, 3), torch.ones(2, 3)
    task = torch.tensor([0, 2, -1, 1])
    y = launch("scale_shift", x, scale, scale, task, 1)
    assert y[:, 0].tolist()[::3] == [2.0, 2.0] and y[1:3].isnan().all()
    grad_x, grad_scale, grad_shift = launch("scale_shift_backward", x, x, scale, task, 1)
    assert grad_x[1:3].isnan().all() and not grad_x[::3].isnan().any()
    assert torch.equal(grad_scale, torch.ones(2, 3)) and torch.equal(grad_shift, torch.ones(2, 3))
    grad_x, *sums = launch("scale_shift_backward", x, x, scale[:0], task, 1)
    assert grad_x.isnan().all() and [total.shape for total in sums] == [(0, 3), (0, 3)]


@pytest.mark.parametrize("wrong", [-1, 4, 1 << 40])
def test_a_wrong_access_is_caught(library, wrong: int) -> None:
    x, y = torch.zeros(4, 3), torch.zeros(4, 3)
    index = torch.tensor([0, 1, wrong, 3])
    item = (x.data_ptr(), y.data_ptr(), [(4, 3, index.data_ptr(), ()), (3, 1, 0, ())])
    with pytest.raises(IndexError, match="3 accesses out of range"):
        EmulatedDevice(library).permute([item], [4], 0)
