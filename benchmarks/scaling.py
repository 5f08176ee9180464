"""How time and memory grow: every operation, and tracing, aligning, merging and correcting.

    python benchmarks/scaling.py operations|models|files [--json FILE]

Each curve is measured at several sizes (the median of a few calls; memory is the highest resident
size during a call over that before it) and a power is fitted to its three largest sizes by least
squares of the logarithms. ``operations``: in the elements of their tensors, or in channels and
units where products count. ``models``: perceptrons by width and by depth up to 1,000 layers, a
group of 1 to 16,384 units. ``files``: state dicts and files by bytes and by the number of their
tensors, up to 20,000. Written to ``results/<machine>/scaling_<part>.json``; ``scaling_page.py``
makes docs/scaling.md of them.
"""

import argparse
import ctypes
import gc
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _bench import RESULTS, facts, machine, write
from safetensors.torch import save_file
from torch import Tensor, nn

import nlm
from nlm import ops
from nlm.align.weights import weight_matching
from nlm.checkpoint import open_checkpoint
from nlm.streaming import Plan
from nlm.streaming import run as stream

FITTED = 3  # points, the largest
SECONDS = 0.3  # for the calls of a point


@dataclass(frozen=True)
class Curve:
    """One subject and what grows; ``at(size)`` prepares a call."""

    subject: str
    grows: str
    sizes: tuple[int, ...]
    at: Callable[[int], Callable[[], object]]


def rows(count: int, width: int = 256) -> Tensor:
    return torch.randn(count // width, width, generator=torch.Generator().manual_seed(0))


def operations() -> Iterator[Curve]:
    elements = tuple(1 << n for n in (18, 20, 22, 24, 26))
    units = (128, 256, 512, 1024, 2048)

    def per_element(subject: str, call: Callable[[Tensor], Callable[[], object]]) -> Curve:
        return Curve(subject, "elements", elements, lambda n: call(rows(n)))

    def moments(x: Tensor) -> Callable[[], object]:
        return lambda: ops.channel_moments(x, 1)

    def scaled(x: Tensor) -> Callable[[], object]:
        scale = torch.ones(2, 256)
        return lambda: ops.scale_shift(x, scale, scale, 0, 1)

    def permuted(x: Tensor) -> Callable[[], object]:
        rows, columns = torch.randperm(len(x)), torch.randperm(256)
        return lambda: ops.permute([x], [[rows, columns]], [[0, 1]])

    def threshold(x: Tensor) -> Callable[[], object]:
        return lambda: ops.magnitude_threshold([x], x.numel() // 5)

    def signs(x: Tensor) -> Callable[[], object]:
        experts = [[x + k] for k in range(1, 5)]
        limits = torch.ones(4)
        return lambda: ops.sign_merge([x], experts, limits)

    def masks(x: Tensor) -> Callable[[], object]:
        expert, merged = x + 1, x + 2
        return lambda: ops.tall_mask(expert, x, merged, 0.4)

    def dropped(x: Tensor) -> Callable[[], object]:
        expert = x + 1
        return lambda: ops.dare(expert, x, 0.5, 0)

    def pruned(x: Tensor) -> Callable[[], object]:
        return lambda: ops.magprune(x, 0.5, 0.2, 0)

    def summed(x: Tensor) -> Callable[[], object]:
        experts = [x + k for k in range(1, 5)]
        return lambda: ops.weighted_sum(experts, 0.25, x)

    def products(x: Tensor) -> Callable[[], object]:
        experts = [x + k for k in range(1, 5)]
        return lambda: ops.inner_products(experts, x)

    for name, of in (
        ("channel_moments", moments), ("scale_shift", scaled), ("permute", permuted),
        ("magnitude_threshold", threshold), ("sign_merge", signs), ("tall_mask", masks),
        ("dare", dropped), ("magprune", pruned), ("weighted_sum", summed),
        ("inner_products", products),
    ):  # fmt: skip
        yield per_element(name, of)

    def crossed(n: int) -> Callable[[], object]:
        x, found = rows(4096 * n, n), nlm.statistics.CrossMoments.zeros(n)
        return lambda: found.update(x)

    def similar(n: int) -> Callable[[], object]:
        x, out = rows(n * n, n), torch.zeros(n, n, dtype=torch.float64)
        return lambda: ops.group_similarity_(out, x, x, [0])

    def assigned(n: int) -> Callable[[], object]:
        costs = torch.rand(n, n, generator=torch.Generator().manual_seed(0))
        return lambda: ops.assignment(costs, maximize=True)

    yield Curve("cross_moments_", "channels, of 4,096 samples", units[:-1], crossed)
    yield Curve("group_similarity_", "units, of as many entries each", units, similar)
    yield Curve("assignment", "units", units, assigned)


def perceptron(width: int, depth: int = 2, seed: int = 0, features: int = 64) -> nn.Sequential:
    """``depth`` hidden layers, initialised so that signals keep their size."""
    torch.manual_seed(seed)
    sizes = [features, *[width] * depth, 10]
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(sizes):
        layer = nn.Linear(inner, outer)
        nn.init.normal_(layer.weight, std=math.sqrt(2 / inner))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def inputs(count: int = 128) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(1))


def models() -> Iterator[Curve]:
    widths, depths = (64, 128, 256, 512, 1024), (10, 30, 100, 300, 1000)

    def traced(depth: int) -> Callable[[], object]:
        model = perceptron(16, depth)
        nlm.trace(perceptron(16, 2), inputs(8))  # what is imported on the way
        return lambda: nlm.trace(model, inputs(8))

    def spec_of(model: nn.Sequential) -> nlm.PermutationSpec:
        """Of a perceptron, as the trace finds it, without the time that its proof takes."""
        state = model.state_dict()
        last = max(int(name.split(".")[0]) for name in state)
        table: dict[str, tuple[str | None, ...]] = {}
        for name, tensor in state.items():
            at = int(name.split(".")[0])
            own = None if at == last else f"g{at}"
            table[name] = (own,) if tensor.dim() == 1 else (own, f"g{at - 2}" if at else None)
        return nlm.PermutationSpec.from_axes_to_perm(table, state)

    def aligned(width: int, depth: int = 2, sweeps: int = 100) -> Callable[[], object]:
        one, other = perceptron(width, depth), perceptron(width, depth, 1)
        spec = spec_of(one)
        states = one.state_dict(), other.state_dict()
        return lambda: weight_matching(*states, spec, max_sweeps=sweeps, layerwise=False)

    def found_again(units: int) -> Callable[[], object]:
        """One hidden layer, and itself in another order with noise."""
        one = perceptron(units, 1)
        spec = spec_of(one)
        state = spec.apply(spec.random(0), one.state_dict())
        noisy = {name: t + 0.01 * torch.randn_like(t) for name, t in state.items()}
        return lambda: weight_matching(one.state_dict(), noisy, spec)

    def corrected(width: int, depth: int = 2) -> Callable[[], object]:
        model = perceptron(width, depth)
        experts = {"a": perceptron(width, depth, 1), "b": perceptron(width, depth, 2)}
        data = {"a": [inputs()], "b": [inputs() * 2]}
        return lambda: nlm.Tact.fit(model, experts, data)

    yield Curve("trace, with its proof", "layers of width 16", depths[:4], traced)
    yield Curve("align (weights)", "width of two layers", widths, aligned)
    yield Curve(
        "align (weights), 2 sweeps", "layers of width 32", depths, lambda n: aligned(32, n, 2)
    )
    yield Curve(
        "align (weights)", "units of one group, a noisy copy", (1, 256, 1024, 4096, 16384),
        found_again,
    )  # fmt: skip
    yield Curve("correct (TACT), 2 tasks", "width of two layers", widths, corrected)
    yield Curve("correct (TACT), 2 tasks", "layers of width 32", depths, lambda n: corrected(32, n))


def state(tensors: int, size: int, seed: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {f"layers.{k}.weight": torch.randn(size, generator=made) for k in range(tensors)}


def files() -> Iterator[Curve]:
    sizes, tensors = tuple(1 << n for n in (18, 20, 22, 24, 26)), (100, 500, 2000, 8000, 20_000)

    def in_memory(count: int, size: int, method: str) -> Callable[[], object]:
        base, one, two = (state(count, size, seed) for seed in range(3))
        options: dict[str, Any] = {"density": 0.2} if method == "ties" else {}
        return lambda: nlm.merge({"a": one, "b": two}, base=base, method=method, **options)

    def streamed(count: int, size: int) -> Callable[[], object]:
        folder = Path(FOLDER.name)
        for seed, name in enumerate("bxy"):
            save_file(state(count, size, seed), folder / f"{name}.safetensors")
        base, one, two = (open_checkpoint(folder / f"{name}.safetensors") for name in "bxy")
        plan = Plan(
            folder / "out.safetensors", {"a": one, "b": two}, base, "ties",
            lambda name, *_: {"density": 0.2}.get(name, 1.0), {"dialect": "mergekit"},
        )  # fmt: skip
        return lambda: stream(plan, force=True, sync=False)

    for method in ("task_arithmetic", "ties"):
        yield Curve(
            f"merge in memory ({method})", "elements of 16 tensors", sizes,
            lambda n, method=method: in_memory(16, n // 16, method),
        )  # fmt: skip
        yield Curve(
            f"merge in memory ({method})", "tensors of 256 elements", tensors,
            lambda n, method=method: in_memory(n, 256, method),
        )  # fmt: skip
    yield Curve(
        "merge of files (ties)", "elements of 16 tensors", sizes, lambda n: streamed(16, n // 16)
    )
    yield Curve(
        "merge of files (ties)", "tensors of 256 elements", tensors, lambda n: streamed(n, 256)
    )


FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


def highest() -> int:
    """The highest resident size since :func:`forget`, bytes."""
    return _status("VmHWM")


def forget() -> int:
    """Forgets the highest resident size; returns the present one."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not at hand for the next
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def measured(call: Callable[[], object]) -> tuple[float, int, int]:
    """Median seconds, the calls it is of, and bytes of the first of them."""
    before = forget()
    times = []
    end = time.perf_counter() + SECONDS
    while not times or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        if len(times) == 1:
            memory = highest() - before
        del result
    kept = times[1:] if len(times) > 2 else times
    return statistics.median(kept), len(times), memory


def power(points: list[tuple[float, float]]) -> float:
    """The slope of the logarithms through the last points; 0 where there is nothing."""
    xs, ys = zip(*((math.log(x), math.log(max(y, 1e-9))) for x, y in points[-FITTED:]), strict=True)
    middle = statistics.mean(xs), statistics.mean(ys)
    return sum((x - middle[0]) * (y - middle[1]) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - middle[0]) ** 2 for x in xs
    )


def run(curve: Curve) -> dict[str, Any]:
    points = []
    for size in curve.sizes:
        call = curve.at(size)
        seconds, calls, memory = measured(call)
        points.append({"size": size, "seconds": seconds, "calls": calls, "bytes": memory})
        del call
    found = {
        "subject": curve.subject, "grows": curve.grows, "points": points,
        "time_power": power([(p["size"], p["seconds"]) for p in points]),
        "memory_power": power([(p["size"], max(p["bytes"], 4096)) for p in points]),
    }  # fmt: skip
    told = ", ".join(f"{p['size']}: {p['seconds']:.2g} s {p['bytes'] / 1e6:.3g} MB" for p in points)
    print(f"{curve.subject}, {curve.grows}: time^{found['time_power']:.2f} {told}", flush=True)
    return found


PARTS = {"operations": operations, "models": models, "files": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    with FOLDER:
        curves = [run(curve) for curve in PARTS[options.part]()]
    report = {
        **facts(), "part": options.part, "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start, "curves": curves,
    }  # fmt: skip
    write(options.json or RESULTS / machine() / f"scaling_{options.part}.json", report)


if __name__ == "__main__":
    main()
