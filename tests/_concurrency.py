"""All operators at once, and in other processes: which results have other bits than alone?

``python _concurrency.py threads|fork|loaders`` runs every sample of the conformance suite and
prints what differs as JSON; test_concurrency.py gives each a time by which it must have ended.
"""

import hashlib
import json
import os
import random
import sys
import threading
from collections.abc import Iterator

import numpy as np
import torch
from _compare import Sample
from _conformance import call, cases
from torch.utils.data import DataLoader, Dataset

from nlm import _native
from nlm._registry import Operation, operations

THREADS = 8
LARGEST = 2_000_000  # elements of a sample
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COUNTS = (1, 2, 3, 4, 8)  # PyTorch's numbers of threads that are changed between


class Samples(Dataset):
    """The digests of all results, one entry per sample; by position in every process the same."""

    def __init__(self) -> None:
        self._made: list[tuple[Operation, Sample]] | None = None

    def samples(self) -> list[tuple[Operation, Sample]]:
        if self._made is None:
            self._made = list(_samples())
        return self._made

    def __getstate__(self) -> dict[str, None]:
        return {"_made": None}  # a spawned process makes its own

    def __len__(self) -> int:
        return len(self.samples())

    def name(self, place: int) -> str:
        operation, sample = self.samples()[place]
        return f"{operation.name} [{sample.name}]"

    def __getitem__(self, place: int) -> str:
        operation, sample = self.samples()[place]
        kernel = operation.kernels.get("cpu", operation.reference)
        state = hashlib.sha256()
        for result in call(operation, kernel, sample.args, plain_copy):
            state.update(numbers(result).tobytes())
        return state.hexdigest()


def plain_copy(x: torch.Tensor) -> torch.Tensor:
    """A copy by NumPy: in a forked child PyTorch's own, of many elements, waits for ever."""
    return torch.from_numpy(np.array(numbers(x), order="K")).view(x.dtype)


def numbers(x: torch.Tensor) -> np.ndarray:
    """The memory of a tensor, floats as integers: NumPy has no bfloat16."""
    return (x.view(_WHOLE[x.element_size()]) if x.is_floating_point() else x).numpy()


def _samples() -> Iterator[tuple[Operation, Sample]]:
    for name, case in cases().items():
        for sample in case.samples():
            sizes = [v.numel() for v in sample.args if isinstance(v, torch.Tensor)]
            if sum(sizes) <= LARGEST:
                yield operations()[name], sample


def at_once(samples: Samples, alone: list[str]) -> list[str]:
    """Every sample in each of several threads, in orders of their own, while another thread
    changes the number of threads of PyTorch."""
    wrong, ended = [], threading.Event()
    start = threading.Barrier(THREADS)

    def work(number: int) -> None:
        places = list(range(len(samples)))
        random.Random(number).shuffle(places)
        start.wait()
        for count, place in enumerate(places):
            if count % 7 == number:
                torch.set_num_threads(COUNTS[(count + number) % len(COUNTS)])
            try:
                if samples[place] != alone[place]:
                    wrong.append(f"thread {number}: {samples.name(place)}")
            except Exception as error:
                wrong.append(f"thread {number}: {samples.name(place)}: {error}")

    def change() -> None:
        draw = random.Random(0)
        while not ended.wait(0.003):
            torch.set_num_threads(draw.choice(COUNTS))

    changer = threading.Thread(target=change)
    workers = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for each in (changer, *workers):
        each.start()
    for each in workers:
        each.join()
    ended.set()
    changer.join()
    return wrong


def forked(samples: Samples, alone: list[str]) -> list[str]:
    """Every sample in a plain child of a process whose pools of threads are warm, and in two
    children at once; the parent works on meanwhile."""
    wrong, children = [], []
    for _ in range(2):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                found = [samples.name(at) for at in range(len(alone)) if samples[at] != alone[at]]
                os.write(writer, json.dumps(found[:20]).encode())
                os._exit(0)
            except BaseException as error:
                os.write(writer, json.dumps([f"{type(error).__name__}: {error}"]).encode())
                os._exit(1)
        os.close(writer)
        children.append((child, reader))
    wrong += [f"parent: {samples.name(at)}" for at in range(len(alone)) if samples[at] != alone[at]]
    for number, (child, reader) in enumerate(children):
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader) as pipe:
            found = json.loads(pipe.read() or "[]")
        wrong += [f"child {number}: {each}" for each in found]
        if status:
            wrong.append(f"child {number} ended with {status}")
    return wrong


def in_loaders(samples: Samples, alone: list[str]) -> list[str]:
    """Every sample in the workers of loaders that fork and that spawn; with two threads each."""
    wrong = []
    for method in ("fork", "spawn"):
        loader = DataLoader(
            samples, batch_size=8, num_workers=2, multiprocessing_context=method,
            collate_fn=list, worker_init_fn=two_threads,
        )  # fmt: skip
        found = [digest for batch in loader for digest in batch]
        if len(found) != len(alone):
            wrong.append(f"{method}: {len(found)} of {len(alone)} results")
        pairs = enumerate(zip(found, alone, strict=False))
        wrong += [f"{method}: {samples.name(at)}" for at, (a, b) in pairs if a != b]
    return wrong


def two_threads(_: int) -> None:
    torch.set_num_threads(2)


MODES = {"threads": at_once, "fork": forked, "loaders": in_loaders}

if __name__ == "__main__":
    torch.set_num_threads(4)
    samples = Samples()
    alone = [samples[place] for place in range(len(samples))]
    assert [samples[place] for place in range(len(samples))] == alone
    wrong = MODES[sys.argv[1]](samples, alone)
    isa = _native.cpu.isa if _native.cpu else "none"
    json.dump({"samples": len(alone), "isa": isa, "wrong": wrong}, sys.stdout)
