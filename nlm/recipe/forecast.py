"""What a merge will read, write and take, from the headers alone.

A method reads its inputs tensor by tensor, once from the disk. What it has to know of a tensor
beforehand (a threshold, norms, inner products) is a second pass over it in memory. TIES of the
global dialect knows its thresholds only when it has seen all tensors, which then come from the disk
again.
"""

from dataclasses import dataclass

from nlm._names import matches
from nlm.checkpoint.headers import Checkpoint
from nlm.recipe.methods import METHODS
from nlm.recipe.opened import (
    Opened,
    beside_bytes,
    memory_bytes,
    open_all,
    runs_models,
    work_bytes,
    written_bytes,
)
from nlm.recipe.rates import Rates
from nlm.recipe.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Forecast:
    """What a merge takes.

    Attributes
    ----------
    method : the recipe's. tensors : how many are merged.
    inputs : who -> bytes of its tensors, without heads.
    passes : over the tensors, one or two. taken : bytes that these take in.
    read : bytes that come from the disk. written : bytes of the result.
    work : bytes of the permuted copies that lie beside the result until it is done.
    before : bytes that are read before the merge: foundations that are aligned, what is copied.
    beside : bytes of the models of single tasks that are written beside the result.
    memory : bytes of the models and matrices that alignment, correction or a measurement holds at
        once, beside activations and the buffers of the merge.
    runs : whether models are run, whose activations are not in ``memory``.
    activations : bytes of those that live at once in a pass of one model; None where unknown.
    untimed : what of it the predicted time leaves out.
    """

    method: str
    inputs: dict[str, int]
    passes: int
    taken: int
    read: int
    written: int
    work: int
    tensors: int
    before: int = 0
    beside: int = 0
    memory: int = 0
    untimed: tuple[str, ...] = ()
    runs: bool = False
    activations: int | None = None

    def seconds(self, rates: Rates) -> float:
        """The predicted time at such ``rates`` of all but what is ``untimed``, in seconds.

        The copies are made first; then a chunk is written while the next one is computed.
        """
        taking = self.read / rates.read + self.taken / rates.memory
        copying = self.before / rates.read + self.work / rates.write
        return copying + max(taking, self.written / rates.write) + self.beside / rates.write

    def rows(self, rates: Rates | None = None) -> list[tuple[str, str]]:
        """What there is to know, as a table of two columns; with ``rates`` the time too."""
        rows = [(who, readable(size)) for who, size in self.inputs.items()]
        times = "one pass" if self.passes == 1 else "two passes"
        rows += [
            ("method", f"{self.method}, {times} over {self.tensors} tensors"),
            ("reads", readable(self.read)),
            ("writes", readable(self.written)),
        ]
        if self.before:
            rows.append(("reads before, for alignment and copies", readable(self.before)))
        if self.work:
            rows.append(("permuted copies, until it is done", readable(self.work)))
        if self.beside:
            rows.append(("models of single tasks", readable(self.beside)))
        if self.memory:
            rows.append(("held in memory beside the buffers", readable(self.memory)))
        if self.runs:
            known = "not known" if self.activations is None else readable(self.activations)
            rows.append(("activations of a pass, beside that", known))
        if rates is not None:
            less = f", {' and '.join(self.untimed)} not counted" if self.untimed else ""
            rows.append(("takes about", f"{self.seconds(rates):.1f} s{less}"))
        return rows


def forecast(recipe: Recipe, opened: Opened | None = None) -> Forecast:
    """The forecast of a recipe.

    Raises
    ------
    RecipeError
        A model cannot be opened.
    """
    opened = opened or open_all(recipe)
    start = opened.start
    if start is None or opened.problems:
        raise RecipeError(opened.problems)
    experts = {f"expert {name!r}": _bytes(recipe, each) for name, each in opened.experts.items()}
    base = {} if opened.base is None else {"base": _bytes(recipe, opened.base)}
    what = "Fisher information" if recipe.method == "fisher" else "Gram matrices"
    known = {f"{what} of {n!r}": _bytes(recipe, each) for n, each in opened.curvatures.items()}
    foundations = {f"foundation {n!r}": _bytes(recipe, f) for n, f in opened.foundations.items()}
    is_mean = METHODS[recipe.method].base and recipe.base is None
    inputs = {**base, **experts, **known}
    if is_mean and len(foundations) > 1:  # what is merged starts from their mean
        inputs = {"base": next(iter(foundations.values())), **inputs}
    once = sum(inputs.values())
    work = work_bytes(recipe, opened)
    before = work + (sum(foundations.values()) if recipe.aligns else 0)
    untimed = [name for name, does in (
        ("alignment", recipe.aligns), ("correction", recipe.correct is not None),
        ("Gram matrices", any(each.data for each in recipe.experts)),
        ("scores", recipe.score is not None),
    ) if does]  # fmt: skip
    is_global = recipe.method == "ties" and recipe.options.get("dialect") == "global"
    is_thresholded = recipe.method == "ties" or recipe.method.startswith("breadcrumbs")
    if is_thresholded or recipe.options.get("rescale") == "l1":
        passes, again = 2, sum(experts.values()) + len(experts) * inputs.get("base", 0)
    elif recipe.method in ("slerp", "model_stock", "sce"):
        passes, again = 2, once
    else:
        passes, again = 1, 0
    return Forecast(
        recipe.method,
        {**foundations, **inputs} if recipe.aligns or is_mean else inputs,
        passes,
        once + again,
        once + again if is_global else once,
        written_bytes(recipe, start),
        work,
        sum(not matches(name, recipe.heads) for name in start.tensors),
        before,
        beside_bytes(recipe, opened),
        memory_bytes(recipe, opened),
        tuple(untimed),
        runs_models(recipe),
        _activations(recipe, opened),
    )


def _activations(recipe: Recipe, opened: Opened) -> int | None:
    if not runs_models(recipe):
        return None
    from nlm.recipe.activations import activation_bytes

    return activation_bytes(recipe, opened)


def _bytes(recipe: Recipe, model: Checkpoint) -> int:
    return sum(e.bytes for name, e in model.tensors.items() if not matches(name, recipe.heads))


def readable(size: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
