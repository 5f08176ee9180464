"""Every registered operator, against the rules that all of them keep."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from _compare import Mistake, Sample, map_tensors, tensors_in
from _conformance import cases, has_kernels

from nlm import _native
from nlm._registry import operations

ISAS = _native.cpu.runnable_isas if _native.cpu else ["none"]
CASES = cases()
MISTAKES = [
    pytest.param(mistake, id=f"{name}-{mistake.message.partition(': ')[2]}")
    for name, case in CASES.items()
    for mistake in case.mistakes()
]


def run_with(isa: str) -> subprocess.CompletedProcess[str]:
    """Waiting threads sleep: with more threads than cores, spinning ones take 15 times as long."""
    script = Path(__file__).with_name("_conformance.py")
    environment = {**os.environ, "NLM_ISA": isa, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [sys.executable, str(script)], env=environment, text=True, capture_output=True
    )


@pytest.fixture(scope="session")
def numeric_runs() -> Iterator[dict[str, Future]]:
    """One process for each instruction set, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {isa: pool.submit(run_with, isa) for isa in ISAS}


@pytest.mark.parametrize(
    ("isa", "name"), [(isa, name) for isa in ISAS for name in CASES if has_kernels(name, isa)]
)
def test_numbers(numeric_runs: dict[str, Future], isa: str, name: str) -> None:
    """Errors, threads, NaN and infinity with one instruction set."""
    done = numeric_runs[isa].result()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[name] == []


@pytest.mark.parametrize("name", CASES)
def test_samples_cover_what_they_must(name: str) -> None:
    tensors = [tensor for sample in CASES[name].samples() for tensor in tensors_in(sample.args)]
    assert any(not tensor.is_contiguous() for tensor in tensors), "non-contiguous"
    assert any(tensor.numel() == 0 for tensor in tensors), "empty"
    assert any(1 in tensor.shape for tensor in tensors), "a dimension of size 1"
    assert any(size % 2 and size > 1 for tensor in tensors for size in tensor.shape), "odd size"
    assert any(tensor.numel() >= 100_000 for tensor in tensors), "work for several threads"


def _small(name: str) -> Sample:
    def size(sample: Sample) -> tuple[bool, int]:
        numbers = [tensor.numel() for tensor in tensors_in(sample.args)]
        return min(numbers) < 2, sum(numbers)

    return min(CASES[name].samples(), key=size)


@pytest.mark.parametrize("name", CASES)
def test_operator_is_well_formed(name: str) -> None:
    operation, sample = operations()[name], _small(name)
    written = [argument.alias_info is not None for argument in operation.default._schema.arguments]
    args = [
        map_tensors(torch.clone, value) if write else value
        for value, write in zip(sample.args, written, strict=True)
    ]
    torch.library.opcheck(operation.default, args)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.gradients])
def test_gradients(name: str) -> None:
    for sample in CASES[name].gradients():
        args = map_tensors(
            lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, sample.args
        )
        torch.autograd.gradcheck(operations()[name].default, args)
        torch.autograd.gradgradcheck(operations()[name].default, args)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_eager(mistake: Mistake) -> None:
    with pytest.raises(mistake.error) as raised:
        mistake.call(*mistake.args)
    assert mistake.message in str(raised.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_on_meta_and_compiled(mistake: Mistake) -> None:
    if mistake.reads_values:
        return
    with pytest.raises(mistake.error) as raised:
        mistake.call(*map_tensors(lambda tensor: tensor.to("meta"), mistake.args))
    assert mistake.message in str(raised.value)

    torch.compiler.reset()
    compiled = torch.compile(lambda *args: mistake.call(*args), backend="eager")
    with pytest.raises(Exception) as raised:
        compiled(*mistake.args)
    assert mistake.message in str(raised.value)
