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


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_networks_are_never_refuted(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 7))
    found(write(lambda options: data.draw(st.sampled_from(options)), length))


@pytest.mark.parametrize("seed", range(40))
def test_larger_random_networks_are_never_refuted(seed: int) -> None:
    generator = random.Random(seed)
    found(write(generator.choice, generator.randint(6, 9)))


# Networks that were refuted, or could not be proven, once.
FOUND = {
    "a selector named as a whole, of which a part has dependants": Program(
        [
            "h = F.linear(torch.sin(F.linear(x, p[0])), p[1])",
            "a = torch.zeros_like(h).slice_scatter(h.narrow(1, 0, 7), 1, 0, 7)",
            "b = torch.where(F.linear(h, p[2].sort(0).values) > h, h, p[3])",
            "c = torch.sin(F.linear(b, p[4]))",
            "y = F.linear(torch.cat([h, a, c], 1), p[5])",
        ],
        [(16, 6), (8, 16), (8, 8), (8,), (4, 8), (5, 20)],
    ),
    "a sequence of units": Program(
        [
            "h = torch.sin(F.linear(x, p[0])).unsqueeze(-1)",
            "z = torch.rnn_tanh(h, h.new_zeros(1, len(x), 2), [*p[1:5]], True, 1, 0.0, False, "
            "False, True)[0]",
            "y = F.linear(torch.cat([z.flatten(1), h[..., 0]], 1), p[5])",
        ],
        [(8, 6), (2, 1), (2, 2), (2,), (2,), (5, 24)],
    ),
    **{
        mixed: Program(
            [
                "h = torch.sin(F.linear(x, p[0])).unflatten(1, (4, 4))",
                f"y = F.linear(torch.cat([({mixed}).flatten(1), h.flatten(1)], 1), p[1])",
            ],
            [(16, 6), (5, 32)],
        )
        for mixed in (
            "torch.zeros_like(h).scatter_add(1, h.argsort(1), h)",
            "h + h.sort(1).values",
            "h * h.topk(4, 1).values",
            "h + h.gather(1, h.argsort(1))",
        )
    },
}


@pytest.mark.parametrize("name", FOUND)
def test_networks_that_were_refuted_once(name: str) -> None:
    found(FOUND[name])
