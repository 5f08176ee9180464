"""What a recipe says: foundations, experts, alignment, method, correction and output.

Plain data, made by :func:`nlm.recipe.read_recipe` or in Python. Relative paths of a file are
relative to its folder. Imports no torch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlm.recipe.values import Values, depths

Number = Callable[[str, str | None, str], float]
"""(parameter, expert or None, tensor) -> its number."""


class RecipeError(ValueError):
    """Everything that is wrong with a recipe: ``problems``, a sentence each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Expert:
    """A fine-tuned model.

    Attributes
    ----------
    name, path : that of its task, and its checkpoint.
    foundation : the name of what it was tuned from; None where it stands in the base's basin.
    permutation : a file of ``nlm align`` that brings it into the first foundation's order.
    values : parameter -> its numbers for this expert, such as "weight" and "density".
    fisher : a file of the Fisher information of its entries, for Fisher averaging.
    gram : a file of the Gram matrices of what its linear layers read, for RegMean.
    data, samples : inputs that these are measured on, as :mod:`nlm.recipe.data` reads them, and the
        most that are used.
    """

    name: str
    path: Path
    foundation: str | None = None
    permutation: Path | None = None
    values: Mapping[str, Values] = field(default_factory=dict)
    fisher: Path | None = None
    gram: Path | None = None
    data: str | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Alignment:
    """How the other foundations are aligned with the first one.

    Attributes
    ----------
    method : of :func:`nlm.align`; None permutes by the experts' files alone.
    spec : a specification's file or shipped name; by default the base is traced.
    data : for a method that sees activations, as :mod:`nlm.recipe.data` reads it.
    samples : the most of it that is used.
    """

    method: str | None = "weights"
    spec: str | None = None
    data: str | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Correction:
    """How the merged model's activations are matched.

    Attributes
    ----------
    method : of :func:`nlm.correct.correct`.
    data : expert -> calibration data, as :mod:`nlm.recipe.data` reads it.
    samples : the most that are used of each; None leaves it to the method.
    """

    method: str
    data: Mapping[str, str] = field(default_factory=dict)
    samples: int | None = None


@dataclass(frozen=True)
class Output:
    """Where the result goes: a folder or a ``.safetensors`` file.

    Attributes
    ----------
    path : of that; None where the recipe names none.
    dtype : "float32", "bfloat16" or "float16"; by default the base's.
    shard_bytes : the most bytes of one file of a folder.
    per_task : where corrections of each task go: "side-car", a file beside the merged weights that
        :func:`nlm.load` reads, or "folded", a model's folder for each task.
    """

    path: Path | None = None
    dtype: str | None = None
    shard_bytes: int = 5_000_000_000
    per_task: str = "side-car"


@dataclass(frozen=True)
class Recipe:
    """A merge, complete.

    Attributes
    ----------
    foundations : name -> checkpoint; the others are aligned with the first one.
    base : where the task vectors start; None is the mean of the aligned foundations, or nothing
        for a method that has no base.
    seed : of what is drawn.
    align, correct : how foundations are aligned, and what is merged corrected; None for neither.
    output : where the result goes.
    method, values, options : a method, its numbers and its choices: see :mod:`nlm.recipe.methods`.
    heads : patterns of entries that are never merged.
    score : of a greedy soup: a function, or a file of labelled inputs; see
        :mod:`nlm.recipe.measuring`.
    layers : how many layers the models have, where the recipe says so.
    form : "nlm" or "mergekit", whose rules it was written by.
    file, text, lines : where it was read from, what stood there, and the lines of "base",
        "experts.digits", ...
    """

    experts: tuple[Expert, ...]
    method: str
    foundations: Mapping[str, Path] = field(default_factory=dict)
    base: Path | None = None
    values: Mapping[str, Values] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    align: Alignment | None = None
    correct: Correction | None = None
    heads: tuple[str, ...] = ()
    score: str | None = None
    output: Output = Output()
    layers: int | None = None
    form: str = "nlm"
    file: Path | None = None
    text: str = field(default="", compare=False, repr=False)
    lines: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def aligns(self) -> bool:
        """Whether permutations are to be found."""
        return self.align is not None and self.align.method is not None

    @property
    def rotates(self) -> bool:
        """Whether all models are brought into another gauge."""
        return self.aligns and self.align is not None and self.align.method == "orthogonal"

    def expert(self, name: str) -> Expert:
        """The expert of a name, which is one of theirs."""
        return next(each for each in self.experts if each.name == name)

    def value(
        self, parameter: str, expert: str | None, tensor: str, layer: float | None = None
    ) -> float:
        """The number of a parameter for one tensor, of one expert or of all together.

        ``layer`` is the depth of the tensor's layer, from 0 to 1, which gradients go by.

        Raises
        ------
        ValueError
            No rule fits the tensor.
        """
        found = self.values.get(parameter, Values())
        if expert is not None:
            found = self.expert(expert).values.get(parameter, Values()) + found
        number = found.at(tensor, layer)
        if number is None:
            raise ValueError(
                f"nlm.recipe: every tensor has a {parameter}, got none for {tensor!r}"
                + (f" of {expert!r}" if expert is not None else "")
            )
        return number

    def numbers(self, tensors: Iterable[str]) -> Number:
        """:meth:`value` for the tensors of a model, whose names say how deep they stand."""
        found = depths(tensors)
        return lambda parameter, expert, tensor: self.value(
            parameter, expert, tensor, found.get(tensor)
        )

    def where(self, *keys: str) -> str:
        """``recipe.yaml:12: `` for what stands under ``keys``, or the nearest one around them."""
        if self.file is None:
            return ""
        for end in range(len(keys), 0, -1):
            if (line := self.lines.get(".".join(keys[:end]))) is not None:
                return f"{self.file}:{line}: "
        return f"{self.file}: "

    def where_of(self, parameter: str, expert: str | None) -> str:
        """:meth:`where` the number of a ``parameter`` stands: with its expert, or with all's."""
        own = expert is not None and parameter in self.expert(expert).values
        if own or (expert is not None and parameter not in self.values):
            return self.where("experts", str(expert), parameter)
        return self.where("parameters", parameter)
