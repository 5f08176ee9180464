"""One command for a machine with a GPU: builds, checks, measures, and writes one JSON file.

    python benchmarks/gpu_suite.py [--out FILE] [--skip-build]

1. builds and installs nlm with its CUDA module, offline, without build isolation;
2. checks every operator's GPU kernel on all conformance samples against the reference on the CPU,
   and that a second call gives the same bits;
3. runs a part of these checks under compute-sanitizer, where that is installed;
4. times the kernels beside their PyTorch peers, as fractions of a read, a copy and a GEMM: calls in
   a row, as a stream of batches makes them, so that a row is held to the slower of host and GPU;
5. checks and times what reads through tensor descriptors with NLM_TMA=1, and says in "tma_defaults"
   whether they should be the default.

Each step is a process of its own, so that a crash in one is a line in the report. Needs a PyTorch
built for CUDA with its triton, nvcc, and pytest's test dependencies; takes under eight minutes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _gpu import Workload, tma_defaults
from _gpu_masks import mask_workloads
from _gpu_selection import magprune_workloads, selection_workloads, sign_merge_workloads
from _gpu_sums import inner_products_workloads, weighted_sum_workloads
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"build": 100, "check": 130, "sanitize": 40, "measure": 140}
SECONDS |= {"check_tma": 30, "measure_tma": 30}  # 470 in all
#: What the kernels promise where the CPU's are more exact, relative to the largest entry.
PROMISED = {"channel_moments": 1e-6, "cross_moments_": 2e-6}
SANITIZED = ("dare", "permute", "scale_shift", "tall_mask")
WITH_TMA = ("channel_moments", "cross_moments")


def check_operator(name: str, device: str) -> dict[str, Any]:
    """Number of samples and the failures of one operator."""
    from _compare import allowed_error, map_tensors, relative_error, same_bits, to_float64
    from _conformance import call, cases

    from nlm._registry import operations

    operation, case = operations()[name], cases()[name]
    kernel = operation.kernels[device]
    failures, count = [], 0
    for sample in case.samples():
        count += 1
        moved = map_tensors(lambda t: _move(t, device), sample.args)
        try:
            results = [t.cpu() for t in call(operation, kernel, moved)]
            again = [t.cpu() for t in call(operation, kernel, moved)]
        except Exception as error:
            failures.append(f"{sample.name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        if not all(map(same_bits, results, again)):
            failures.append(f"{sample.name}: two calls differ")
        if case.plain is None:
            truths = call(operation, operation.reference, sample.args)
            pairs = enumerate(zip(results, truths, strict=True))
            wrong = [i for i, pair in pairs if not same_bits(*pair)]
            failures += [f"{sample.name}: result {i} differs from the reference" for i in wrong]
            continue
        truths = call(operation, operation.reference, to_float64(sample.args))
        plains = call(operation, case.plain, sample.args)
        products = case.products(*sample.args) if case.products is not None else None
        for i, (result, truth, plain) in enumerate(zip(results, truths, plains, strict=True)):
            limit = allowed_error(relative_error(plain, truth), result.dtype, products)
            limit = max(limit, PROMISED.get(name, 0.0))
            error = relative_error(result, truth)
            if not error <= limit:
                failures.append(f"{sample.name}: result {i} errs by {error:.2e} > {limit:.2e}")
    return {"samples": count, "failures": failures}


def _move(tensor: Tensor, device: str) -> Tensor:
    """On ``device`` in the same layout: the whole storage is moved."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.as_strided((elements,), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check(only: tuple[str, ...], device: str) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    from nlm._registry import operations

    results = {}
    for name, operation in operations().items():
        if only and operation.stem not in only:
            continue
        if operation.cpu_only:
            continue
        if device not in operation.kernels:
            results[name] = {"missing": operation.missing[device]}
            continue
        results[name] = check_operator(name, device)
    return results


def moments_workloads() -> Iterator[Workload]:
    from nlm import ops

    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((65536, 768), (262144, 1024), (256, 256, 56, 56)):
            x = torch.randn(shape, device="cuda", dtype=dtype)
            dims = [d for d in range(x.dim()) if d != 1]

            def plain(x: Tensor = x, dims: list[int] = dims) -> Any:
                return torch.var_mean(x.float(), dims, correction=0)

            providers = {
                "nlm": lambda x=x: ops.channel_moments(x),
                "torch.var_mean": plain,
                "torch.compile(var_mean)": torch.compile(plain),
            }
            amount = x.numel() * x.element_size()
            name, flops = str(list(shape)), 3.0 * x.numel()
            yield Workload("channel_moments", name, dtype, providers, amount, "read", flops)


def cross_workloads() -> Iterator[Workload]:
    from nlm import ops

    for dtype in (torch.float32, torch.bfloat16):
        for n, channels in ((65536, 768), (16384, 4096)):
            x, noise = torch.randn(2, n, channels, device="cuda").to(dtype).relu()
            y = x + noise
            zeros = torch.zeros(4, channels, device="cuda", dtype=torch.float64)
            matrix = torch.zeros(channels, channels, device="cuda", dtype=torch.float64)
            count = torch.zeros((), device="cuda", dtype=torch.int64)
            state = (count, *zeros, matrix)

            def plain(x: Tensor = x, y: Tensor = y) -> Tensor:
                return (x - x.mean(0)).T @ (y - y.mean(0))

            def step(state: tuple[Tensor, ...] = state, x: Tensor = x, y: Tensor = y) -> Tensor:
                ops.cross_moments_(*state, x, y)
                return state[-1]

            def error(result: Tensor, x: Tensor = x, y: Tensor = y) -> float:
                """The largest, in units of sqrt(m2_x m2_y)."""
                a, b = ((t - t.mean(0)) for t in (x.double(), y.double()))
                scale = torch.outer(a.square().sum(0), b.square().sum(0)).sqrt()
                return ((result - a.T @ b).abs() / scale).max().item()

            providers = {
                "nlm": step,
                "centre and mm": plain,
                "torch.compile(centre and mm)": torch.compile(plain),
            }
            flops = 2.0 * n * channels * channels
            name = f"[{n}, {channels}] twice"
            amount = 2 * x.numel() * x.element_size() + 16 * matrix.numel()
            yield Workload("cross_moments_", name, dtype, providers, flops, "gemm", amount, error)


def permute_workloads() -> Iterator[Workload]:
    from nlm import ops

    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((8192, 8192), (2048, 2048, 3, 3)):
            x = torch.randn(shape, device="cuda").to(dtype)
            p, q = (torch.randperm(n, device="cuda") for n in shape[:2])

            def plain(x: Tensor = x, p: Tensor = p, q: Tensor = q) -> Tensor:
                return x[p[:, None], q]

            providers = {
                "nlm": lambda x=x, p=p, q=q: ops.permute([x], [[p, q]], [[0, 1]]),
                "x[p[:, None], q]": plain,
                "index_select twice": lambda x=x, p=p, q=q: x.index_select(0, p).index_select(1, q),
                "torch.compile(x[p[:, None], q])": torch.compile(plain),
            }
            amount = 2 * x.numel() * x.element_size()
            yield Workload("permute", str(list(shape)), dtype, providers, amount, "copy")


def scale_shift_workloads() -> Iterator[Workload]:
    from nlm import ops

    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((65536, 768), (64, 256, 56, 56)):
            x = torch.randn(shape, device="cuda", dtype=dtype)
            scale, shift = torch.randn(2, 8, shape[1], device="cuda")
            task = torch.randint(8, shape[:1], device="cuda")
            broadcast = (*shape[:2], *[1] * (x.dim() - 2))

            def plain(
                x: Tensor = x, a: Tensor = scale, b: Tensor = shift, t: Tensor = task,
                broadcast: tuple[int, ...] = broadcast,
            ) -> Tensor:  # fmt: skip
                return (x * a[t].view(broadcast) + b[t].view(broadcast)).to(x.dtype)

            providers = {
                "nlm": lambda x=x, a=scale, b=shift, t=task: ops.scale_shift(x, a, b, task=t),
                "x * a[t] + b[t]": plain,
                "torch.compile(x * a[t] + b[t])": torch.compile(plain),
            }
            amount = 2 * x.numel() * x.element_size()
            name, flops = str(list(shape)), 2.0 * x.numel()
            yield Workload("scale_shift", name, dtype, providers, amount, "copy", flops)

            providers = {name: _backward(f, (x, scale, shift)) for name, f in providers.items()}
            name = f"{list(shape)}, backward"
            yield Workload("scale_shift", name, dtype, providers, 1.5 * amount, "copy", 2 * flops)


def _backward(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Gradients for the inputs, which are forward's first arguments."""
    graph: list[Any] = []

    def call() -> Any:
        if not graph:
            torch._functorch.config.donated_buffer = False  # which takes no retain_graph
            leaves = [x.detach().requires_grad_() for x in inputs]
            result = forward(*leaves)
            graph.extend((result, leaves, torch.randn_like(result)))
        return torch.autograd.grad(*graph, retain_graph=True)

    return call


def median_seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """Of one call among up to 20 in a row (50 ms), by the GPU's clock."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    in_a_row = max(1, min(20, int(0.05 / (time.perf_counter() - begin))))
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(in_a_row):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / in_a_row / 1e3)
    return statistics.median(times)


def measure_limits() -> dict[str, float]:
    """GB/s of a read and of a copy (both directions counted), GFLOP/s of a GEMM per type."""
    x = torch.ones(1 << 28, device="cuda")
    y = torch.empty_like(x)
    a = torch.randn(8192, 8192, device="cuda")
    b = a.bfloat16()
    return {
        "read": 4.0 * x.numel() / median_seconds(x.sum) / 1e9,
        "copy": 8.0 * x.numel() / median_seconds(lambda: y.copy_(x)) / 1e9,
        "gemm float32": 2.0 * 8192**3 / median_seconds(lambda: a @ a) / 1e9,
        "gemm bfloat16": 2.0 * 8192**3 / median_seconds(lambda: b @ b) / 1e9,
    }


def workloads(only: tuple[str, ...] = ()) -> Iterator[Workload]:
    """Of all operations, or ``only`` of some."""
    sources = {"channel_moments": moments_workloads, "cross_moments": cross_workloads}
    sources |= {"permute": permute_workloads, "scale_shift": scale_shift_workloads}
    sources |= {"selection": selection_workloads, "sign_merge": sign_merge_workloads}
    sources |= {"masks": mask_workloads, "weighted_sum": weighted_sum_workloads}
    sources |= {"inner_products": inner_products_workloads, "magprune": magprune_workloads}
    for stem, source in sources.items():
        if not only or stem in only:
            yield from source()


def measure(only: tuple[str, ...]) -> dict[str, Any]:
    """Rows of the benchmark, and the limits of the machine that their fractions refer to.

    ``only`` some operations are timed without their peers.
    """
    limits = measure_limits()
    rows: list[dict[str, Any]] = []
    for work in workloads(only):
        for provider, call in work.providers.items():
            if only and provider != "nlm":
                continue
            row = {
                "op": work.op,
                "workload": work.name,
                "dtype": str(work.dtype).removeprefix("torch."),
                "provider": provider,
            }
            try:
                if work.error is not None:
                    row["error"] = work.error(call())
                seconds = median_seconds(call)
            except Exception as error:
                rows.append(row | {"failed": f"{type(error).__name__}: {error}"[:500]})
                continue
            rate = work.amount / seconds / 1e9
            unit = "gflops" if work.limit == "gemm" else "gbps"
            limit = f"gemm {row['dtype']}" if work.limit == "gemm" else work.limit
            fraction = rate / limits[limit]
            rows.append(row | {"median_s": seconds, unit: rate, "fraction_of_limit": fraction})
    return {"limits": limits, "rows": rows}


def step(
    name: str, command: list[str], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Runs one step; its last line of output, where that is JSON, is its result."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT.parent,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=SECONDS[name],
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {SECONDS[name]} s"}
    result: dict[str, Any] = {"seconds": round(time.perf_counter() - begin, 1)}
    if done.returncode:
        output = done.stdout + done.stderr
        result["failed"] = output if len(output) < 8000 else f"{output[:4000]}...{output[-4000:]}"
    lines = done.stdout.strip().splitlines()
    if name != "build" and lines and lines[-1].startswith("{"):
        result["result"] = json.loads(lines[-1])
    print(f"{name}: {'FAILED' if done.returncode else 'done'} in {result['seconds']} s", flush=True)
    return result


def run_all(skip_build: bool) -> dict[str, Any]:
    this = [sys.executable, str(Path(__file__).resolve()), "--step"]
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    if not skip_build:
        install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
        install += ["--no-build-isolation", "-e", str(ROOT)]
        report["build"] = step("build", install, {"NLM_CUDA": "1"})
    report["check"] = step("check", [*this, "check"])
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        report["sanitize"] = {"skipped": "compute-sanitizer is not installed"}
    else:
        command = [sanitizer, "--error-exitcode", "1", *this, "check", "--only", *SANITIZED]
        report["sanitize"] = step("sanitize", command)
    report["measure"] = step("measure", [*this, "measure"])
    for part in ("check", "measure"):
        command = [*this, part, "--only", *WITH_TMA]
        report[f"{part}_tma"] = step(f"{part}_tma", command, {"NLM_TMA": "1"})
    report["tma_defaults"] = tma_defaults(report)
    return report


def failed(report: dict[str, Any]) -> bool:
    checks = [report[name].get("result", {}) for name in ("check", "check_tma")]
    return any("failed" in part for part in report.values() if isinstance(part, dict)) or any(
        each.get("failures") or "missing" in each for check in checks for each in check.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu_suite.json")
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--step", choices=["check", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", default=(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            f"gpu_suite: PyTorch {torch.__version__} finds no CUDA GPU, so nothing was built, "
            "checked or measured"
        )
    if options.step == "check":
        print(json.dumps(check(tuple(options.only), "cuda")))
    elif options.step == "measure":
        print(json.dumps(measure(tuple(options.only))))
    else:
        report = run_all(options.skip_build)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {options.out}")
        if failed(report):
            raise SystemExit("gpu_suite: something failed; see the report")


if __name__ == "__main__":
    main()
