"""Two models drawn apart, one brought into the other's order by rebasin and by nlm.

Each a whole process, from the import of the package to the permuted model in a file, in turns: its
time, its peak memory, and the inner product of the parameters that it reached.

    python benchmarks/host_rebasin.py [--size SIZE] [--networks NAME ...] [--repeat N]
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
from _rebasin import MODULES, NETWORKS, SIZES, build
from host_mergekit import run
from safetensors import safe_open


def measure(network: str, size: str, folder: Path, repeat: int, threads: int) -> dict[str, Any]:
    """A network by both, in turns: medians, and what was reached."""
    runs: dict[str, list[dict[str, float]]] = {program: [] for program in MODULES}
    outs = {program: folder / f"{program}.safetensors" for program in MODULES}
    for _ in range(repeat):
        for program, found in runs.items():
            outs[program].unlink(missing_ok=True)
            arguments = [program, network, size, str(outs[program])]
            found.append(run("_rebasin", arguments, threads))
    parameters = sum(each.numel() for each in build(network, size)[0].parameters())
    row: dict[str, Any] = {"method": network, "parameters": parameters}
    for program, found in runs.items():
        row[f"{program}_s"] = statistics.median(each["seconds"] for each in found)
        row[f"{program}_bytes"] = max(each["bytes"] for each in found)
        row[f"{program}_own"] = max(each["own"] for each in found)
        with safe_open(outs[program], "pt") as file:
            row[f"{program}_objective"] = float(file.metadata()["objective"])
    return row | {"ratio": row["rebasin_s"] / row["nlm_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where results are written")
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "host_rebasin.json")
    options = parser.parse_args()
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        starting = ["rebasin", "mlp", "tiny", "-"]
        starts = [run("_rebasin", starting, options.threads) for _ in range(options.repeat)]
        start = statistics.median(each["seconds"] for each in starts)
        print(f"the host starts in {start:.1f} s", flush=True)
        rows = []
        for network in options.networks:
            row = measure(network, options.size, Path(name), options.repeat, options.threads)
            rows.append(row)
            print(
                f"{network:<6} {row['parameters'] / 1e6:5.1f} M  rebasin {row['rebasin_s']:6.1f} s "
                f"{row['rebasin_bytes'] / 1e9:5.2f} GB  nlm {row['nlm_s']:6.1f} s "
                f"{row['nlm_bytes'] / 1e9:5.2f} GB  x{row['ratio']:.2f}  objective "
                f"{row['rebasin_objective']:.6g} and {row['nlm_objective']:.6g}",
                flush=True,
            )
    report = {"host": f"rebasin {metadata.version('rebasin')}", "start_s": start}
    report |= {"threads": options.threads, "repeat": options.repeat}
    write(options.json, {**facts(), **report, "rows": rows})


if __name__ == "__main__":
    main()
