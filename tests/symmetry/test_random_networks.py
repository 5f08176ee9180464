"""Random networks never get a wrong specification.

A network is a program, a line of PyTorch per operation (:mod:`symmetry.networks`). Discovery may
find nothing, and units may have no effect; what it finds must never be refuted.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from symmetry.networks import Network, Program, write

from nlm.symmetry.discover import discover
from nlm.symmetry.proof import SymmetryError, VacuousError
from nlm.symmetry.spec import PermutationSpec


def found(program: Program) -> PermutationSpec:
    """The specification of a program's network, without the groups that have no effect on it.

    Raises AssertionError with the program where it is refuted.
    """
    model = Network(program).eval()
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    spec = discover(model, (inputs,), {})
    while True:
        try:
            spec.verify(model, inputs)
            return spec
        except VacuousError as error:
            spec = spec.restrict(group for group in spec.free if group not in error.groups)
        except SymmetryError as error:
            if error.groups:
                raise AssertionError(f"{error}\n{program}\n{spec.show()}") from error
            return spec.restrict([])  # the outputs are all zero


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_networks_are_never_refuted(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 7))
    found(write(lambda options: data.draw(st.sampled_from(options)), length))


@pytest.mark.parametrize("seed", range(40))
def test_larger_random_networks_are_never_refuted(seed: int) -> None:
    generator = random.Random(seed)
    found(write(generator.choice, generator.randint(6, 9)))
