"""The merge methods, tensor by tensor and chunk by chunk. The results are those of
:func:`nlm.merge`.

:mod:`.method` says what a method is, :mod:`.sums` those that are sums, :mod:`.ties` TIES,
:mod:`.sparse` what drops entries before (DARE, breadcrumbs, DELLA), :mod:`.selected` SCE,
:mod:`.solved` RegMean and :mod:`.masks` those with a bit for each entry.
"""

from collections.abc import Mapping
from typing import Any

from nlm._core import DIALECTS
from nlm._methods import OPTIONS, RESCALES, check_dropping
from nlm.streaming.methods.masks import Consensus, TallMask
from nlm.streaming.methods.method import Buffers, Method, Piece, Value
from nlm.streaming.methods.selected import Sce
from nlm.streaming.methods.solved import RegMean
from nlm.streaming.methods.sparse import Breadcrumbs, Dare, Della
from nlm.streaming.methods.sums import (
    Fisher,
    Linear,
    ModelStock,
    Slerp,
    TaskArithmetic,
    UniformSoup,
)
from nlm.streaming.methods.ties import Ties

__all__ = ["STREAMED", "Buffers", "Method", "Piece", "Ties", "Value", "method_of"]

_SIMPLE: dict[str, type[Method]] = {
    "linear": Linear, "uniform_soup": UniformSoup, "slerp": Slerp,
    "task_arithmetic": TaskArithmetic, "model_stock": ModelStock, "sce": Sce, "fisher": Fisher,
    "tall_mask": TallMask, "consensus": Consensus,
}  # fmt: skip
_SPARSE = ("dare", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
_ELECTS = ("dare_ties", "breadcrumbs_ties", "della")
_ARE_MEANS = ("linear", "uniform_soup")
STREAMED = (*_SIMPLE, "ties", *_SPARSE, "regmean")


def method_of(name: str, value: Value, options: Mapping[str, Any]) -> Method:
    """The method of a name.

    Parameters
    ----------
    value : the numbers that may differ from tensor to tensor: weight, scale, density, drop, ...
    options : "normalize", "dialect", "rescale", "seed", and "columns", the weights that RegMean
        takes as [inputs, outputs].

    Raises
    ------
    ValueError
        A method that is not merged by streaming, or an unknown dialect or rescaling.
    """
    if name not in STREAMED:
        raise ValueError(f"nlm.streaming: the method is one of {', '.join(STREAMED)}, got {name!r}")
    dialect = options.get("dialect", OPTIONS["dialect"][0])
    rescale = options.get("rescale", OPTIONS["rescale"][0])
    for what, known, given in (("dialect", DIALECTS, dialect), ("rescaling", RESCALES, rescale)):
        if given not in known:
            raise ValueError(f"nlm.merge: the {what} is one of {', '.join(known)}, got {given!r}")
    if options.get("filter_wise"):
        raise ValueError("nlm.streaming: Model Stock is computed by whole tensors, got filter_wise")
    normalize = bool(options.get("normalize", name in _ARE_MEANS))
    if name in _SIMPLE:
        return _SIMPLE[name](value, normalize)
    if name == "regmean":
        return RegMean(value, True, columns=options.get("columns", ()))
    if name == "ties":
        return Ties(value, dialect=dialect)
    ties = Ties(value, dialect=dialect, trims=False) if name in _ELECTS else None
    if name.startswith("breadcrumbs"):
        return Breadcrumbs(value, normalize, ties)
    seed = check_dropping(0.0, options.get("seed"), rescale)
    kind = Dare if name.startswith("dare") else Della
    return kind(value, normalize, ties, seed, rescale)
