"""Merges of models of 1.1 B parameters in bfloat16, as whole processes: is time linear in bytes, is
memory fixed, and how near is it to a program that only copies?

Writes three Llama-like folders of sharded files (6.6 GB; removed afterwards), at a quarter, a half
and the whole of the size, and merges them by ``nlm merge``, flushed to the disk and with SHA-256.
The copying program runs in turns with it: one thread reads the experts, another copies the base and
flushes it, so that it reads and writes the same bytes. ``--cold`` drops the files from the
system's cache before each run.

    python benchmarks/host_scale.py [--layers 3 10 22] [--methods linear ties task_arithmetic]
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from _bench import RESULTS, facts, machine, write
from _llamas import MODELS
from _whole_processes import run

from nlm.checkpoint.shards import Part, ShardFile, plan_shards

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.2},
}
SHARD_BYTES = 500_000_000
BLOCK = 1 << 22  # entries
BLOCKS = 8
BUFFER = 1 << 23


def parts(width: int, inner: int, layers: int, words: int) -> Iterator[Part]:
    """The tensors of a Llama with grouped queries (an eighth of the width for keys and values)."""
    yield "model.embed_tokens.weight", "BF16", (words, width)
    for number in range(layers):
        at = f"model.layers.{number}"
        yield f"{at}.input_layernorm.weight", "BF16", (width,)
        for name, rows in (("q", width), ("k", width // 8), ("v", width // 8), ("o", width)):
            yield f"{at}.self_attn.{name}_proj.weight", "BF16", (rows, width)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (width,)
        for name, shape in (
            ("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner)),
        ):  # fmt: skip
            yield f"{at}.mlp.{name}_proj.weight", "BF16", shape
    yield "model.norm.weight", "BF16", (width,)
    yield "lm_head.weight", "BF16", (words, width)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, to the nearest."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_models(folder: Path, tensors: list[Part]) -> int:
    """The base and the experts around it, of blocks of random numbers in turns; bytes of each."""
    base = [0.02 * np.random.default_rng(k).standard_normal(BLOCK, np.float32)
            for k in range(BLOCKS)]  # fmt: skip
    total = 0
    for number, model in enumerate(MODELS):
        blocks = []
        for k, block in enumerate(base):
            noise = np.random.default_rng(BLOCKS * (number + 1) + k)
            moved = block + 0.002 * noise.standard_normal(BLOCK, np.float32) if number else block
            blocks.append(rounded(moved))
        target = folder / model
        target.mkdir()
        (target / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
        shards = plan_shards(target, tensors, SHARD_BYTES, {"format": "pt"})
        total = sum(shard.bytes for shard in shards)
        for shard in shards:
            file = ShardFile(target / shard.name, shard, digest=False)
            for entry in shard.tensors:
                for at in range(0, entry.size, BLOCK):
                    file.write(blocks[at // BLOCK % BLOCKS][: entry.size - at])
            file.close(sync=True)
        weights = {entry.name: shard.name for shard in shards for entry in shard.tensors}
        index = json.dumps({"metadata": {}, "weight_map": weights})
        (target / "model.safetensors.index.json").write_text(index)
    return total


def files_of(folder: Path) -> list[Path]:
    return [file for model in MODELS for file in sorted((folder / model).glob("*.safetensors"))]


def drop_from_cache(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(folder: Path) -> float:
    """Seconds of a program that reads what a merge reads and writes what it writes."""
    out = folder / "copy"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    base, *experts = ([f for f in files_of(folder) if f.parent.name == model] for model in MODELS)

    def read(files: list[Path]) -> None:
        buffer = bytearray(BUFFER)
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    start = time.perf_counter()
    reader = threading.Thread(target=read, args=([file for each in experts for file in each],))
    reader.start()
    buffer = memoryview(bytearray(BUFFER))
    for file in base:
        with file.open("rb", buffering=0) as source, (out / file.name).open("wb", 0) as target:
            while size := source.readinto(buffer):
                target.write(buffer[:size])
            os.fsync(target.fileno())
    reader.join()
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def measure(folder: Path, method: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of a method and of the copy, in turns."""
    file = folder / f"{method}.yaml"
    models = [{"model": str(folder / model)} for model in MODELS]
    content: dict[str, Any] = {"merge_method": method, "parameters": METHODS[method]}
    if method == "linear":
        content["models"] = models  # three are read by all methods
    else:
        content |= {"base_model": models[0]["model"], "models": models[1:]}
    file.write_text(yaml.safe_dump(content))
    out = folder / "out"
    runs, copies = [], []
    for _ in range(options.repeat):
        shutil.rmtree(out, ignore_errors=True)
        if options.cold:
            drop_from_cache(files_of(folder))
        merge = ["merge", str(file), "--output", str(out), "--quiet"]
        runs.append(run("nlm", merge, options.threads))
        if options.cold:
            drop_from_cache(files_of(folder))
        copies.append(copy(folder))
    seconds = statistics.median(each["seconds"] for each in runs)
    copied = statistics.median(copies)
    moved = (len(MODELS) + 1) * size
    return {
        "method": method, "parameters": size // 2, "bytes": moved, "seconds": seconds,
        "copy_s": copied, "gb_per_s": moved / seconds / 1e9, "copy_gb_per_s": moved / copied / 1e9,
        "fraction": copied / seconds, "own": max(each["own"] for each in runs),
        "peak": max(each["bytes"] for each in runs),
    }  # fmt: skip


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds = start + bytes / rate, by least squares, and how far the worst size lies from it."""
    moved = np.array([row["bytes"] for row in rows], float)
    seconds = np.array([row["seconds"] for row in rows])
    slope, start = np.polyfit(moved, seconds, 1)
    off = float(np.max(np.abs(slope * moved + start - seconds) / seconds))
    return {"start_s": float(start), "gb_per_s": float(1 / slope / 1e9), "worst": off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 10, 22])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--words", type=int, default=32000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cold", action="store_true", help="read from the disk, not its cache")
    parser.add_argument("--folder", type=Path, help="where models and results are written")
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "host_scale.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for layers in options.layers:
        tensors = list(parts(options.width, options.inner, layers, options.words))
        needed = 5 * 2 * sum(int(np.prod(shape)) for _, _, shape in tensors)
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            if needed > (free := shutil.disk_usage(name).free):
                raise SystemExit(f"the models need {needed} bytes of disk, got {free} free")
            size = write_models(Path(name), tensors)
            for method in options.methods:
                row = measure(Path(name), method, size, options)
                rows.append(row)
                print(
                    f"{row['parameters'] / 1e6:7.0f} M  {method:<16} {row['seconds']:6.2f} s  "
                    f"{row['gb_per_s']:5.2f} GB/s  {100 * row['fraction']:4.0f} % of a copy's "
                    f"{row['copy_s']:.2f} s  {row['own'] / 2**20:.0f} MiB of its own",
                    flush=True,
                )
    lines = {
        method: fit([row for row in rows if row["method"] == method]) for method in options.methods
    } if len(options.layers) > 1 else {}  # fmt: skip
    for method, line in lines.items():
        print(
            f"{method}: {line['start_s']:.2f} s and {line['gb_per_s']:.2f} GB/s, no size further "
            f"than {100 * line['worst']:.0f} % from that"
        )
    about = {"threads": options.threads, "repeat": options.repeat, "cold": options.cold}
    write(options.json, {**facts(), **about, "rows": rows, "lines": lines})


if __name__ == "__main__":
    main()
