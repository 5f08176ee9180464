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

import torch
import triton
import triton.language as tl
from _sass import facts_of_cubin
from nlm.kernels import channel_moments, cross_moments
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


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


def moments(dtype: str, layout: str, mask: bool) -> Configuration:
    constants, aligned = layout_constants(layout, "")
    strides = (1, 256) if layout == "last" else (256, 1)
    block_p, block_c = channel_moments.tile_shape(256, *strides)
    constants |= {
        "HAS_MASK": mask,
        "ACCUMULATOR": accumulator(dtype)[1],
        "FLUSH": channel_moments.FLUSH_TILES,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }
    types = {"x": f"*{dtype}", "mask": "*u8", "partial_count": "*i64"}
    types |= dict.fromkeys(("partial_mean", "partial_m2"), "*fp64")
    aligned |= {"x", "mask", "positions", "channels", "split_positions"}
    name = f"channel_moments {dtype} channels-{layout}{' mask' if mask else ''}"
    kernel = channel_moments.accumulate_kernel
    return Configuration(name, kernel, types, constants, aligned, {"num_warps": 4})


def product(dtype: str, layout: str, same: bool, mask: bool, channels: int) -> Configuration:
    constants, aligned = layout_constants(layout, "x_", "y_")
    options: dict[str, Any] = cross_moments.launch_options(DTYPES[dtype], channels, channels)
    constants |= {key: options.pop(key) for key in ("BLOCK_X", "BLOCK_Y", "BLOCK_P")}
    constants |= {
        "SAME": same,
        "HAS_MASK": mask,
        "ACCUMULATOR": accumulator(dtype)[1],
        "PRECISION": cross_moments.product_precision(DTYPES[dtype]),
    }
    wide = f"*{accumulator(dtype)[0]}"
    types = {"x": f"*{dtype}", "y": f"*{dtype}", "mask": "*u8"}
    types |= dict.fromkeys(("shift_x", "shift_y", "partial"), wide)
    aligned |= {"round_begin", "split_positions", "positions", "channels_x", "channels_y"}
    name = f"cross_moments {dtype} channels-{layout} {channels}"
    name += (" same" if same else "") + (" mask" if mask else "")
    return Configuration(
        name, cross_moments.product_kernel, types, constants, aligned | set(types), options
    )


def configurations() -> Iterator[Configuration]:
    for dtype, layout, mask in (
        ("fp32", "last", False), ("fp32", "last", True), ("fp32", "first", False),
        ("fp32", "first", True), ("bf16", "first", False), ("fp64", "last", False),
    ):  # fmt: skip
        yield moments(dtype, layout, mask)
    yield Configuration(
        "channel_moments pool",
        channel_moments.pool_kernel,
        {"partial_count": "*i64", "count": "*i64"}
        | dict.fromkeys(("partial_mean", "partial_m2", "mean", "m2"), "*fp64"),
        {
            "BLOCK_S": channel_moments.MERGE_PARTIALS,
            "BLOCK_C": channel_moments.MERGE_CHANNELS,
        },
        {"partial_count", "partial_mean", "partial_m2", "mean", "m2", "channels"},
    )
    for layout in ("last", "first"):
        yield product("fp32", layout, same=False, mask=False, channels=256)
        yield product("fp32", layout, same=True, mask=True, channels=256)
    yield product("bf16", "last", same=True, mask=True, channels=256)
    yield product("bf16", "first", same=False, mask=False, channels=256)
    yield product("fp64", "first", same=True, mask=True, channels=256)
    yield product("fp32", "last", same=True, mask=False, channels=64)
    yield Configuration(
        "cross_moments gather",
        cross_moments.gather_kernel,
        {"partial": "*fp32", "comoment": "*fp64"},
        {"SAME": True, "BLOCK": cross_moments.GATHER_BLOCK},
        {"partial", "comoment", "channels_x", "channels_y"},
    )


def compile_for(target: GPUTarget, configuration: Configuration) -> Any:
    kernel, constants = configuration.kernel, dict(configuration.constants)
    options = dict(configuration.options)
    if target.backend == "hip":  # as cross_moments chooses on AMD
        options.pop("maxnreg", None)
        if constants.get("PRECISION") == "tf32x3":
            constants["PRECISION"] = "bf16x3"
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
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return found | asdict(facts_of_cubin(cubin))


def jobs() -> list[tuple[str, str]]:
    """(target, name) of everything that is compiled; AMD gets one of each kind."""
    names = [configuration.name for configuration in configurations()]
    amd = {"channel_moments fp32 channels-first", "cross_moments fp32 channels-last 256"}
    return [
        (target, name) for target in TARGETS for name in names if target != "gfx942" or name in amd
    ]


def run(job: tuple[str, str]) -> dict[str, Any]:
    target, name = job
    return facts(target, next(each for each in configurations() if each.name == name))


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        for result in pool.map(run, jobs()):
            print(json.dumps(result))
            sys.stdout.flush()
