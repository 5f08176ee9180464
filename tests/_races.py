"""The kernels on several threads of a core that ThreadSanitizer watches, for ``.ci/races``.

``python _races.py`` runs every sample of the conformance suite with 2 to 4 threads, alone and from
several Python threads at once. ``python _races.py control`` does what is forbidden: two calls write
to one tensor at once, which must be seen. PyTorch itself keeps to one thread: it is not watched.
"""

import random
import sys
import threading

import torch
from _concurrency import Samples

from nlm import _native, ops


def race() -> None:
    x, scale = torch.ones(400, 1000), torch.ones(1, 1000)
    out = torch.empty_like(x)

    def write() -> None:
        for _ in range(20):
            ops.scale_shift(x, scale, scale, 0, 1, out=out)

    workers = [threading.Thread(target=write) for _ in range(2)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()


def run() -> int:
    samples = Samples()
    places = range(len(samples))
    alone = [samples[place] for place in places]
    wrong = []

    def work(number: int) -> None:
        order = list(places)
        random.Random(number).shuffle(order)
        wrong.extend(at for at in order if samples[at] != alone[at])

    for threads in (2, 4):
        _native.threads = lambda threads=threads: threads
        wrong += [at for at in places if samples[at] != alone[at]]
    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    print(f"{6 * len(alone)} calls of {len(alone)} samples, {len(wrong)} with other bits")
    return 1 if wrong else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert _native.cpu is not None, _native.cpu_missing
    _native.threads = lambda: 4
    sys.exit(race() if sys.argv[1:] == ["control"] else run())
