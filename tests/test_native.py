"""The compiled core as it is loaded: instruction sets, forks, and life without it."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

import nlm
from nlm import _native
from nlm._registry import operations
from nlm.ops import channel_moments

needs_core = pytest.mark.skipif(_native.cpu is None, reason="the compiled core is not installed")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
    )


@needs_core
def test_instruction_set_is_forced() -> None:
    for isa in _native.cpu.runnable_isas:
        done = python("import nlm; print(nlm.info()['instruction set'])", NLM_ISA=isa)
        assert done.stdout.strip() == isa, done.stderr


@needs_core
def test_unknown_instruction_set_is_an_error() -> None:
    done = python("import nlm.ops", NLM_ISA="v9")
    assert done.returncode != 0
    assert (
        "ImportError: nlm: NLM_ISA must be an instruction set that this machine runs" in done.stderr
    )
    assert "got v9" in done.stderr


def test_without_the_core_one_warning_and_the_references() -> None:
    code = """
import sys
sys.modules["nlm._C"] = None
import nlm, torch
from nlm._registry import operations
count, mean, m2 = nlm.ops.channel_moments(torch.tensor([[1.0], [3.0]]))
print(count.item(), mean.item(), m2.item(), nlm.info()["compiled core"])
assert all("cpu" not in operation.kernels for operation in operations().values())
"""
    done = python(code)
    assert done.stdout.strip() == "2 2.0 2.0 not built", done.stderr
    assert done.stderr.count("UserWarning: nlm: the compiled core is missing") == 1


def _moments_in_child(x: torch.Tensor) -> None:
    channel_moments(x)
    assert _native.threads() == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_child_does_not_hang() -> None:
    """The parent's threads do not exist in a forked child; libgomp would wait for them."""
    x = torch.zeros(5000, 100)
    channel_moments(x)
    child = multiprocessing.get_context("fork").Process(target=_moments_in_child, args=(x,))
    child.start()
    child.join(timeout=60)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0


def test_info_names_every_operation() -> None:
    assert set(nlm.info()["operations"]) == set(operations())
    assert "channel_moments" in repr(nlm.info())
