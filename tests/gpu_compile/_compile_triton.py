"""Compiles the Triton kernels as they ship, for GPUs that are not here, and prints facts as JSON.

A program of its own, since a kernel imported under TRITON_INTERPRET=1 cannot be compiled. One line
per target and configuration.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from _sass import facts_of_cubin
from nlm.kernels import _stream, channel_moments, cross_moments, magprune
from nlm.kernels._descriptors import has_tma
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Configuration:
    """A kernel with the types, constants, and 16-byte divisible arguments of a launch."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: set[str]
    options: dict[str, Any] = field(default_factory=dict)


def accumulator(dtype: str) -> tuple[str, Any]:
    return ("fp64", tl.float64) if dtype == "fp64" else ("fp32", tl.float32)


def layout_constants(layout: str, *streams: str) -> tuple[dict[str, Any], set[str]]:
    """Unit strides and aligned sizes of [N, C] ("last") or [N, C, H, W] ("first") in memory."""
    outer = {f"{stream}stride_outer" for stream in streams}
    channel = {f"{stream}stride_channel" for stream in streams}
    inner = {f"{stream}stride_inner" for stream in streams}
    if layout == "last":
        constants: dict[str, Any] = {"inner": 1, "DIVIDES": False, **dict.fromkeys(channel, 1)}
        return constants, outer
    constants = {"DIVIDES": True, **dict.fromkeys(inner, 1)}
    return constants, {"inner"} | outer | channel


def has_descriptors(target: str) -> bool:
    """Whether the launchers may choose tensor descriptors for ``target``."""
    gpu = TARGETS[target]
    return gpu.backend == "cuda" and has_tma(divmod(gpu.arch, 10))


def moments(dtype: str, layout: str, mask: bool, unit: int = 1, tma: bool = False) -> Configuration:
    constants, aligned = layout_constants(layout, "")
    strides = (1, 256) if layout == "last" else (256, 1)
    size = {"fp64": 8, "fp32": 4}.get(dtype, 2)
    block_p, block_c, warps = channel_moments.tile_shape(256, *strides, size)
    constants |= {
        "HAS_MASK": mask,
        "WHOLE": not mask,
        "UNIT": unit,
        "ACCUMULATOR": accumulator(dtype)[1],
        "FLUSH": channel_moments.FLUSH_TILES,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "STAGES": channel_moments.TMA_STAGES if tma else None,
    }
    types = {"x": f"*{dtype}", "mask": "*u8", "partial": "*fp64"}
    aligned |= {*types, "positions", "channels", "split_positions"}
    name = f"channel_moments {dtype} channels-{layout}{' mask' if mask else ''}"
    if tma:
        types["x"] = f"tensordesc<{dtype}[{block_p}, {block_c}]>"
        aligned.remove("x")
        name += " TMA"
    kernel = channel_moments.accumulate_kernel
    return Configuration(name, kernel, types, constants, aligned, {"num_warps": warps})


def centre(dtype: str, layout: str, mask: bool) -> Configuration:
    constants, aligned = layout_constants(layout, "")
    constants |= {"HAS_MASK": mask, "MAY_BE_WHOLE": dtype != "fp32"}
    constants |= {"UNIT": 1 if layout == "last" else 16}
    constants |= {"TILE_P": _stream.ROWS, "TILE_C": 64, "BLOCK_C": 128}
    types = {"x": f"*{dtype}", "factors": "*fp64", "mask": "*u8", "parts": "*fp16"}
    aligned |= {*types, "round_begin", "rows", "positions", "channels", "width"}
    name = f"cross_moments centre {dtype} channels-{layout}{' mask' if mask else ''}"
    return Configuration(name, _stream.centre_kernel, types, constants, aligned)


def product(
    target: str, channels: int, same: bool, whole: bool, tma: bool = False
) -> Configuration:
    block = cross_moments.make_plan(1 << 16, channels, channels, same).block_x
    options: dict[str, Any] = cross_moments.product_options(target != "sm_90", block, block)
    block_p = options.pop("BLOCK_P")
    constants = {"SAME": same, "MAY_BE_WHOLE": whole, "TMA": tma}
    constants |= {"BLOCK_X": block, "BLOCK_Y": block, "BLOCK_P": block_p}
    parts = ("x_parts", "y_parts")
    types = dict.fromkeys(("x_factors", "y_factors"), "*fp64") | {"partial": "*fp32"}
    if not tma:
        types |= dict.fromkeys(parts, "*fp16")
    aligned = set(types) | {"split_rows", "rows", "width_x", "width_y", "channels_x", "channels_y"}
    name = f"cross_moments product {channels}{' same' if same else ''}{' whole' if whole else ''}"
    if tma:
        types |= dict.fromkeys(parts, f"tensordesc<fp16[{block_p}, {block}]>")
        name += " TMA"
    return Configuration(name, cross_moments.product_kernel, types, constants, aligned, options)


def pruning(dtype: str) -> Iterator[Configuration]:
    """The three kernels of magprune for one type."""
    bits = {"fp16": "i16", "bf16": "i16", "fp32": "i32", "fp64": "i64"}[dtype]
    types = {"x": f"*{dtype}", "out": f"*{dtype}", "bits": f"*{bits}", "ends": "*i64"}
    types |= dict.fromkeys(("scratch", "least", "counts", "source", "target"), "*i32")
    types |= {"factors": "*fp64", "offset": "i64", "seed": "i64"}
    digits = {"DIGITS": {"i16": 4, "i32": 8, "i64": 16}[bits]}
    wide = {"WIDE": tl.float64 if dtype == "fp64" else tl.float32}
    chunks = {"SEGMENT": 1 << 20, "CHUNK": magprune.CHUNK}
    for kind, kernel, constants in (
        ("short", magprune.short_kernel, wide),
        ("count", magprune.count_kernel, chunks),
        ("move", magprune.move_kernel, chunks | wide),
    ):
        given = {name: type_ for name, type_ in types.items() if name in kernel.arg_names}
        aligned = {name for name, type_ in given.items() if type_.startswith("*")} | {"length"}
        name = f"magprune {kind} {dtype}"
        options = {"num_warps": magprune.WARPS}
        constants = constants | digits | {"BLOCK": magprune.BLOCK}
        yield Configuration(name, kernel, given, constants, aligned, options)


def configurations(target: str) -> Iterator[Configuration]:
    for dtype, layout, mask in (
        ("fp32", "last", False), ("fp32", "last", True), ("fp32", "first", False),
        ("fp32", "first", True), ("bf16", "first", False), ("fp64", "last", False),
    ):  # fmt: skip
        yield moments(dtype, layout, mask, 1 if layout == "last" else 16)
    yield Configuration(
        "channel_moments pool",
        channel_moments.pool_kernel,
        {"count": "*i64"} | dict.fromkeys(("partial", "mean", "m2"), "*fp64"),
        {
            "BLOCK_S": channel_moments.MERGE_PARTIALS,
            "BLOCK_C": channel_moments.MERGE_CHANNELS,
        },
        {"partial", "mean", "m2", "channels"},
    )
    for dtype, layout, mask in (
        ("fp32", "last", False), ("fp32", "first", True), ("bf16", "last", True),
        ("bf16", "first", False),
    ):  # fmt: skip
        yield centre(dtype, layout, mask)
    for dtype in ("fp32", "bf16", "fp64"):
        yield from pruning(dtype)
    for same in (False, True):
        for whole in (False, True):
            yield product(target, 256, same, whole)
    yield product(target, 64, same=True, whole=False)
    if has_descriptors(target):
        yield moments("fp32", "last", mask=False, tma=True)
        yield product(target, 256, same=False, whole=True, tma=True)
    yield Configuration(
        "cross_moments state",
        _stream.state_kernel,
        {"count": "*i64"} | dict.fromkeys(("mean", "m2", "partial", "factors"), "*fp64"),
        {
            "DROPPED": 16,
            "BLOCK_S": channel_moments.MERGE_PARTIALS,
            "BLOCK_C": channel_moments.MERGE_CHANNELS,
        },
        {"mean", "m2", "partial", "factors", "channels"},
    )
    yield Configuration(
        "cross_moments sum",
        cross_moments.sum_kernel,
        dict.fromkeys(("comoment", "x_factors", "y_factors", "m2"), "*fp64")
        | {"partial": "*fp32", "count": "*i64"},
        {"SAME": True, "FIRST": True, "BLOCK": cross_moments.SUM_BLOCK},
        {"partial", "comoment", "channels_x", "channels_y"},
    )


def compile_for(target: GPUTarget, configuration: Configuration) -> Any:
    kernel, constants = configuration.kernel, dict(configuration.constants)
    options = dict(configuration.options)
    signature = {
        name: "constexpr" if name in constants else configuration.types.get(name, "i32")
        for name in kernel.arg_names
    }
    divisible = [["tt.divisibility", 16]]
    attributes = {(kernel.arg_names.index(name),): divisible for name in configuration.aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})


def facts(target: str, configuration: Configuration) -> dict[str, Any]:
    compiled = compile_for(TARGETS[target], configuration)
    found: dict[str, Any] = {
        "target": target,
        "name": configuration.name,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }
    if TARGETS[target].backend == "hip":
        code = compiled.asm["amdgcn"]
        spills = code.partition(".vgpr_spill_count:")[2].split()[0]
        return found | {"spills": int(spills), "mma": code.count("v_mfma")}
    found["bulk_copies"] = compiled.asm["ptx"].count("cp.async.bulk.tensor")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return found | asdict(facts_of_cubin(cubin))


def jobs() -> list[tuple[str, str]]:
    """(target, name) of everything that is compiled; AMD gets one of each kind."""
    amd = {
        "channel_moments fp32 channels-first", "cross_moments product 256", "magprune short fp32"
    }  # fmt: skip
    return [
        (target, each.name)
        for target in TARGETS
        for each in configurations(target)
        if target != "gfx942" or each.name in amd
    ]


def run(job: tuple[str, str]) -> dict[str, Any]:
    target, name = job
    return facts(target, next(each for each in configurations(target) if each.name == name))


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        for result in pool.map(run, jobs()):
            print(json.dumps(result))
            sys.stdout.flush()
