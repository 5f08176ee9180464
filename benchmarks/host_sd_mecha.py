"""Recipes of sd-mecha by its own methods and by nlm's, each a whole process: time and peak memory.

Writes a foundation and two experts (Llamas of random numbers, float32), merges them by the host's
methods and by nlm's in turns, and counts the entries in which the results differ: in TIES where the
host keeps one entry more of a tensor, in DARE, which draws other numbers, most. Peak memory is that
of the process; beside it, what it holds itself (RssAnon, looked at every 10 ms).

    python benchmarks/host_sd_mecha.py [--size SIZE] [--methods NAME ...] [--repeat N]
"""

import argparse
import os
import statistics
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _bench import RESULTS, facts, machine, write
from host_mergekit import SIZES, compared, run, write_models

PROGRAMS = ("sd_mecha", "nlm")
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")


def measure(method: str, folder: Path, repeat: int, threads: int) -> dict[str, Any]:
    """A method by both, in turns: medians, and how the results compare."""
    runs: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
    outs = {program: folder / f"{program}.safetensors" for program in PROGRAMS}
    for _ in range(repeat):
        for program, found in runs.items():
            outs[program].unlink(missing_ok=True)
            arguments = [program, method, str(folder), str(outs[program])]
            found.append(run("_sd_mecha", arguments, threads))
    row: dict[str, Any] = {"method": method}
    for program, found in runs.items():
        row[f"{program}_s"] = statistics.median(each["seconds"] for each in found)
        row[f"{program}_bytes"] = max(each["bytes"] for each in found)
        row[f"{program}_own"] = max(each["own"] for each in found)
    return row | {"ratio": row["sd_mecha_s"] / row["nlm_s"]} | compared(*outs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="252M")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where models and results are written")
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "host_sd_mecha.json")
    options = parser.parse_args()
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        parameters = write_models(folder, options.size)
        starts = [run("_sd_mecha", ["start"], options.threads) for _ in range(options.repeat)]
        start = statistics.median(each["seconds"] for each in starts)
        print(f"{parameters / 1e6:.1f} M parameters, the host starts in {start:.1f} s", flush=True)
        rows = []
        for method in options.methods:
            row = measure(method, folder, options.repeat, options.threads)
            rows.append(row)
            print(
                f"{method:<16} sd-mecha {row['sd_mecha_s']:7.1f} s "
                f"{row['sd_mecha_bytes'] / 1e9:5.2f} GB  nlm {row['nlm_s']:7.1f} s "
                f"{row['nlm_bytes'] / 1e9:5.2f} GB  x{row['ratio']:.2f}  "
                f"{100 * row['differing']:.2g} % differ, by {row['difference']:.0e}",
                flush=True,
            )
    report = {"host": f"sd-mecha {metadata.version('sd-mecha')}", "parameters": parameters}
    report |= {"start_s": start, "threads": options.threads, "repeat": options.repeat}
    write(options.json, {**facts(), **report, "rows": rows})


if __name__ == "__main__":
    main()
