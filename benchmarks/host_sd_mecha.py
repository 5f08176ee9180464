"""Recipes of sd-mecha by its own methods and by nlm's, each a whole process: time and peak memory.

Writes a foundation and two experts (Llamas of random numbers, float32), merges them by the host's
methods and by nlm's in turns, and counts the entries in which the results differ: in TIES where the
host keeps one entry more of a tensor, in DARE, which draws other numbers, most.

    python benchmarks/host_sd_mecha.py [--size SIZE] [--rows METHOD ...] [--repeat N]
"""

from pathlib import Path

from _llamas import prepare, sized
from _whole_processes import Command, Host, arguments, compared, main

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")


def commands(method: str, folder: Path) -> dict[str, Command]:
    outs = {program: folder / f"{program}.safetensors" for program in ("sd_mecha", "nlm")}
    return {
        program: Command("_sd_mecha", [program, method, str(folder), str(out)], out)
        for program, out in outs.items()
    }


def start(folder: Path) -> Command:
    return Command("_sd_mecha", ["start"], folder)


HOST = Host("sd_mecha", "sd-mecha", METHODS, prepare, commands, start, compared)

if __name__ == "__main__":
    main(HOST, sized(arguments(HOST, __doc__), "61M").parse_args())
