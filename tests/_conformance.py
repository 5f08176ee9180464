"""The numeric part of the conformance suite, for one instruction set.

``python _conformance.py`` runs it for all operators with kernels for the instruction set in use and
prints what fails as JSON; test_conformance.py does so once for each of the machine's.
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from _compare import (
    Case,
    Sample,
    allowed_error,
    map_tensors,
    relative_error,
    same_bits,
    same_specials,
    tensors_in,
    to_float64,
)
from torch import Tensor

from nlm import _native
from nlm._registry import Operation, operations

CSRC = Path(__file__).parents[1] / "csrc"

SPECIALS = {
    "NaN": (float("nan"),),
    "infinity": (float("inf"),),
    "both": (float("inf"), -float("inf")),
}


def cases() -> dict[str, Case]:
    """The case of each registered operator; a KeyError names one that has none."""
    return {
        name: import_module(f"ops.samples_{operation.stem}").CASES[name]
        for name, operation in operations().items()
    }


def has_kernels(name: str, isa: str) -> bool:
    """Whether an operator has kernels of its own for an instruction set: few have for AMX."""
    header = CSRC / f"{operations()[name].stem}.h"
    return isa != "amx" or "NLM_KERNEL_AMX(" in header.read_text()


def call(
    operation: Operation,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    copy: Callable[[Tensor], Tensor] = torch.clone,
) -> list[Tensor]:
    """The results: what is returned, and the arguments that the schema marks as written to."""
    written = [argument.alias_info is not None for argument in operation.default._schema.arguments]
    private = tuple(
        map_tensors(copy, value) if write else value
        for value, write in zip(args, written, strict=True)
    )
    returned = function(*private)
    changed = [value for value, write in zip(private, written, strict=True) if write]
    return tensors_in((returned, changed))


def check_error(operation: Operation, case: Case, sample: Sample) -> None:
    """No worse than plain PyTorch against float64; inputs unchanged; results as `out` says."""
    before = map_tensors(torch.clone, sample.args)
    results = call(operation, operation.default, sample.args)
    for given, kept in zip(tensors_in(sample.args), tensors_in(before), strict=True):
        assert same_bits(given, kept), "an input was changed"
    for result, expected in zip(results, call(operation, operation.out, sample.args), strict=True):
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)

    if case.plain is None:
        references = call(operation, operation.reference, sample.args)
        for i, (result, reference) in enumerate(zip(results, references, strict=True)):
            assert same_bits(result, reference), f"result {i} differs from the reference"
        return
    truths = call(operation, operation.reference, to_float64(sample.args))
    plains = call(operation, case.plain, sample.args)
    if case.judged is not None:
        results, plains = (case.judged(sample.args, each) for each in (results, plains))
        truths = case.judged(to_float64(sample.args), truths)
    products = case.products(*sample.args) if case.products is not None else None
    sizes = [size for each in tensors_in(sample.args) for size in each.shape]
    terms = max([1, *sizes]) if products is not None else 1  # of a sum of products, at most
    for i, (result, truth, plain) in enumerate(zip(results, truths, plains, strict=True)):
        error = relative_error(result, truth, terms)
        limit = allowed_error(relative_error(plain, truth, terms), result.dtype, products)
        assert error <= limit, (
            f"result {i} errs by {error:.2e}, plain PyTorch's limit is {limit:.2e}"
        )


def check_threads(operation: Operation, sample: Sample) -> None:
    """The same bits for 1, 2 and 4 threads."""
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs.append(call(operation, operation.kernels["cpu"], sample.args))
    finally:
        torch.set_num_threads(before)
    for threads, run in zip((2, 4), runs[1:], strict=True):
        for result, single in zip(run, runs[0], strict=True):
            assert same_bits(result, single), f"{threads} threads give other bits than one"


def check_specials(operation: Operation, sample: Sample) -> None:
    """NaN and infinity come out where the reference has them; of a list the ends are tried."""
    targets = []
    for value in sample.args:
        floats = [t for t in tensors_in(value) if t.is_floating_point() and t.numel() > 0]
        targets += floats[:1] + floats[1:][-1:]
    for target in targets:
        for name, values in SPECIALS.items():

            def poison(tensor: Tensor, target: Tensor = target, values: tuple = values) -> Tensor:
                if tensor is not target:
                    return tensor
                poisoned = tensor.clone()
                flat = poisoned.as_strided((poisoned.numel(),), (1,))
                places = torch.linspace(0, flat.numel() - 1, len(values) + 2).long()[1:-1]
                flat[places] = torch.tensor(values, dtype=flat.dtype)
                return poisoned

            args = map_tensors(poison, sample.args)
            results = call(operation, operation.default, args)
            references = call(operation, operation.reference, args)
            for i, (result, reference) in enumerate(zip(results, references, strict=True)):
                assert same_specials(result, reference), f"{name}: result {i} differs"


def check(operation: Operation, case: Case) -> list[str]:
    """All of the above for all samples; returns what failed."""
    failures = []
    for sample in case.samples():
        checks = {"error": lambda sample=sample: check_error(operation, case, sample)}
        if "cpu" in operation.kernels:
            checks["threads"] = lambda sample=sample: check_threads(operation, sample)
        if case.poison:
            checks["specials"] = lambda sample=sample: check_specials(operation, sample)
        for name, run in checks.items():
            try:
                run()
            except AssertionError as failure:
                failures.append(f"[{sample.name}] {name}: {failure}")
    return failures


if __name__ == "__main__":
    isa = _native.cpu.isa if _native.cpu else "none"
    failures = {
        name: check(operations()[name], case)
        for name, case in cases().items()
        if has_kernels(name, isa)
    }
    json.dump(failures, sys.stdout)
