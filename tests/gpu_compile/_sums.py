"""weighted_sum and inner_products of the emulated device; see `_emulation.py`."""

import ctypes
from collections.abc import Callable
from typing import Any

from gpu_compile._selection import ELEMENT_BYTES, Range, WeightedTensor, array_range


class WeightedSum(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("base_dtype", ctypes.c_int),
        ("tensors", ctypes.POINTER(WeightedTensor)),
        ("count", ctypes.c_int),
        ("divisor", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("target", ctypes.c_void_p),
        ("target_dtype", ctypes.c_int),
        ("size", ctypes.c_int64),
    ]


class PackedTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int)]


class VectorSet(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("base_dtype", ctypes.c_int),
        ("tensors", ctypes.POINTER(PackedTensor)),
        ("count", ctypes.c_int),
        ("size", ctypes.c_int64),
    ]


class SumsDevice:
    """The part of the emulated device; `_run` and `_blocks` are the whole's."""

    _library: ctypes.CDLL
    _blocks: tuple[Any, ...]
    _run: Callable[..., None]

    def weighted_sum(
        self, base: int, base_dtype: int, tensors: list[tuple], divisor: float, scale: float,
        target: int, target_dtype: int, size: int, stream: int,
    ) -> None:  # fmt: skip
        assert {base_dtype, *(dtype for _, dtype, _ in tensors)} == {target_dtype}
        each = (WeightedTensor * len(tensors))(*(WeightedTensor(*tensor) for tensor in tensors))
        addresses = [base, target, *(data for data, _, _ in tensors)]
        ranges = [array_range(data, size, ELEMENT_BYTES[target_dtype]) for data in addresses]
        work = WeightedSum(
            base, base_dtype, each, len(tensors), divisor, scale, target, target_dtype, size
        )
        known = (Range * len(ranges))(*ranges)
        self._run("weighted_sum", ctypes.byref(work), known, *self._blocks)

    def inner_products_rows(self, size: int, dtype: int) -> int:
        return self._library.emulate_inner_products_rows(ctypes.c_int64(size), dtype)

    def inner_products(
        self, base: int, dtype: int, tensors: list[tuple], size: int, partial: int, stream: int
    ) -> None:
        assert {kind for _, kind in tensors} == {dtype}
        each = (PackedTensor * len(tensors))(*(PackedTensor(*tensor) for tensor in tensors))
        rows = self.inner_products_rows(size, dtype)
        ranges = [array_range(partial, rows * len(tensors) ** 2, 8)]
        ranges += [
            array_range(data, size, ELEMENT_BYTES[dtype])
            for data in (base, *(data for data, _ in tensors))
        ]
        known = (Range * len(ranges))(*ranges)
        work = VectorSet(base, dtype, each, len(tensors), size)
        self._run(
            "inner_products", ctypes.byref(work), ctypes.c_void_p(partial), known, *self._blocks
        )
