"""A GPU's stand-in for the CUDA kernels: their bodies over the whole grid, on the CPU.

:class:`EmulatedDevice` has the functions of ``nlm._C_cuda`` and takes the same arguments, so that
the ``_cuda`` launchers of ``nlm.ops`` run on it unchanged. The ranges that the bodies may touch
follow from the sizes and strides of the arguments; an access outside of them, or misaligned, is an
error.
"""

import ctypes
import math
import os
import shlex
import subprocess
from pathlib import Path

from gpu_compile._selection import ELEMENT_BYTES, Range, SelectionDevice, array_range
from gpu_compile._sums import SumsDevice

HERE = Path(__file__).resolve().parent
MAX_AXES = 16  # kPermuteMaxAxes


class PermuteAxis(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("parent_count", ctypes.c_int),
        ("parents", ctypes.c_int * MAX_AXES),
    ]


class PermuteItem(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("axis_count", ctypes.c_int),
        ("axes", PermuteAxis * MAX_AXES),
    ]


class View3(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("outer", "channels", "inner")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("outer", "channel", "inner")),
    ]


class Tasks(ctypes.Structure):
    _fields_ = [
        ("ids", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("outer_per_sample", ctypes.c_int64),
    ]


class Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("range", Range)]


class MaskMemory(ctypes.Structure):
    _fields_ = [(name, Array) for name in ("expert", "base", "merged", "out", "mask", "counts")]


class Drop(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_double),
    ]


class ScaleShiftRanges(ctypes.Structure):
    _fields_ = [
        (name, Range)
        for name in ("grad", "x", "y", "scale", "shift", "ids", "scale_sums", "shift_sums")
    ]


def compile_emulation(folder: Path) -> ctypes.CDLL:
    """The bodies and their grid loops as a shared library."""
    library = folder / "grid_emulation.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror"]
    include = f"-I{HERE.parents[1] / 'csrc'}"
    sources = map(str, sorted(HERE.glob("*_emulation.cpp")))
    subprocess.run([*compiler, *flags, include, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in (
        "permute", "permute_add", "scale_shift", "partial_rows", "scale_shift_backward",
        "magnitude_state", "magnitude_threshold", "sign_merge", "dare", "tall_mask",
        "tall_mask_apply", "tall_mask_walks", "tall_mask_agreement", "weighted_sum",
        "inner_products_rows", "inner_products",
    ):  # fmt: skip
        getattr(loaded, f"emulate_{name}").restype = ctypes.c_int64
    return loaded


def strided_range(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], element_bytes: int
) -> Range:
    if 0 in sizes:
        return Range(address, address)
    steps = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)]
    low, high = sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps)
    return Range(address + low * element_bytes, address + (high + 1) * element_bytes)


def view_range(view: tuple) -> Range:
    address, dtype, *rest = view
    return strided_range(address, tuple(rest[:3]), tuple(rest[3:]), ELEMENT_BYTES[dtype])


class EmulatedDevice(SelectionDevice, SumsDevice):
    """``nlm._C_cuda`` without a GPU. ``word_bytes`` keeps the word sizes of the last permute.

    ``blocks`` limits a run to some blocks of the grid: (first, end), as grid_emulation.cpp has it.
    """

    def __init__(self, library: ctypes.CDLL, blocks: tuple[int, int] = (0, -1)) -> None:
        self._library = library
        self._blocks = tuple(map(ctypes.c_int64, blocks))
        self.word_bytes: list[int] = []

    def permute(self, items: list[tuple], element_bytes: list[int], stream: int) -> None:
        self.word_bytes = []
        for item, size in zip(items, element_bytes, strict=True):
            word = ctypes.c_int()
            self._run(
                "permute", ctypes.byref(_item(item)), size, _ranges(item, size), *self._blocks,
                ctypes.byref(word),
            )  # fmt: skip
            self.word_bytes.append(word.value)

    def permute_add(
        self, items: list[tuple], dtypes: list[int], weights: list[float], stream: int
    ) -> None:
        for item, dtype, weight in zip(items, dtypes, weights, strict=True):
            self._run(
                "permute_add", ctypes.byref(_item(item)), dtype, ctypes.c_double(weight),
                _ranges(item, ELEMENT_BYTES[dtype]), *self._blocks,
            )  # fmt: skip

    def scale_shift(
        self, x: tuple, y: tuple, scale: int, shift: int,
        ids: int, tasks: int, outer_per_sample: int, stream: int,
    ) -> None:  # fmt: skip
        ranges = _parameter_ranges(x, scale, ids, tasks, outer_per_sample)
        ranges.y, ranges.shift = view_range(y), array_range(shift, tasks * x[3], _compute_bytes(x))
        self._run(
            "scale_shift", ctypes.byref(View3(*x)), ctypes.byref(View3(*y)),
            ctypes.c_void_p(scale), ctypes.c_void_p(shift),
            ctypes.byref(Tasks(ids, tasks, outer_per_sample)), ctypes.byref(ranges), *self._blocks,
        )  # fmt: skip

    def scale_shift_partial_rows(self, x: tuple, tasks: int) -> int:
        return self._library.emulate_partial_rows(ctypes.byref(View3(*x)), ctypes.c_int64(tasks))

    def scale_shift_backward(
        self, grad: tuple, x: tuple, grad_x: tuple, scale: int,
        ids: int, tasks: int, outer_per_sample: int,
        partial_scale: int, partial_shift: int, stream: int,
    ) -> None:  # fmt: skip
        ranges = _parameter_ranges(x, scale, ids, tasks, outer_per_sample)
        ranges.grad, ranges.y = view_range(grad), view_range(grad_x)
        rows = self.scale_shift_partial_rows(x, tasks)
        ranges.scale_sums = array_range(partial_scale, rows * tasks * x[3], 8)
        ranges.shift_sums = array_range(partial_shift, rows * tasks * x[3], 8)
        self._run(
            "scale_shift_backward", *(ctypes.byref(View3(*view)) for view in (grad, x, grad_x)),
            ctypes.c_void_p(scale), ctypes.byref(Tasks(ids, tasks, outer_per_sample)),
            ctypes.c_void_p(partial_scale), ctypes.c_void_p(partial_shift), ctypes.byref(ranges),
        )  # fmt: skip

    def tall_mask(
        self, expert: int, base: int, merged: int, dtype: int, count: int, limit: float, mask: int,
        stream: int,
    ) -> None:  # fmt: skip
        size = count * ELEMENT_BYTES[dtype]
        memory = _mask_memory(
            expert=(expert, size), base=(base, size), merged=(merged, size),
            mask=(mask, (count + 7) // 8),
        )  # fmt: skip
        limit64 = ctypes.c_double(limit)
        self._run("tall_mask", memory, dtype, ctypes.c_int64(count), limit64, *self._blocks)

    def tall_mask_apply(
        self, mask: int, base: int, merged: int, element_bytes: int, count: int, out: int,
        stream: int,
    ) -> None:  # fmt: skip
        size = count * element_bytes
        memory = _mask_memory(
            mask=(mask, (count + 7) // 8), base=(base, size), merged=(merged, size), out=(out, size)
        )
        self._run("tall_mask_apply", memory, element_bytes, ctypes.c_int64(count), *self._blocks)

    def tall_mask_walks(self, mask_bytes: int) -> int:
        return self._library.emulate_tall_mask_walks(ctypes.c_int64(mask_bytes))

    def tall_mask_agreement(
        self, masks: int, tasks: int, mask_bytes: int, least: int, kept: int, counts: int,
        stream: int,
    ) -> None:  # fmt: skip
        memory = _mask_memory(
            mask=(masks, tasks * mask_bytes), out=(kept, mask_bytes),
            counts=(counts, 8 * self.tall_mask_walks(mask_bytes)),
        )  # fmt: skip
        sizes = map(ctypes.c_int64, (tasks, mask_bytes, least))
        self._run("tall_mask_agreement", memory, *sizes)

    def dare(
        self, expert: int, base: int, out: int, dtype: int, count: int,
        seed: int, offset: int, threshold: int, scale: float, stream: int,
    ) -> None:  # fmt: skip
        size = count * ELEMENT_BYTES[dtype]
        memory = _mask_memory(expert=(expert, size), base=(base, size), out=(out, size))
        drop = ctypes.byref(Drop(seed, offset, threshold, scale))
        self._run("dare", memory, dtype, ctypes.c_int64(count), drop, *self._blocks)

    def _run(self, name: str, *args: object) -> None:
        violations = getattr(self._library, f"emulate_{name}")(*args)
        if violations:
            raise IndexError(f"{name}: {violations} accesses out of range or misaligned")


def _mask_memory(**arrays: tuple[int, int]) -> object:
    """A reference to the arrays of these (address, bytes)."""
    return ctypes.byref(
        MaskMemory(
            **{name: Array(begin, array_range(begin, n, 1)) for name, (begin, n) in arrays.items()}
        )
    )


def _compute_bytes(x: tuple) -> int:
    return 8 if ELEMENT_BYTES[x[1]] == 8 else 4


def _parameter_ranges(
    x: tuple, scale: int, ids: int, tasks: int, outer_per_sample: int
) -> ScaleShiftRanges:
    samples = x[2] // outer_per_sample if ids else 0
    return ScaleShiftRanges(
        x=view_range(x),
        scale=array_range(scale, tasks * x[3], _compute_bytes(x)),
        ids=array_range(ids, samples, 8),
    )


def _item(item: tuple) -> PermuteItem:
    source, target, axes = item
    result = PermuteItem(source, target, len(axes))
    for a, (size, stride, index, parents) in enumerate(axes):
        ids = (ctypes.c_int * MAX_AXES)(*parents)
        result.axes[a] = PermuteAxis(size, stride, index or None, len(parents), ids)
    return result


def _ranges(item: tuple, element_bytes: int) -> ctypes.Array:
    source, target, axes = item
    sizes = tuple(size for size, _, _, _ in axes)
    ranges = [
        strided_range(source, sizes, tuple(stride for _, stride, _, _ in axes), element_bytes),
        array_range(target, math.prod(sizes), element_bytes),
    ]
    for size, _, index, parents in axes:
        if index:
            ranges.append(array_range(index, math.prod(sizes[p] for p in parents) * size, 8))
    return (Range * len(ranges))(*ranges)
