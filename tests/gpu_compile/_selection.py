"""magnitude_threshold and sign_merge of the emulated device; see `_emulation.py`."""

import ctypes
from collections.abc import Callable
from typing import Any

ELEMENT_BYTES = {0: 2, 1: 2, 2: 4, 3: 8}  # by nlm::DType


class Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_size_t), ("end", ctypes.c_size_t)]


def array_range(address: int, count: int, element_bytes: int) -> Range:
    return Range(address, address + count * element_bytes)


class MagnitudeItem(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("base_dtype", ctypes.c_int),
        ("size", ctypes.c_int64),
    ]


class MagnitudeRanges(ctypes.Structure):
    _fields_ = [("items", ctypes.POINTER(Range)), ("result", Range), ("state", Range)]


class WeightedTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("weight", ctypes.c_double)]


class SignMergeItem(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("size", ctypes.c_int64),
        ("experts", ctypes.POINTER(WeightedTensor)),
        ("count", ctypes.c_int),
        ("thresholds", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        ("dialect", ctypes.c_int),
        ("contested", ctypes.c_void_p),
        ("again", ctypes.c_bool),
    ]


class SignMergeRanges(ctypes.Structure):
    _fields_ = [
        *((name, Range) for name in ("base", "target", "thresholds", "ballot", "contested")),
        ("experts", ctypes.POINTER(Range)),
    ]


class SelectionDevice:
    """The part of the emulated device; `_run` and `_blocks` are the whole's."""

    _library: ctypes.CDLL
    _blocks: tuple[Any, ...]
    _run: Callable[..., None]

    def magnitude_threshold_scratch(self) -> int:
        return self._library.emulate_magnitude_state()

    def magnitude_threshold(
        self,
        items: list[tuple],
        rank: int,
        result_dtype: int,
        result: int,
        scratch: int,
        stream: int,
    ) -> None:
        each = [MagnitudeItem(x, base, dtype, like, n) for x, dtype, base, like, n in items]
        ranges = []
        for x, dtype, base, _, size in items:
            ranges += [array_range(data, size, ELEMENT_BYTES[dtype]) for data in (x, base)]
        known = MagnitudeRanges(
            (Range * len(ranges))(*ranges),
            array_range(result, 1, ELEMENT_BYTES[result_dtype]),
            array_range(scratch, self.magnitude_threshold_scratch(), 1),
        )
        self._run(
            "magnitude_threshold", (MagnitudeItem * len(each))(*each), ctypes.c_int64(len(each)),
            ctypes.c_int64(rank), result_dtype, ctypes.c_void_p(result), ctypes.c_void_p(scratch),
            ctypes.byref(known), *self._blocks,
        )  # fmt: skip

    def sign_merge(self, item: tuple, experts: list[tuple], ballot: int, stream: int) -> None:
        base, target, dtype, size, thresholds, *rest = item
        count, width = len(experts), ELEMENT_BYTES[dtype]
        each = (WeightedTensor * count)(*(WeightedTensor(*expert) for expert in experts))
        ranges = [array_range(data, size, width) for data, _, _ in experts]
        known = SignMergeRanges(
            array_range(base, size, width),
            array_range(target, size, width),
            array_range(thresholds, count, 8 if width == 8 else 4),
            array_range(ballot, 2, 8),
            array_range(rest[2], -(-size // 64), 1),
            (Range * count)(*ranges),
        )
        whole = SignMergeItem(base, target, dtype, size, each, count, thresholds, *rest)
        self._run(
            "sign_merge", ctypes.byref(whole), ctypes.c_void_p(ballot), ctypes.byref(known),
            *self._blocks,
        )  # fmt: skip
