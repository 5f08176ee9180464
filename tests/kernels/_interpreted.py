"""Runs the Triton kernels in the interpreter and prints their errors as JSON, a line per case.

A program of its own, as TRITON_INTERPRET=1 has to be set before a kernel is imported:
``TRITON_INTERPRET=1 python _interpreted.py channel_moments``. It calls the ``_cuda`` launchers of
``nlm.ops`` on CPU tensors. The shapes are tiny: a 64 x 64 block takes milliseconds.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlm._registry import operations

assert os.environ.get("TRITON_INTERPRET") == "1"

torch.use_deterministic_algorithms(True)  # fills what is not written with NaN

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
make = torch.Generator().manual_seed(0)


def offset_normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard deviation 1 about 1e4; about 3 where the type has no digits for that."""
    mean = 1e4 if dtype.itemsize >= 4 else 3.0
    return (torch.randn(shape, generator=make, dtype=torch.float64) + mean).to(dtype)


def layouts(dtype: torch.dtype, channels: int) -> Iterator[tuple[str, Tensor, int]]:
    yield "rows", offset_normal((37, channels), dtype), 1
    yield "images", offset_normal((3, channels, 5, 4), dtype), 1
    image = offset_normal((2, channels, 3, 7), dtype)
    yield "channels last", image.to(memory_format=torch.channels_last), 1
    yield "tokens", offset_normal((3, 7, channels), dtype), 2
    yield "every second", offset_normal((9, 2 * channels, 10), dtype)[::2, ::2, ::2], 1
    yield "channels first", offset_normal((channels, 33), dtype).flip(1), 0


def masks(x: Tensor, dim: int) -> Iterator[tuple[str, Tensor | None]]:
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    yield "all", None
    yield "some", torch.rand(shape, generator=make) < 0.4
    padded = torch.ones(shape, dtype=torch.bool).flatten()
    padded[: padded.numel() // 2] = False
    yield "late", padded.reshape(shape)
    yield "none", torch.zeros(shape, dtype=torch.bool)


def poison(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """x with NaN wherever the mask hides it."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(dim), torch.nan)


def report(name: str, **figures: float | bool) -> None:
    print(json.dumps({"name": name, **figures}), flush=True)


def largest(error: Tensor, scale: Tensor) -> float:
    return (error.abs() / scale).nan_to_num(0, posinf=torch.inf).max().item() if len(error) else 0.0


def same_specials(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


def compare_moments(name: str, x: Tensor, dim: int, mask: Tensor | None) -> None:
    operation = operations()["channel_moments"]
    launch = import_module("nlm.ops.channel_moments")._cuda
    count, mean, m2 = launch(x, dim, mask)
    true_count, true_mean, true_m2 = operation.reference(x, dim, mask)
    deviation = (true_m2 / max(true_count, 1)).sqrt()
    report(
        name,
        dtype=str(x.dtype),
        count=bool(count == true_count),
        specials=same_specials(mean, true_mean) and same_specials(m2, true_m2),
        mean=largest(mean - true_mean, deviation),
        m2=largest(m2 - true_m2, true_m2),
    )


def channel_moments() -> None:
    from nlm.kernels import channel_moments as kernel

    for dtype in FLOATS:
        for layout, x, dim in layouts(dtype, channels=5):
            for masked, mask in masks(x, dim):
                if dtype in FLOATS[:1] or layout in ("images", "tokens"):
                    name = f"{layout}, {masked}, {dtype}"
                    compare_moments(name, poison(x, mask, dim), dim, mask)
    compare_moments("one value", torch.full((1, 1), 3.0), 1, None)
    compare_moments("no position", torch.ones(0, 3), 1, None)
    compare_moments("no channel", torch.ones(4, 0), 1, None)
    special = offset_normal((40, 5), torch.float32)
    special[3, 1], special[4, 2], special[30, 3] = torch.nan, torch.inf, -torch.inf
    special[[1, 2], 4] = torch.tensor([torch.inf, -torch.inf])
    compare_moments("NaN and inf", special, 1, None)
    compare_moments("several splits", offset_normal((2500, 5), torch.float32), 1, None)
    compare_moments("wide", offset_normal((40, 150), torch.float32), 1, None)
    kernel.PROGRAMS, kernel.FLUSH_TILES = 1, 2
    compare_moments("several flushes", offset_normal((2500, 5), torch.float32), 1, None)


def state(channels_x: int, channels_y: int | None) -> tuple[Tensor | None, ...]:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    y = (None, None) if channels_y is None else (zeros(channels_y), zeros(channels_y))
    comoment = zeros(channels_x, channels_x if channels_y is None else channels_y)
    count = torch.zeros((), dtype=torch.int64)
    return count, zeros(channels_x), zeros(channels_x), *y, comoment


def compare_cross(
    name: str, batches: list[tuple[Tensor, Tensor | None, Tensor | None]], dim: int
) -> None:
    operation = operations()["cross_moments_"]
    launch = import_module("nlm.ops.cross_moments")._cuda
    x, y, _ = batches[0]
    sizes = x.shape[dim], None if y is None else y.shape[dim]
    result, truth = state(*sizes), state(*sizes)
    for x, y, mask in batches:
        launch(*result, x, y, dim, mask)
        operation.reference(*truth, x, y, dim, mask)
    m2_x = truth[2]
    m2_y = m2_x if y is None else truth[4]
    comoment, true_comoment = result[5], truth[5]
    report(
        name,
        dtype=str(x.dtype),
        count=bool(result[0] == truth[0]),
        specials=all(
            same_specials(a, b) for a, b in zip(result, truth, strict=True) if a is not None
        ),
        symmetric=y is not None or same_bits(comoment, comoment.T),
        diagonal=y is not None or same_bits(comoment.diagonal(), result[2]),
        m2=largest(result[2] - m2_x, m2_x),
        comoment=largest(comoment - true_comoment, torch.outer(m2_x, m2_y).sqrt()),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(torch.int64) for t in (a, b)))


def cross_moments() -> None:
    from nlm.kernels import cross_moments as kernel

    for dtype in FLOATS:
        for (layout, x, dim), (_, y, _) in zip(layouts(dtype, 5), layouts(dtype, 3), strict=True):
            for masked, mask in masks(x, dim):
                if (dtype in FLOATS[:1] and masked != "none") or layout == "images":
                    name = f"{layout}, {masked}, {dtype}"
                    hidden_x, hidden_y = poison(x, mask, dim), poison(y, mask, dim)
                    compare_cross(f"{name}, two streams", [(hidden_x, hidden_y, mask)], dim)
                    compare_cross(f"{name}, one stream", [(hidden_x, None, mask)], dim)
    compare_cross("one value", [(torch.full((1, 1), 3.0), None, None)], 1)
    compare_cross("no position", [(torch.ones(0, 3), torch.ones(0, 2), None)], 1)
    special = offset_normal((40, 5), torch.float32)
    special[3, 1], special[4, 2], special[30, 3] = torch.nan, torch.inf, -torch.inf
    compare_cross("NaN and inf", [(special, offset_normal((40, 3), torch.float32), None)], 1)
    compare_cross("NaN and inf, one stream", [(special, None, None)], 1)
    three = [(offset_normal((n, 4), torch.float32), None, None) for n in (5, 1, 30)]
    compare_cross("three batches", three, 1)
    wide = offset_normal((40, 300), torch.float32)
    compare_cross("six tiles, one stream", [(wide, None, None)], 1)
    compare_cross("tiles, two streams", [(wide[:, :150], wide[:, 150:200], None)], 1)
    kernel.SPLIT_POSITIONS, kernel.MINIMUM_POSITIONS, kernel.PROGRAMS = 32, 16, 2
    long = offset_normal((133, 5), torch.float32)
    compare_cross("several rounds", [(long, long[:, :3] * 2, None)], 1)
    whole_streams(torch.bfloat16, torch.float16)


def whole_streams(*dtypes: torch.dtype) -> None:
    """Streams of 16 bits about zero, whose low parts are zero, beside others."""
    for dtype in dtypes:
        apart = offset_normal((70, 12), dtype)
        about_zero = torch.randn(70, 128, generator=make).to(dtype)
        few = about_zero[:, :9]
        for name, x, y in (
            ("one stream", few, None), ("both", few, few[:, 4:]), ("beside one apart", few, apart),
            ("a block of each", torch.cat([about_zero, apart], 1), few),
        ):  # fmt: skip
            compare_cross(f"whole: {name}, {dtype}", [(x, y, None)], 1)
        special = few.clone()
        special[3, 1], special[4, 2], special[30, 3] = torch.nan, torch.inf, -torch.inf
        two = [(few, about_zero, None), (special, about_zero.flip(1), None)]
        compare_cross(f"whole: NaN and inf, {dtype}", two, 1)


def descriptors() -> None:
    """Tiles read through tensor descriptors, as NLM_TMA=1 asks for."""
    from nlm.kernels import channel_moments as kernel

    kernel.MINIMUM_TILES = 1  # several splits
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        row = offset_normal((301, 32), dtype)
        image = offset_normal((2, 24, 9, 7), dtype).to(memory_format=torch.channels_last)
        for layout, x, dim in (
            ("rows", row, 1), ("every second row", row[::2, 8:], 1), ("images", image, 1),
            ("tokens", offset_normal((5, 37, 24), dtype), 2),
            ("wide", offset_normal((40, 200), dtype), 1),
        ):  # fmt: skip
            compare_moments(f"{layout}, {dtype}", x, dim, None)
    special = offset_normal((40, 8), torch.float32)
    special[3, 1], special[4, 2], special[30, 3] = torch.nan, torch.inf, -torch.inf
    compare_moments("NaN and inf", special, 1, None)
    whole_streams(torch.bfloat16)
    wide = offset_normal((200, 36), torch.float32)
    compare_cross("one stream", [(wide, None, None)], 1)
    compare_cross("masked", [(wide, wide[:, :9], torch.arange(200) % 3 > 0)], 1)


def compare_pruned(name: str, x: Tensor, *args: Any) -> None:
    launch = import_module("nlm.ops.magprune")._cuda
    result, truth = launch(x, *args), operations()["magprune"].reference(x, *args)
    if x.dtype == torch.bfloat16:  # which the interpreter does not round but cut off
        wide = operations()["magprune"].reference(x.float(), *args)
        truth = (wide.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    report(name, same=torch.equal(bits_of(result), bits_of(truth)))


def bits_of(x: Tensor) -> Tensor:
    """NaN of any sign and digits are one."""
    whole = torch.where(x.isnan(), torch.full_like(x, torch.nan), x)
    return whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def magprune() -> None:
    """The conformance samples, of large ones some rows, by the launch of short rows and of long."""
    from nlm.kernels import magprune as kernel

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from ops.samples_magprune import samples

    kernel.PROGRAMS, kernel.BLOCK, kernel.CHUNK = 2, 128, 256
    for short in (kernel.SHORT, 0):
        kernel.SHORT = short
        for sample in samples():
            x, *rest = sample.args
            if x.shape[1] <= 1000 and (short or x.dtype in FLOATS[:2]):
                compare_pruned(f"{sample.name}, rows up to {short} alone", x[:3], *rest)
    module = import_module("nlm.ops.magprune")
    module.RANKED, kernel.BLOCK, kernel.CHUNK = 96, 16, 32
    for length, wave in ((96, 1 << 20), (97, 1), (192, 200), (230, 200)):
        kernel.WAVE = wave
        x = torch.randint(-9, 9, (2, length), generator=make).half()
        compare_pruned(f"{length} in parts of 96, {wave} at once", x, 0.5, 0.3, 7, 1, True)


def positions() -> None:
    """Offsets of positions of a view whose inner dimension is as long as an int32 can say."""
    from _offsets import offsets_of

    for inner in (7, 2**31 - 5, 2**31 + 3):
        for first in (0, inner - 3, 5 * inner - 9):
            found = torch.empty(16, dtype=torch.int64)
            offsets_of[(1,)](found, first, inner, 3 * inner, 2, STEPS=16)
            position = [first + step for step in range(16)]
            expected = [p // inner * 3 * inner + p % inner * 2 for p in position]
            report(f"inner {inner}, first {first}", right=found.tolist() == expected)


if __name__ == "__main__":
    # NumPy, which carries the interpreter, warns of inf - inf.
    warnings.simplefilter("ignore", RuntimeWarning)
    programs = {
        "channel_moments": channel_moments,
        "cross_moments": cross_moments,
        "descriptors": descriptors,
        "magprune": magprune,
        "positions": positions,
    }
    programs[sys.argv[1]]()
