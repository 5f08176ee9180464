"""Random networks, written as source: a line of PyTorch for every operation.

``write`` draws a :class:`Program`; the same draws give the same program, and its text is all that
it takes to build the network again.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES, BATCH = 6, 5, 3
_PARAMETER = re.compile(r"\bp\[(\d+)\]")
_LARGEST = 400  # elements of a value, per sample
Pick = Callable[[Sequence[Any]], Any]


@dataclass
class Program:
    """Lines of assignments from ``x`` to ``y``; ``p`` are parameters of the given shapes."""

    lines: list[str]
    shapes: list[tuple[int, ...]]

    def __str__(self) -> str:
        return "\n".join([f"p = {self.shapes}", *self.lines])


class Network(nn.Module):
    """Runs a program on x ``[batch, FEATURES]``."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.p = nn.ParameterList(_weight(shape) for shape in program.shapes)
        self.code = compile("\n".join(program.lines), "network", "exec")

    def forward(self, x: Tensor) -> Tensor:
        space = {"torch": torch, "F": F, "p": self.p, "x": x}
        exec(self.code, space)
        return space["y"]


def _weight(shape: Sequence[int]) -> Tensor:
    inputs = max(1, torch.Size(shape).numel() // max(shape, default=1))
    return torch.randn(tuple(shape)) / inputs**0.5


class Writer:
    """A program under construction, and what its last operation is about.

    ``v`` is a value, ``d`` and ``e`` two of its dimensions besides the batch, ``n`` the size of d,
    ``k`` a number below it, ``part`` a divisor, ``m`` a size for something new.
    """

    def __init__(self, pick: Pick) -> None:
        self.pick = pick
        self.program = Program([], [])
        self.space: dict[str, Any] = {"torch": torch, "F": F, "p": [], "x": torch.randn(BATCH, 6)}
        self.values: list[str] = []
        self.units = pick([8, 12, 16])
        self.line(f"torch.sin(F.linear(x, {self.P(self.units, FEATURES)}, {self.P(self.units)}))")
        self.choose(self.values[0])

    def choose(self, name: str) -> None:
        self.v = name
        self.value: Tensor = self.space[name]
        dims = list(range(1, self.value.dim()))
        self.d, self.e = self.pick(dims), self.pick(dims)
        self.n = self.value.shape[self.d]
        self.k = self.pick(list(range(1, max(self.n, 2))))
        self.part = self.pick([each for each in range(1, self.n + 1) if self.n % each == 0])
        self.m = self.pick([2, 3, 4, 6, 8])

    def P(self, *shape: int) -> str:
        """A parameter of a shape; now and then one that there is already."""
        known = [n for n, old in enumerate(self.program.shapes) if old == shape]
        if known and self.pick([True, False, False]):
            return f"p[{self.pick(known)}]"
        self.program.shapes.append(shape)
        self.space["p"].append(_weight(shape))
        return f"p[{len(self.program.shapes) - 1}]"

    def like(self) -> str:
        """A value of the same shape as v; v itself where there is no other."""
        others = [n for n in self.values if n != self.v and self.shape(n) == self.value.shape]
        return self.pick(others) if others else self.v

    def other(self) -> str:
        return self.pick(self.values)

    def shape(self, name: str) -> torch.Size:
        return self.space[name].shape

    def ones(self, size: int) -> list[int]:
        """A shape for what is broadcast along d."""
        return [size if dim == self.d else 1 for dim in range(1, self.value.dim())]

    def line(self, expression: str) -> bool:
        """Adds a line; whether it is one that can be run and does not grow too large."""
        name = f"h{len(self.values)}"
        parameters = len(self.program.shapes)
        try:
            value = eval(expression, self.space)
            good = value.shape[0] == BATCH and 2 <= value.dim() <= 5
            good = good and 1 < value[0].numel() <= _LARGEST and value.isfinite().all()
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            good = False
        if not good or not value.is_floating_point() or not 1e-3 < value.abs().max() < 1e4:
            del self.program.shapes[parameters:], self.space["p"][parameters:]
            return False
        self.space[name] = value
        self.values.append(name)
        self.program.lines.append(f"{name} = {expression}")
        return True


def needed(program: Program) -> Program:
    """The program without the parameters that it does not use."""
    used = sorted({int(number) for line in program.lines for number in _PARAMETER.findall(line)})
    lines = [
        _PARAMETER.sub(lambda match: f"p[{used.index(int(match[1]))}]", line)
        for line in program.lines
    ]
    return Program(lines, [program.shapes[number] for number in used])
