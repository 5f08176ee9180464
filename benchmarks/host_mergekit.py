"""Merges by mergekit and the same on nlm, each a whole process: its time and its peak memory.

Writes a foundation and two experts (Llamas of random numbers, float32), runs ``mergekit-yaml``,
``nlm-mergekit-yaml`` and ``nlm merge`` (with, and without, flushing to the disk and SHA-256) on one
configuration in turns, and counts the entries in which their results differ: none of the methods of
float32 bits but where entries are as large as a threshold, most of those that draw at random. Peak
memory is that of the process, with the pages of the files it reads; beside it, what it holds itself
(RssAnon, looked at every 10 ms).

    python benchmarks/host_mergekit.py [--size SIZE] [--methods NAME ...] [--repeat N]
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from _bench import RESULTS, facts, machine, write
from safetensors import safe_open
from safetensors.torch import save_file

from nlm.symmetry import pretrained

#: Units of the stream, units of the feed-forward layers, layers.
SIZES = {
    "tiny": (32, 48, 2), "61M": (512, 1792, 15), "130M": (768, 2560, 15), "252M": (1024, 3584, 16),
}  # fmt: skip
MODELS = ("base", "one", "two")
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.2},
    "dare_linear": {"weight": 0.5, "density": 0.2},
    "dare_ties": {"weight": 0.5, "density": 0.2},
    "breadcrumbs": {"weight": 0.5, "density": 0.2},
    "della": {"weight": 0.5, "density": 0.2},
}
PROGRAMS = {
    "mergekit": "mergekit.scripts.run_yaml", "nlm": "nlm.integrations.mergekit.command",
    "merge": "nlm", "merge_unsafe": "nlm",
}  # fmt: skip
OF_HOST = ("mergekit", "nlm")
STREAMED = (
    "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs",
    "della",
)  # fmt: skip


def write_models(folder: Path, size: str) -> int:
    """The three models, where they are not there yet; the number of parameters of each."""
    from transformers import LlamaConfig

    width, inner, layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64), architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    shapes = {
        name: x.shape
        for name, x in pretrained.build_model(config, device="meta").state_dict().items()
    }
    base: dict[str, torch.Tensor] = {}
    for number, model in enumerate(MODELS):
        make = torch.Generator().manual_seed(number)
        state = {name: 0.02 * torch.randn(shape, generator=make) for name, shape in shapes.items()}
        base = base or state
        if state is not base:
            state = {name: base[name].add(noise, alpha=0.1) for name, noise in state.items()}
        config.save_pretrained(folder / model)
        save_file(state, folder / model / "model.safetensors", {"format": "pt"})
    return sum(shape.numel() for shape in shapes.values())


def recipe(method: str, folder: Path) -> str:
    """A configuration of the host."""
    parameters = METHODS[method]
    content = {"merge_method": method, "dtype": "float32", "parameters": parameters}
    models = [str(folder / model) for model in MODELS]
    if method == "slerp":
        content |= {"base_model": models[1]}
    elif method != "linear":
        content |= {"base_model": models[0]}
    return yaml.safe_dump(content | {"models": [{"model": model} for model in models[1:]]})


def run(module: str, arguments: list[str], threads: int) -> dict[str, float]:
    """Seconds of a module's process, its peak bytes, and those of them that are its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, *arguments]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        own, ended = 0, 0
        while not ended:
            own = max(own, anonymous(process.pid))
            time.sleep(0.01)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}: {said.read().decode()}")
    return {"seconds": seconds, "bytes": used.ru_maxrss * 1024, "own": own}


def anonymous(process: int) -> int:
    """Bytes of memory that belong to no file; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", status)
    return 1024 * int(found[1]) if found else 0


def arguments(program: str, file: Path, out: Path) -> list[str]:
    """Of a program that merges what a file says."""
    if program in OF_HOST:
        return [str(file), str(out), "--random-seed", "0", "--quiet", "--no-copy-tokenizer"]
    unsafe = ["--no-sync", "--no-digest"] if program == "merge_unsafe" else []
    return ["merge", str(file), "--output", str(out), "--quiet", *unsafe]


def compared(one: Path, other: Path) -> dict[str, float]:
    """The part of the entries that differ, and the largest difference beside the largest entry."""
    differing, entries, most, largest = 0, 0, 0.0, 0.0
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        if set(first.keys()) != set(second.keys()):
            raise SystemExit(f"{one} and {other} have other entries; nothing is reported")
        for name in first.keys():
            x, y = first.get_tensor(name), second.get_tensor(name)
            differing += int((x != y).sum())
            entries += x.numel()
            most = max(most, float((x - y).abs().max()))
            largest = max(largest, float(x.abs().max()))
    return {"differing": differing / entries, "difference": most / largest}


def measure(method: str, folder: Path, repeat: int, threads: int) -> dict[str, Any]:
    """A method on all programs, in turns: medians, and how the results compare."""
    file = folder / f"{method}.yaml"
    file.write_text(recipe(method, folder))
    programs = PROGRAMS if method in STREAMED else OF_HOST
    runs: dict[str, list[dict[str, float]]] = {program: [] for program in programs}
    for _ in range(repeat):
        for program, found in runs.items():
            out = folder / f"out_{program}"
            shutil.rmtree(out, ignore_errors=True)
            found.append(run(PROGRAMS[program], arguments(program, file, out), threads))
    row: dict[str, Any] = {"method": method}
    for program, found in runs.items():
        row[f"{program}_s"] = statistics.median(each["seconds"] for each in found)
        row[f"{program}_bytes"] = max(each["bytes"] for each in found)
        row[f"{program}_own"] = max(each["own"] for each in found)
    stock, *others = (folder / f"out_{program}" / "model.safetensors" for program in programs)
    row |= {"ratio": row["mergekit_s"] / row["nlm_s"]} | compared(stock, others[0])
    if method in STREAMED:
        row |= {f"merge_{name}": value for name, value in compared(stock, others[1]).items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="252M")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where models and results are written")
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "host_mergekit.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parameters = write_models(Path(folder), options.size)
        starts = [
            run(PROGRAMS["mergekit"], ["--help"], options.threads) for _ in range(options.repeat)
        ]
        start = statistics.median(each["seconds"] for each in starts)
        print(f"{parameters / 1e6:.1f} M parameters, the host starts in {start:.1f} s", flush=True)
        rows = []
        for method in options.methods:
            row = measure(method, Path(folder), options.repeat, options.threads)
            rows.append(row)
            print(
                f"{method:<16} mergekit {row['mergekit_s']:7.1f} s "
                f"{row['mergekit_bytes'] / 1e9:5.2f} GB  nlm {row['nlm_s']:7.1f} s "
                f"{row['nlm_bytes'] / 1e9:5.2f} GB  x{row['ratio']:.2f}  "
                f"{100 * row['differing']:.2g} % differ, by {row['difference']:.0e}; nlm merge "
                f"{row.get('merge_s', 0):.1f} s, {row.get('merge_unsafe_s', 0):.1f} s without "
                f"flushing and digests, {row.get('merge_own', 0) / 2**20:.0f} MiB of its own",
                flush=True,
            )
    report = {"host": f"mergekit {metadata.version('mergekit')}", "parameters": parameters}
    report |= {"start_s": start, "threads": options.threads, "repeat": options.repeat}
    write(options.json, {**facts(), **report, "rows": rows})


if __name__ == "__main__":
    main()
