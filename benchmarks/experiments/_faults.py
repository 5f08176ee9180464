"""Merges to disturb: small real models on disk, and programs that fail at a call of one's choice.

:class:`Programs` starts the command line in processes that begin with nlm imported, which takes
milliseconds; ``faulty_calls.c`` is preloaded into them and fails, shortens, holds or kills at the
n-th call of a kind on files under a folder.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

CALLS = Path(__file__).with_name("faulty_calls.c")
MODELS = ("base", "one", "two")
RECIPES = {
    # Two passes; the second expert's units are permuted.
    "ties": """
        base: models/base
        align: {spec: spec.json}
        experts:
          one: {path: models/one, weight: 0.5}
          two: {path: models/two, weight: 0.5, permutation: two-to-base.safetensors}
        method: ties
        parameters: {density: 0.2, dialect: global, scale: 0.7}
        heads: [head]
        output: {shard: SHARD}
    """,
    "dare": """
        base: models/base
        experts: {one: models/one, two: models/two}
        method: dare
        seed: 3
        parameters: {weight: 0.5, drop: 0.5}
        output: {shard: SHARD}
    """,
}


def write_world(folder: Path, width: int, shard: str) -> None:
    """A base and two experts in three files each, the second in another order of its units, with
    the permutation that ``nlm align`` finds; and the recipes."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    import nlm

    torch.manual_seed(0)
    base = nn.Sequential()
    for number in range(3):
        base.append(nn.Linear(width // 8 if number == 0 else width, width)).append(nn.ReLU())
    base.add_module("head", nn.Linear(width, 10))
    spec = nlm.trace(base, torch.randn(4, width // 8))
    spec.save(folder / "spec.json")
    states = [base.state_dict()]
    for _ in range(2):
        states.append({n: x + 0.1 * x.std() * torch.randn_like(x) for n, x in states[0].items()})
    states[2] = spec.apply(spec.random(1), states[2])
    nlm.align(states[0], states[2], spec).save(folder / "two-to-base.safetensors")
    for name, state in zip(MODELS, states, strict=True):
        (model := folder / "models" / name).mkdir(parents=True)
        names, weights = list(state), {}
        for number in range(3):
            part = {each: state[each].contiguous() for each in names[number::3]}
            save_file(part, model / f"model-{number}.safetensors", {"format": "pt"})
            weights |= dict.fromkeys(part, f"model-{number}.safetensors")
        index = json.dumps({"metadata": {}, "weight_map": weights})
        (model / "model.safetensors.index.json").write_text(index)
        (model / "config.json").write_text('{"model_type": "mlp", "dtype": "float32"}')
        (model / "tokenizer.json").write_text("{}")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text.replace("SHARD", shard))


def contents(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of all files of a folder, but for notes of what is not yet finished."""
    from nlm.checkpoint.shards import sha256_of

    files = [each for each in sorted(folder.rglob("*")) if each.is_file()]
    named = {str(each.relative_to(folder)): each for each in files}
    return {name: sha256_of(each) for name, each in named.items() if not name.startswith(".nlm/")}


@dataclass
class World:
    """Models, recipes and what they give undisturbed."""

    folder: Path
    width: int = 96
    shard: str = "30kB"

    def __post_init__(self) -> None:
        write_world(self.folder, self.width, self.shard)

    @property
    def run(self) -> Path:
        """Where the disturbed merges are written."""
        return self.folder / "run"

    @property
    def out(self) -> Path:
        return self.run / "out"

    def arguments(self, recipe: str, *more: str, out: Path | None = None) -> list[str]:
        file = str(self.folder / f"{recipe}.yaml")
        return ["merge", file, "--output", str(out or self.out), "--quiet", *more]

    def clear(self) -> None:
        """An empty folder to write to."""
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir()

    def expect(self, recipe: str) -> dict[str, str]:
        """What the recipe gives, made once, in a process of its own."""
        out = self.folder / "expected" / recipe / "out"
        if not out.exists():
            out.parent.mkdir(parents=True)
            subprocess.run([*PROGRAM, *self.arguments(recipe, out=out)], check=True)
        return contents(out)

    def state(self, recipe: str) -> str:
        """What lies at the output: "nothing", "partial", "whole", or "corrupt", the forbidden."""
        if self.out.exists():
            return "whole" if contents(self.out) == self.expect(recipe) else "corrupt"
        return "partial" if (self.run / ".out.partial").exists() else "nothing"

    def left(self) -> list[str]:
        """Files and folders beside the output."""
        return sorted(each.name for each in self.run.iterdir() if each.name != "out")


PROGRAM = (sys.executable, "-m", "nlm")


@dataclass
class Ended:
    """How a process ended, or that it is held: its exit code, or less the signal's number.

    ``calls`` are those of the fault's kind; ``is_missed`` says that they were too few for it.
    """

    code: int | None
    said: str
    is_held: bool = False
    calls: int = 0
    is_missed: bool = False

    @property
    def is_sentence(self) -> bool:
        """Whether it said one sentence of nlm's, and nothing else."""
        return self.said.startswith("nlm") and self.said.count("\n") == 1


class Programs:
    """Starts the command line with a fault; a context manager.

    Parameters
    ----------
    folder : where the library and what the processes say are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = folder / "faulty_calls.so"
        build = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(CALLS), "-ldl"]
        subprocess.run(build, check=True)
        self._numbers: dict[int, int] = {}
        self.environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}

    @cached_property
    def _server(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, __file__], env=self.environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *_: object) -> None:
        if "_server" in self.__dict__:
            self._server.communicate()

    def start(self, arguments: list[str], fault: str = "", under: Path | None = None) -> int:
        """A command line in a new process, and its number. The fault is as ``faulty_calls.c`` reads
        it, for files under a folder."""
        process = self._ask(arguments=arguments, fault=fault, folder=str(under or "/"))
        self._numbers[process] = int(fault.split()[1]) if fault else 0
        return process

    def wait(self, process: int, for_hold: bool = False) -> Ended:
        """Until a process ends, or until its fault holds it; others may pause it, which is none."""
        answer = self._ask(wait=process, for_hold=for_hold)
        told = self.folder / f"{process}.txt"
        said = told.read_text() if told.exists() else ""  # killed before it could say anything
        calls, number = answer["calls"], self._numbers[process]
        is_missed = calls is not None and calls < number
        return Ended(answer["code"], said, answer["held"], calls or 0, is_missed)

    def run(self, arguments: list[str], fault: str = "", under: Path | None = None) -> Ended:
        return self.wait(self.start(arguments, fault, under))

    def go_on(self, process: int) -> Ended:
        """Lets a process that is held go on to its end."""
        (self.folder / f"{process}.held").unlink()
        return self.wait(process)

    def _ask(self, **request: Any) -> Any:
        server = self._server
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request | {"said": str(self.folder)}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())


def serve() -> None:
    """Starts and awaits processes, as the lines of stdin say; in the process with the library."""
    from nlm.cli.app import run

    for name in ("nlm.cli.merge_command", "nlm.recipe.aligning", "nlm.streaming.permuted"):
        import_module(name)  # before the processes part
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.nlm_calls.restype = ctypes.c_long
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        if "wait" in request:
            held = Path(request["said"]) / f"{request['wait']}.held"
            ended, status = os.waitpid(request["wait"], os.WNOHANG if request["for_hold"] else 0)
            while not ended and not held.exists():
                time.sleep(0.001)
                ended, status = os.waitpid(request["wait"], os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
            counted = Path(request["said"]) / f"{request['wait']}.calls"
            calls = int(counted.read_text()) if counted.exists() else None
            answer = {"code": code, "held": not ended, "calls": calls}
        elif not (answer := os.fork()):
            said = Path(request["said"])
            target = os.open(said / f"{os.getpid()}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(target, 1)
            os.dup2(target, 2)
            fault = (request[each].encode() for each in ("fault", "folder", "said"))
            library.nlm_fault(*fault)
            code = run(request["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
            call = (request["fault"] or "any").split()[0].encode()
            (said / f"{os.getpid()}.calls").write_text(str(library.nlm_calls(call)))
            os._exit(code)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
