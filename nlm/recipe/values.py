"""Numbers that may differ from tensor to tensor: by parts of their names, and by their depth.

A parameter is one number, a gradient over the layers, or a list of rules of which the first that
fits a tensor counts, as users of mergekit know them::

    weight: 0.5
    weight: [0.2, 0.4, 1.0]
    weight:
      - {filter: mlp, value: [0.2, 1.0]}
      - {value: 0.5}

The n numbers of a gradient stand at the depths 0, 1/(n-1), ... 1, with straight lines between them.
The first of L layers is at depth 0 and the last at 1, the only one at 1; what stands in no layer,
such as embeddings and heads, is at depth 0.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

_DIGITS = 9  # of a layer's number at most: names are others' texts


@dataclass(frozen=True)
class Rule:
    """A number or a gradient for the tensors whose name has ``part`` in it; None fits all.

    ``numbers`` lie at even distances from the first layer to the last.
    """

    part: str | None
    numbers: tuple[float, ...]

    def fits(self, tensor: str) -> bool:
        """Whether the rule is for a tensor of that name."""
        return self.part is None or self.part in tensor

    def at(self, depth: float) -> float:
        """The number at a depth from 0, the first layer, to 1, on a line between neighbours."""
        last = len(self.numbers) - 1
        place = depth * last
        below = int(place)
        share = place - below
        return (1 - share) * self.numbers[below] + share * self.numbers[min(below + 1, last)]


@dataclass(frozen=True)
class Values:
    """The numbers of one parameter: rules, of which the first that fits a tensor counts."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, *numbers: float) -> "Values":
        """One number, or a gradient, for all tensors."""
        return cls((Rule(None, numbers),))

    def __add__(self, other: "Values") -> "Values":
        """These rules, and where none of them fits the other ones."""
        return Values(self.rules + other.rules)

    def at(self, tensor: str, layer: float | None = None) -> float | None:
        """The number for a tensor, at a depth or in no layer; None where no rule fits it."""
        for rule in self.rules:
            if rule.fits(tensor):
                return rule.at(layer or 0.0)
        return None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of names that the rules ask for."""
        return tuple(rule.part for rule in self.rules if rule.part is not None)


def layers(tensors: Iterable[str]) -> dict[str, tuple[int, int]]:
    """name -> (number of its layer, number of layers), for the tensors that stand in layers.

    The first number in a name is its layer's, among those that begin alike:
    ``encoder.block.3.layer.0.weight`` is of layer 3 of ``encoder.block``.
    """
    found: dict[str, tuple[str, int]] = {}
    largest: dict[str, int] = defaultdict(int)
    for name in tensors:
        words = name.split(".")
        for place, word in enumerate(words):
            if word.isascii() and word.isdigit() and len(word) <= _DIGITS:
                stack = ".".join(words[:place])
                found[name] = stack, int(word)
                largest[stack] = max(largest[stack], int(word))
                break
    return {name: (number, largest[stack] + 1) for name, (stack, number) in found.items()}


def depths(tensors: Iterable[str]) -> dict[str, float]:
    """name -> depth in [0, 1], for the tensors that stand in layers."""
    return {
        name: number / (count - 1) if count > 1 else 1.0
        for name, (number, count) in layers(tensors).items()
    }
