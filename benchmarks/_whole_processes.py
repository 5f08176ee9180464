"""Hosts and the same on nlm, each run a whole process: its time, its peak memory, what came out.

A script ``host_<name>.py`` describes a :class:`Host` and ends in ``main(HOST, __doc__)``. All
programs of a row run in turns on the same files, and their results are compared; seconds are
medians, of the clock and of processors, which other work on the machine stretches less. Peak memory
is that of the process, with the pages of the files that it reads; beside it, what it holds itself
(VmHWM and RssAnon, looked at every 10 ms; the system's ``ru_maxrss`` begins at the peak of the
program that starts a process, which has written its inputs). The host's start is a run that does
nothing.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _bench import RESULTS, commit, facts, machine, write
from safetensors import safe_open

Row = dict[str, Any]


class Command(NamedTuple):
    """A module, its arguments, and the file that holds what it computed."""

    module: str
    arguments: list[str]
    result: Path


@dataclass(frozen=True)
class Host:
    """What is run.

    Attributes
    ----------
    name : of its results, ``host_<name>.json``, and of the stock program.
    distribution : the installed package, for its version; None for a checkout.
    rows : what may be run; all of them by default.
    prepare : writes what programs read to a folder, and returns what the report says of it.
    commands : row, folder -> program -> command: the stock one first, then "nlm", then others.
    start : folder -> the command that starts the host alone.
    compared : the results of the stock program and of another -> what the row says of them.
    more : row, folder, options -> further measurements.
    """

    name: str
    distribution: str | None
    rows: Sequence[str]
    prepare: Callable[[Path, argparse.Namespace], Row]
    commands: Callable[[str, Path], Mapping[str, Command]]
    start: Callable[[Path], Command]
    compared: Callable[[Path, Path], Row]
    more: Callable[[str, Path, argparse.Namespace], Row] = lambda row, folder, options: {}


def run(module: str, arguments: list[str], threads: int) -> dict[str, float]:
    """Seconds of a module's process, those of processors in it, its peak bytes, and its own."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path,
    }  # fmt: skip
    command = [sys.executable, "-m", module, *arguments]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        own, peak, ended = 0, 0, 0
        while not ended:
            own = max(own, resident(process.pid, "RssAnon"))
            peak = max(peak, resident(process.pid, "VmHWM"))
            time.sleep(0.01)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}: {said.read().decode()}")
    worked = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "worked": worked, "bytes": peak, "own": own}


def resident(process: int, what: str) -> int:
    """Bytes of memory, ``what`` of them in the system's words; 0 where it does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{what}:\s+(\d+)", status)
    return 1024 * int(found[1]) if found else 0


def compared(one: Path, other: Path) -> Row:
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


def measure(host: Host, name: str, folder: Path, options: argparse.Namespace) -> Row:
    """A row on all programs, in turns: medians, and how the results compare."""
    commands = host.commands(name, folder)
    runs: dict[str, list[dict[str, float]]] = {program: [] for program in commands}
    for _ in range(options.repeat):
        for program, (module, arguments, result) in commands.items():
            if result.parent != folder:
                shutil.rmtree(result.parent, ignore_errors=True)
            result.unlink(missing_ok=True)
            runs[program].append(run(module, arguments, options.threads))
    row: Row = {"method": name, "load": os.getloadavg()[0]}  # with what runs beside it
    for program, found in runs.items():
        row[f"{program}_s"] = statistics.median(each["seconds"] for each in found)
        row[f"{program}_all_s"] = [each["seconds"] for each in found]
        row[f"{program}_worked_s"] = statistics.median(each["worked"] for each in found)
        row[f"{program}_bytes"] = max(each["bytes"] for each in found)
        row[f"{program}_own"] = max(each["own"] for each in found)
    row["ratio"] = row[f"{host.name}_s"] / row["nlm_s"]
    row["worked_ratio"] = row[f"{host.name}_worked_s"] / row["nlm_worked_s"]
    stock = commands[host.name].result
    for program, command in commands.items():
        if program not in (host.name, "nlm"):
            found = host.compared(stock, command.result)
            row |= {f"{program}_{key}": value for key, value in found.items()}
    return row | host.compared(stock, commands["nlm"].result) | host.more(name, folder, options)


def line(host: Host, row: Row) -> str:
    """A row in words."""
    programs = [key.removesuffix("_own") for key in row if key.endswith("_own")]
    parts = [f"{p} {row[f'{p}_s']:6.1f} s {row[f'{p}_bytes'] / 1e9:5.2f} GB" for p in programs]
    if "differing" in row:
        parts.append(f"{100 * row['differing']:.2g} % differ, by {row['difference']:.0e}")
    faster = f"x{row['ratio']:.2f}, x{row['worked_ratio']:.2f} of processors"
    return f"{row['method']:<16} {'  '.join(parts)}  {faster}"


def arguments(host: Host, text: str | None) -> argparse.ArgumentParser:
    """The options of a script; it may add its own."""
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=host.rows, default=list(host.rows))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where inputs and results are written")
    default = RESULTS / machine() / f"host_{host.name}.json"
    parser.add_argument("--json", type=Path, default=default)
    if host.distribution is None:
        parser.add_argument("--checkout", type=Path, help="a clone of the repository")
    parser.add_argument("--add", action="store_true", help="keep other rows of the report's file")
    return parser


def main(host: Host, options: argparse.Namespace) -> None:
    """Measures what the options ask for, and writes the report, after each row as far as it is."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        about = host.prepare(folder, options)
        module, given, _ = host.start(folder)
        starts = [run(module, given, options.threads)["seconds"] for _ in range(options.repeat)]
        start = statistics.median(starts)
        print(f"{about}, the host starts in {start:.1f} s", flush=True)
        report = {"host": about.pop("host", None) or version(host), **about}
        report |= {"start_s": start, "threads": options.threads, "repeat": options.repeat}
        rows = others(options) if options.add else []
        for each in options.rows:
            about_row = {"repeat": options.repeat, "commit": commit(), "start_s": start}
            about_row["peak"] = "VmHWM"
            rows.append(measure(host, each, folder, options) | about_row)
            print(line(host, rows[-1]), flush=True)
            write(options.json, {**facts(), **report, "rows": rows})


def others(options: argparse.Namespace) -> list[Row]:
    """The rows of the report's file that are not measured now."""
    if not options.json.exists():
        return []
    before = json.loads(options.json.read_text())
    about = {"repeat": before["repeat"], "commit": before["commit"]}
    return [about | row for row in before["rows"] if row["method"] not in options.rows]


def from_checkout(
    name: str, repository: str, rows: Sequence[str], about: Callable[[str, str], Row]
) -> Host:
    """A host that is a clone of a repository: its functions are called by ``_checkouts``.

    ``about`` says something of a row at a size.
    """

    def prepare(folder: Path, options: argparse.Namespace) -> Row:
        if options.checkout is None:
            raise SystemExit(f"{repository} is in no package: --checkout names a clone of it")
        (folder / "given").write_text(f"{options.checkout.resolve()}\n{options.size}")
        asked = ["git", "-C", str(options.checkout), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(asked, text=True, capture_output=True).stdout.strip()
        return {"host": f"{repository} {found or 'of an unknown commit'}"}

    def command(program: str, row: str, folder: Path, out: str) -> Command:
        checkout, size = (folder / "given").read_text().splitlines()
        return Command("_checkouts", [name, program, checkout, row, size, out], Path(out))

    def commands(row: str, folder: Path) -> Mapping[str, Command]:
        programs = (name, "nlm")
        return {
            each: command(each, row, folder, f"{folder / each}.safetensors") for each in programs
        }

    def start(folder: Path) -> Command:
        return command(name, rows[0], folder, "-")

    def more(row: str, folder: Path, options: argparse.Namespace) -> Row:
        return about(row, options.size)

    return Host(name, None, rows, prepare, commands, start, objectives, more)


def objectives(stock: Path, found: Path) -> Row:
    """What both have reached, which stands beside their results, and how far these differ."""
    values = {}
    for which, file in (("stock", stock), ("nlm", found)):
        with safe_open(file, "pt") as opened:
            values[f"{which}_objective"] = float(opened.metadata()["objective"])
    return compared(stock, found) | values


def version(host: Host) -> str:
    """The host and its version."""
    return f"{host.distribution} {metadata.version(host.distribution or '')}"
