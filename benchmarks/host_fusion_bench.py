"""TIES by FusionBench and the same on nlm, each a whole process: its time and its peak memory.

Writes a foundation and two experts (Llamas of random numbers, float32), runs the host's command
line with ``method=ties_merging`` and ``method=nlm/ties`` in turns, on models that it loads and on
weights that it reads lazily, and counts the entries in which the results differ. Peak memory is
that of the process, with the pages of the files it reads; beside it, what it holds itself (RssAnon,
looked at every 10 ms). The host's start is a run that merges nothing; beside the whole processes
stand the seconds of the algorithm's ``run`` alone, on models that are in memory.

    python benchmarks/host_fusion_bench.py [--size SIZE] [--rows NAME ...] [--repeat N]
"""

import argparse
import os
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
from host_mergekit import MODELS, SIZES, compared, run, write_models

from nlm.integrations.fusion_bench import CONFIG_DIR

HOST = "fusion_bench.scripts.cli"
PROGRAMS = {"fusion_bench": "ties_merging", "nlm": "nlm/ties"}
#: merge function, whether weights are read lazily
ROWS = {
    "ties, sum": ("sum", False), "ties, mean": ("mean", False), "ties, sum, lazy": ("sum", True),
}  # fmt: skip


def write_pools(folder: Path) -> None:
    """The configurations of the pool, of loaded models and of lazy ones."""
    (folder / "modelpool").mkdir()
    names = ("_pretrained_", *MODELS[1:])
    models = {name: str(folder / model) for name, model in zip(names, MODELS, strict=True)}
    for name, lazy in (("loaded", False), ("lazy", True)):
        pool = {
            "_target_": "fusion_bench.modelpool.CausalLMPool", "_recursive_": False,
            "models": models, "tokenizer": None, "enable_lazy_loading": lazy,
        }  # fmt: skip
        (folder / "modelpool" / f"{name}.yaml").write_text(yaml.safe_dump(pool))


def arguments(folder: Path, method: str, out: Path | None, row: str = "ties, sum") -> list[str]:
    """Of the host's command line; without an output it merges nothing."""
    merge_func, lazy = ROWS[row]
    common = [
        "--config-dir", str(CONFIG_DIR), f"hydra.searchpath=[file://{folder}]",
        f"path.root_dir={folder}", "fabric.loggers=null", "print_config=false",
        "report_save_path=null",
        f"modelpool={'lazy' if lazy else 'loaded'}", f"method={method}",
    ]  # fmt: skip
    if out is None:
        return [*common, "dry_run=true"]
    return [*common, f"method.merge_func={merge_func}", f"merged_model_save_path={out}"]


def alone(method: str, folder: Path, row: str) -> None:
    """Prints the seconds of the algorithm's run, in this process."""
    from fusion_bench import BaseAlgorithm, BaseModelPool
    from fusion_bench.method import TiesMergingAlgorithm

    from nlm.integrations.fusion_bench import NlmTies

    merge_func, lazy = ROWS[row]
    pool = BaseModelPool.from_yaml(folder / "modelpool" / f"{'lazy' if lazy else 'loaded'}.yaml")
    models = pool if lazy else BaseModelPool({n: pool.load_model(n) for n in pool.all_model_names})
    kind: type[BaseAlgorithm] = NlmTies if method == PROGRAMS["nlm"] else TiesMergingAlgorithm
    algorithm = kind(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func=merge_func)
    start = time.perf_counter()
    algorithm.run(models)
    print(f"seconds: {time.perf_counter() - start}")


def seconds_alone(program: str, folder: Path, row: str, threads: int) -> float:
    """What :func:`alone` prints, in a process of its own."""
    command = [sys.executable, __file__, "--alone", PROGRAMS[program], str(folder), row]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return float(done.stdout.rpartition("seconds: ")[2])


def measure(row: str, folder: Path, repeat: int, threads: int) -> dict[str, Any]:
    """One row on both programs, in turns: medians, and how the results compare."""
    runs: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
    for _ in range(repeat):
        for program, found in runs.items():
            out = folder / f"out_{program}"
            shutil.rmtree(out, ignore_errors=True)
            found.append(run(HOST, arguments(folder, PROGRAMS[program], out, row), threads))
    result: dict[str, Any] = {"method": row}
    for program, found in runs.items():
        own = [seconds_alone(program, folder, row, threads) for _ in range(repeat)]
        result[f"{program}_run_s"] = statistics.median(own)
        result[f"{program}_s"] = statistics.median(each["seconds"] for each in found)
        result[f"{program}_bytes"] = max(each["bytes"] for each in found)
        result[f"{program}_own"] = max(each["own"] for each in found)
    files = (folder / f"out_{program}" / "model.safetensors" for program in PROGRAMS)
    result |= {"ratio": result["fusion_bench_s"] / result["nlm_s"]}
    result |= {"run_ratio": result["fusion_bench_run_s"] / result["nlm_run_s"]}
    return result | compared(*files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="130M")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where models and results are written")
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "host_fusion_bench.json")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        method, there, row = options.alone
        return alone(method, Path(there), row)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        parameters = write_models(folder, options.size)
        write_pools(folder)
        dry = arguments(folder, PROGRAMS["fusion_bench"], None)
        starts = [run(HOST, dry, options.threads) for _ in range(options.repeat)]
        start = statistics.median(each["seconds"] for each in starts)
        print(f"{parameters / 1e6:.1f} M parameters, the host starts in {start:.1f} s", flush=True)
        rows = []
        for each in options.rows:
            row = measure(each, folder, options.repeat, options.threads)
            rows.append(row)
            print(
                f"{each:<16} fusion_bench {row['fusion_bench_s']:6.1f} s "
                f"{row['fusion_bench_bytes'] / 1e9:5.2f} GB  nlm {row['nlm_s']:6.1f} s "
                f"{row['nlm_bytes'] / 1e9:5.2f} GB ({row['nlm_own'] / 1e9:.2f} its own)  "
                f"x{row['ratio']:.2f}, alone {row['fusion_bench_run_s']:.1f} and "
                f"{row['nlm_run_s']:.2f} s, x{row['run_ratio']:.1f}  "
                f"{100 * row['differing']:.2g} % differ, by {row['difference']:.0e}",
                flush=True,
            )
    report = {"host": f"fusion-bench {metadata.version('fusion-bench')}", "parameters": parameters}
    report |= {"start_s": start, "threads": options.threads, "repeat": options.repeat}
    write(options.json, {**facts(), **report, "rows": rows})


if __name__ == "__main__":
    main()
