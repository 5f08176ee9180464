"""Two models drawn apart, one brought into the other's order by rebasin and by nlm.

Each a whole process, from the import of the package to the permuted model in a file, in turns: its
time, its peak memory, and the inner product of the parameters that it reached.

    python benchmarks/host_rebasin.py [--size SIZE] [--rows NETWORK ...] [--repeat N]
"""

import argparse
from pathlib import Path
from typing import Any

from _rebasin import MODULES, NETWORKS, SIZES, build
from _whole_processes import Command, Host, arguments, main, objectives


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    (folder / "size").write_text(options.size)
    return {}


def commands(network: str, folder: Path) -> dict[str, Command]:
    outs = {program: folder / f"{program}.safetensors" for program in MODULES}
    size = (folder / "size").read_text()
    return {
        program: Command("_rebasin", [program, network, size, str(out)], out)
        for program, out in outs.items()
    }


def start(folder: Path) -> Command:
    return Command("_rebasin", ["rebasin", "mlp", "tiny", "-"], folder)


def parameters(network: str, folder: Path, options: argparse.Namespace) -> dict[str, int]:
    return {"parameters": sum(x.numel() for x in build(network, options.size)[0].parameters())}


HOST = Host("rebasin", "rebasin", NETWORKS, prepare, commands, start, objectives, parameters)

if __name__ == "__main__":
    parser = arguments(HOST, __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    main(HOST, parser.parse_args())
