"""The merge methods of recipes: which parameters each has, with their defaults and ranges.

A number may differ from tensor to tensor, and where ``per_expert`` says so from expert to expert; a
choice is one for the whole merge. The names and defaults are those of
:func:`nlm.merge`. Imports no torch.
"""

import math
from dataclasses import dataclass

from nlm._core import DIALECTS
from nlm._methods import OPTIONS, RESCALES
from nlm.checkpoint.entries import TORCH_TYPES


@dataclass(frozen=True)
class Number:
    """A parameter that is a number in a range."""

    default: float
    low: float = -math.inf
    high: float = math.inf
    excluded: float | None = None
    per_expert: bool = False

    @property
    def range(self) -> str:
        """The range in words, empty where every number is in it."""
        if self.low == -math.inf:
            return ""
        left, right = ("(" if self.excluded == self.low else "["), "]"
        right = ")" if self.excluded == self.high else right
        return f"in {left}{self.low:g}, {self.high:g}{right}"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and value != self.excluded


NUMBERS = {
    "weight": Number(1.0, per_expert=True),
    "scale": Number(OPTIONS["scale"][0]),
    "density": Number(OPTIONS["density"][0], 0, 1, excluded=0, per_expert=True),
    "drop": Number(OPTIONS["drop"][0], 0, 1, excluded=1, per_expert=True),
    "gamma": Number(OPTIONS["gamma"][0], 0, 1, excluded=1, per_expert=True),
    "epsilon": Number(OPTIONS["epsilon"][0], 0, 0.5, excluded=0.5, per_expert=True),
    "select": Number(OPTIONS["select"][0], 0, 1, excluded=0),
    "mask_threshold": Number(
        OPTIONS["mask_threshold"][0], 0, math.inf, excluded=0, per_expert=True
    ),
    "agreement": Number(OPTIONS["agreement"][0], 1, 255),
    "t": Number(OPTIONS["t"][0], 0, 1),
    "alpha": Number(0.9, 0, 1),
    "floor": Number(OPTIONS["floor"][0], 0, math.inf, excluded=0),
}


@dataclass(frozen=True)
class Choice:
    """A parameter that is one of several words."""

    default: str
    known: tuple[str, ...]


CHOICES = {
    "dialect": Choice(OPTIONS["dialect"][0], DIALECTS),
    "rescale": Choice(OPTIONS["rescale"][0], RESCALES),
}


@dataclass(frozen=True)
class Method:
    """A method of recipes.

    Attributes
    ----------
    parameters : names of its numbers and choices.
    normalize : whether its sum is divided by that of the weights by default; None has no choice.
    base : whether the task vectors start from a base.
    experts : the least and the largest number of experts.
    random : whether it needs a seed.
    of_each : what every expert has one of, for the method alone: "fisher", a file of Fisher
        information; "gram", a file of Gram matrices, or "data" that they are measured on.
    """

    parameters: tuple[str, ...]
    normalize: bool | None = None
    base: bool = True
    experts: tuple[int, float] = (1, math.inf)
    random: bool = False
    of_each: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.parameters if self.normalize is None else (*self.parameters, "normalize")

    @property
    def per_expert(self) -> tuple[str, ...]:
        return tuple(n for n in self.parameters if n in NUMBERS and NUMBERS[n].per_expert)

    @property
    def of_expert(self) -> tuple[str, ...]:
        """The keys that an expert may have for the method."""
        samples = ("samples",) if "data" in self.of_each else ()
        return (*self.per_expert, *self.of_each, *samples)


_SUM = ("weight", "scale")
_CRUMBS = (*_SUM, "density", "gamma")
_DELLA = (*_SUM, "density", "epsilon", "rescale")
_DARE = (*_SUM, "drop", "rescale")

METHODS = {
    "linear": Method(("weight",), normalize=True, base=False),
    "uniform_soup": Method((), base=False),  # linear with equal weights
    "task_arithmetic": Method(_SUM, normalize=False),
    "ties": Method((*_SUM, "density", "dialect")),
    "dare": Method(_DARE, normalize=False, random=True),
    "dare_ties": Method((*_DARE, "dialect"), random=True),
    "breadcrumbs": Method(_CRUMBS, normalize=False),
    "breadcrumbs_ties": Method((*_CRUMBS, "dialect")),
    "della": Method((*_DELLA, "dialect"), random=True),
    "della_linear": Method(_DELLA, normalize=False, random=True),
    "sce": Method(("scale", "select")),
    "tall_mask": Method(("weight", "mask_threshold")),
    "consensus": Method((*_SUM, "mask_threshold", "agreement")),
    "fisher": Method(("weight", "floor"), base=False, of_each=("fisher",)),
    "slerp": Method(("t",), base=False, experts=(2, 2)),
    "model_stock": Method((), experts=(2, math.inf)),
    "regmean": Method(("alpha",), base=False, of_each=("gram", "data")),
    "greedy_soup": Method((), base=False),
}

DTYPES = {TORCH_TYPES[dtype]: dtype for dtype in ("F32", "BF16", "F16")}

#: The methods of :func:`nlm.align`, and those of them that need no data.
ALIGNMENTS = ("weights", "frank-wolfe", "activations", "dual", "orthogonal")
BY_WEIGHTS = ALIGNMENTS[:2]

#: What :func:`nlm.correct.by_name.correct` does.
CORRECTIONS = (
    "none", "tact", "tact_at_once", "repair", "least_squares", "batch_norm", "data_free", "refit",
    "refit+tact",
)  # fmt: skip

#: Those of them that need no data, and those that leave something beside the weights.
WITHOUT_DATA = ("none", "data_free")
#: Samples of a task that a correction uses by default.
SAMPLES = 128
#: Those whose calibration data several processes share.
SHARED = ("tact", "tact_at_once", "repair", "least_squares")
BESIDE_WEIGHTS = ("tact", "tact_at_once", "repair", "least_squares", "data_free", "refit+tact")

#: Where that goes.
PER_TASK = ("side-car", "folded")
