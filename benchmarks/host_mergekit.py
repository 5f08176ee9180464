"""Merges by mergekit and the same on nlm, each a whole process: its time and its peak memory.

Writes a foundation and two experts (Llamas of random numbers, float32), runs ``mergekit-yaml``,
``nlm-mergekit-yaml`` and ``nlm merge`` (with, and without, flushing to the disk and SHA-256) on one
configuration in turns, and counts the entries in which their results differ: none of the methods of
float32 bits but where entries are as large as a threshold, most of those that draw at random.

    python benchmarks/host_mergekit.py [--size SIZE] [--rows METHOD ...] [--repeat N]
"""

from pathlib import Path
from typing import Any

import yaml
from _llamas import MODELS, prepare, sized
from _whole_processes import Command, Host, arguments, compared, main

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
OF_HOST = {"mergekit": "mergekit.scripts.run_yaml", "nlm": "nlm.integrations.mergekit.command"}
ALONE = {"merge": [], "merge_unsafe": ["--no-sync", "--no-digest"]}


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


def commands(method: str, folder: Path) -> dict[str, Command]:
    """The host's command line with and without nlm, and nlm's own."""
    file = folder / f"{method}.yaml"
    file.write_text(recipe(method, folder))
    outs = {program: folder / f"out_{program}" for program in (*OF_HOST, *ALONE)}
    given = {
        program: (module, [str(file), str(outs[program]), "--quiet", "--no-copy-tokenizer"])
        for program, module in OF_HOST.items()
    }
    given |= {
        program: ("nlm", ["merge", str(file), "--output", str(outs[program]), "--quiet", *unsafe])
        for program, unsafe in ALONE.items()
    }
    return {
        program: Command(*each, outs[program] / "model.safetensors")
        for program, each in given.items()
    }


def start(folder: Path) -> Command:
    return Command(OF_HOST["mergekit"], ["--help"], folder)


HOST = Host("mergekit", "mergekit", tuple(METHODS), prepare, commands, start, compared)

if __name__ == "__main__":
    main(HOST, sized(arguments(HOST, __doc__), "252M").parse_args())
