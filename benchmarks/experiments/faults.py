"""Merges that are killed, and that the system or their files fail: what lies at the output?

    python benchmarks/experiments/faults.py [--kills 200] [--seed 0] [--json FILE]

Two merges of small real sharded checkpoints, TIES of the global dialect (two passes, a permuted
expert) and DARE, are killed (SIGKILL) at uniformly random moments of their whole run; DARE also
before every single one of its calls on files, and with an output that is replaced. Then faults: the
system's errors at chosen calls, short reads and writes, damaged inputs, inputs that change, outputs
that cannot be; and processes that merge together, one of them killed. Each time the output must be
nothing, a state to resume, or the complete result; an error must be one sentence that names a file;
and a resumed merge must end with the undisturbed one's files, byte by byte. Needs a C compiler.
"""

import argparse
import collections
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _fault_list import FAULTS, Fault
from _faults import PROGRAM, Ended, Programs, World, contents

import nlm

RESULTS = Path(__file__).parent / "results"


def after(
    world: World, recipe: str, code: int, said: str, known: tuple[str, ...] = ()
) -> str | None:
    """What is wrong after a disturbed merge was resumed; None where nothing is."""
    if world.state(recipe) != "whole":
        return f"the output is {world.state(recipe)} after --resume, which said {said!r}"
    if set(world.left()) - set(known):
        return f"{world.left()} is left beside the output"
    return None if code == 0 else f"--resume said {said!r}"


def kill_at_moments(
    world: World, programs: Programs, recipe: str, kills: int, draw: random.Random
) -> dict[str, Any]:
    """Kills processes at random moments from their command's start to its end, as many as are not
    over when the signal comes. How long an undisturbed one takes is known from the latest five, as
    the machine has other work too."""
    world.expect(recipe)
    times: list[float] = []

    def whole(*more: str) -> Ended:
        start = time.perf_counter()
        done = programs.run(world.arguments(recipe, *more))
        times.append(time.perf_counter() - start)
        return done

    for _ in range(3):
        world.clear()
        whole()
    states: collections.Counter[str] = collections.Counter()
    wrong, late = [], 0
    while sum(states.values()) < kills:
        world.clear()
        moment = draw.uniform(0, statistics.median(times[-5:]))
        process = programs.start(world.arguments(recipe))
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)  # nobody waits for it before: the number is still its own
        is_late = programs.wait(process).code != -signal.SIGKILL
        state = world.state(recipe)
        done = whole("--resume")
        if state != "nothing":
            times.pop()
        found = after(world, recipe, done.code, done.said)
        if is_late:
            late += 1
        else:
            states[state] += 1
        if state == "corrupt" or found is not None:
            wrong.append({"moment": moment, "state": state, "what": found})
    seconds = statistics.median(times)
    return {
        "recipe": recipe, "seconds": seconds, "kills": kills, "late": late, "states": states,
        "wrong": wrong,
    }  # fmt: skip


def kill_at_calls(
    world: World, programs: Programs, replaces: bool, first: int = 1, step: int = 1
) -> dict[str, Any]:
    """Kills before every ``step``-th call on files of the output's folder, from the ``first`` on,
    which counts from the last where it is negative."""
    recipe = "dare"
    more = ["--force"] if replaces else []

    def prepare() -> None:
        world.clear()
        if replaces:
            world.out.mkdir()
            (world.out / "model.safetensors").write_bytes(b"old")

    prepare()
    old = contents(world.out)
    calls = programs.run(world.arguments(recipe, *more), "any 0 0", world.run).calls
    states: collections.Counter[str] = collections.Counter()
    wrong = []
    for number in range(first if first > 0 else calls + first, calls + 1, step):
        prepare()
        programs.run(world.arguments(recipe, *more), f"any {number} kill", world.run)
        state = world.state(recipe)
        if replaces and state == "corrupt" and contents(world.out) == old:
            state = "the old one"
        states[state] += 1
        done = programs.run(world.arguments(recipe, "--resume", *more))
        found = after(world, recipe, done.code, done.said)
        if state == "corrupt" or found is not None:
            wrong.append({"call": number, "state": state, "what": found})
    return {"calls": calls, "replaces": replaces, "states": states, "wrong": wrong}


def inject(world: World, programs: Programs, fault: Fault) -> dict[str, Any]:
    """One fault: what the program said, and what is wrong with what it left."""
    world.clear()
    wrong = []
    with fault.scene(world):
        ended = fault.run(world, programs)
        state = world.state(fault.recipe)
    if ended.is_missed:
        wrong.append("the fault did not come")
    if ended.code == 0:
        if not fault.may_pass or state != "whole":
            wrong.append(f"exit code 0, and the output is {state}")
    else:
        if ended.code not in (1, 2):
            wrong.append(f"exit code {ended.code}")
        if not ended.is_sentence:
            wrong.append("no sentence")
        if fault.names(world) not in ended.said:
            wrong.append(f"{fault.names(world)!r} is not named")
        if state == "corrupt" and not fault.keeps:
            wrong.append("a corrupt output")
    if ended.code != 0:
        done = programs.run(world.arguments(fault.recipe, *fault.again))
        found = after(world, fault.recipe, done.code, done.said, ("file",))
        wrong += [] if found is None else [found]
    said = ended.said.replace(f"{world.folder}/", "")
    return {"fault": fault.name, "code": ended.code, "said": said, "state": state,
            "wrong": wrong}  # fmt: skip


def kill_one_of(world: World, programs: Programs, size: int, victim: int) -> dict[str, Any]:
    """Kills one of the processes that merge together, at its fifth write; how long the others take
    to end, and what they say."""
    recipe = "ties"
    world.clear()

    def start(resume: bool, fault: bool) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        more = ["--resume"] if resume else []
        kill = {"NLM_FAULT": "write 5 kill", "NLM_FAULT_FOLDER": str(world.run)}
        return [
            subprocess.Popen(
                [*PROGRAM, *world.arguments(recipe, *more)], stderr=subprocess.PIPE, text=True,
                env={**programs.environment, **place, "RANK": str(rank)}
                | (kill if fault and rank == victim else {}),
            )
            for rank in range(size)
        ]  # fmt: skip

    processes = start(resume=False, fault=True)
    processes[victim].wait()
    dead = time.perf_counter()
    others = [each for rank, each in enumerate(processes) if rank != victim]
    said = [each.communicate(timeout=600)[1] for each in others]
    seconds = time.perf_counter() - dead
    wrong = []
    if processes[victim].returncode != -signal.SIGKILL:
        wrong.append("the victim was not killed")
    for each, text in zip(others, said, strict=True):
        last = text.strip().splitlines()[-1:] or [""]
        if each.returncode != 1 or not last[0].startswith("nlm"):
            wrong.append(f"another ended with {each.returncode}: {last[0]!r}")
    if world.state(recipe) not in ("nothing", "partial"):
        wrong.append(f"the output is {world.state(recipe)}")
    again = start(resume=True, fault=False)
    texts = [each.communicate(timeout=600)[1] for each in again]
    if (found := after(world, recipe, max(e.returncode for e in again), texts[0])) is not None:
        wrong.append(found)
    sentences = sorted({text.strip().splitlines()[-1] for text in said if text.strip()})
    return {
        "processes": size, "victim": victim, "seconds": seconds, "wrong": wrong, "said": sentences
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where models and results are written")
    parser.add_argument("--width", type=int, default=512, help="of the killed models")
    parser.add_argument("--json", type=Path, default=RESULTS / "faults.json")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    draw = random.Random(options.seed)
    report: dict[str, Any] = {"versions": nlm.info()["versions"], "seed": options.seed}
    wrong = 0

    def tell(title: str, result: dict[str, Any]) -> dict[str, Any]:
        nonlocal wrong
        wrong += len(result["wrong"])
        print(f"{title}: {json.dumps({k: v for k, v in result.items() if k != 'said'})}")
        sys.stdout.flush()
        return result

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        small, large = Path(name) / "small", Path(name) / "large"
        small.mkdir()
        large.mkdir()
        world = World(small)
        with Programs(small) as programs:
            report["calls"] = [
                tell("killed at every call", kill_at_calls(world, programs, replaces))
                for replaces in (False, True)
            ]
            report["faults"] = [tell(each.name, inject(world, programs, each)) for each in FAULTS]
            report["ranks"] = [
                tell("one of many killed", kill_one_of(world, programs, size, victim))
                for size, victim in ((2, 0), (2, 1), (4, 0), (4, 2))
            ]
        world = World(large, options.width, f"{options.width**2 // 2}B")
        counts = {"ties": options.kills // 2, "dare": options.kills - options.kills // 2}
        with Programs(large) as programs:
            report["kills"] = [
                tell("killed", kill_at_moments(world, programs, recipe, count, draw))
                for recipe, count in counts.items()
            ]
    report["wrong"] = wrong
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(FAULTS)} faults and {options.kills} kills, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
