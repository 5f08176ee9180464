"""The kernels without instruction sets of their own, in small, for ``.ci/valgrind``.

``python _valgrind.py`` runs the smaller samples of the conformance suite and prints how many;
``python _valgrind.py control`` reads one column too many, which must be seen.
"""

import sys

import torch
from _compare import tensors_in
from _conformance import call, cases

from nlm import _native
from nlm._registry import operations

LARGEST = 3000  # elements of a sample


def control() -> None:
    x, count = torch.ones(7, 3), torch.zeros(1, dtype=torch.int64)
    moments = torch.zeros(2, 4).double()
    view = (x.data_ptr(), 2, 7, 4, 1, 3, 1, 1)
    addresses = (each.data_ptr() for each in moments)
    _native.cpu.channel_moments(view, (0, 0, 0), count.data_ptr(), *addresses, 1)


def run() -> None:
    tried = 0
    for name, case in cases().items():
        operation = operations()[name]
        for sample in case.samples():
            if sum(each.numel() for each in tensors_in(sample.args)) <= LARGEST:
                call(operation, operation.kernels["cpu"], sample.args)
                tried += 1
    print(f"{tried} samples of {len(cases())} operators on {_native.cpu.isa!r}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert _native.cpu is not None and _native.cpu.isa == "plain", "built with NLM_PLAIN=1"
    control() if sys.argv[1:] == ["control"] else run()
