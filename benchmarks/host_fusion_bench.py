"""TIES by FusionBench and the same on nlm, each a whole process: its time and its peak memory.

Writes a foundation and two experts (Llamas of random numbers, float32), runs the host's command
line with ``method=ties_merging`` and ``method=nlm/ties`` in turns, on models that it loads and on
weights that it reads lazily, and counts the entries in which the results differ. Peak memory is
that of the process, with the pages of the files it reads. The host's start is a run that merges
nothing; beside the whole processes stand the seconds of the algorithm's ``run`` alone, on models
that are in memory.

    python benchmarks/host_fusion_bench.py [--size SIZE] [--rows ROW ...] [--repeat N]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from _llamas import MODELS, prepare, sized
from _whole_processes import Command, Host, compared, main
from _whole_processes import arguments as options_of

from nlm.integrations.fusion_bench import CONFIG_DIR

MODULES = {
    "fusion_bench": "fusion_bench.scripts.cli",
    "nlm": "nlm.integrations.fusion_bench.command",
}
METHODS = {"fusion_bench": "ties_merging", "nlm": "nlm/ties"}
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


def models_and_pools(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    about = prepare(folder, options)
    write_pools(folder)
    return about


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


def commands(row: str, folder: Path) -> dict[str, Command]:
    outs = {program: folder / f"out_{program}" for program in MODULES}
    return {
        program: Command(
            module, arguments(folder, METHODS[program], outs[program], row),
            outs[program] / "model.safetensors",
        )
        for program, module in MODULES.items()
    }  # fmt: skip


def start(folder: Path) -> Command:
    return Command(MODULES["fusion_bench"], arguments(folder, "ties_merging", None), folder)


def alone(method: str, folder: Path, row: str) -> None:
    """Prints the seconds of the algorithm's run, in this process."""
    from fusion_bench import BaseAlgorithm, BaseModelPool
    from fusion_bench.method import TiesMergingAlgorithm

    from nlm.integrations.fusion_bench import NlmTies

    merge_func, lazy = ROWS[row]
    pool = BaseModelPool.from_yaml(folder / "modelpool" / f"{'lazy' if lazy else 'loaded'}.yaml")
    models = pool if lazy else BaseModelPool({n: pool.load_model(n) for n in pool.all_model_names})
    kind: type[BaseAlgorithm] = NlmTies if method == METHODS["nlm"] else TiesMergingAlgorithm
    algorithm = kind(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func=merge_func)
    start = time.perf_counter()
    algorithm.run(models)
    print(f"seconds: {time.perf_counter() - start}")


def seconds_alone(program: str, folder: Path, row: str, threads: int) -> float:
    """What :func:`alone` prints, in a process of its own."""
    command = [sys.executable, __file__, "--alone", METHODS[program], str(folder), row]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return float(done.stdout.rpartition("seconds: ")[2])


def runs_alone(row: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of the algorithm's run by both."""
    found = {
        f"{program}_run_s": statistics.median(
            seconds_alone(program, folder, row, options.threads) for _ in range(options.repeat)
        )
        for program in MODULES
    }
    return found | {"run_ratio": found["fusion_bench_run_s"] / found["nlm_run_s"]}


HOST = Host(
    "fusion_bench", "fusion-bench", tuple(ROWS), models_and_pools, commands, start, compared,
    runs_alone,
)  # fmt: skip


if __name__ == "__main__":
    parser = sized(options_of(HOST, __doc__), "130M")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        method, there, row = options.alone
        alone(method, Path(there), row)
    else:
        main(HOST, options)
