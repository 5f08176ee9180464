"""Corrections by their names."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nlm._multitask import MultiTaskModel
from nlm.checkpoint.headers import read_header
from nlm.correct.batch_norm import reset_batch_norm
from nlm.correct.correction import Correction
from nlm.correct.data_free import DataFree
from nlm.correct.least_squares import LeastSquares
from nlm.correct.refit import refit
from nlm.correct.repair import Repair
from nlm.correct.tact import Tact
from nlm.statistics import Data

CORRECTIONS = (
    "none", "tact", "tact_at_once", "repair", "least_squares", "batch_norm", "data_free", "refit",
    "refit+tact",
)  # fmt: skip
#: Those of them that take the experts' moments.
USE_MOMENTS = ("tact", "tact_at_once", "repair", "refit+tact")
Model = MultiTaskModel | Correction


def correct(
    model: MultiTaskModel,
    experts: Mapping[str, nn.Module],
    calibration: Mapping[str, Data],
    correction: str = "tact",
    **options: Any,
) -> Model:
    """The merged model with one of the corrections; the model itself is left as it is.

    Parameters
    ----------
    experts : task -> its aligned expert.
    calibration : task -> unlabelled batches, at least for the experts' tasks.
    correction : "none", "tact", "tact_at_once", "repair", "least_squares", "data_free",
        "batch_norm" (:func:`reset_batch_norm` on a copy), "refit", or "refit+tact", both in turn.
    options : passed on to :meth:`Tact.fit`, :meth:`Repair.fit`, :meth:`LeastSquares.fit`,
        :meth:`DataFree.fit`, :func:`reset_batch_norm` or :func:`nlm.refit`. For both in turn,
        ``points`` and ``moments`` are TACT's and ``ridge`` is refit's.

    Raises
    ------
    ValueError
        An unknown correction, an expert without calibration data, and what the fit raises.
    """
    check_correction(correction)
    if correction == "none":
        return model
    if correction == "data_free":
        return DataFree.fit(model, experts, **options)
    check_data("calibration", calibration, experts)
    data = {task: calibration[task] for task in experts}
    if correction == "batch_norm":
        model = copy.deepcopy(model)
        reset_batch_norm(model, data, **options)
        return model
    if correction == "repair":
        return Repair.fit(model, experts, data, **options)
    if correction == "least_squares":
        options.pop("moments", None)
        return LeastSquares.fit(model, experts, data, **options)
    if correction.startswith("refit"):
        of_tact = {"moments", "points"} if correction == "refit+tact" else {"moments"}
        kept = {name: value for name, value in options.items() if name not in of_tact}
        model = refit(model, experts, data, **kept)
        if correction == "refit":
            return model
        options.pop("ridge", None)
    mode = "at_once" if correction == "tact_at_once" else "sequential"
    return Tact.fit(model, experts, data, mode=mode, **options)


def check_correction(correction: str) -> None:
    if correction not in CORRECTIONS:
        raise ValueError(
            f"nlm.pipeline: the correction is one of {', '.join(CORRECTIONS)}, got {correction!r}"
        )


def check_data(kind: str, data: Mapping[str, Data], experts: Mapping[str, nn.Module]) -> None:
    if lost := [task for task in experts if task not in data]:
        raise ValueError(
            f"nlm.pipeline: there is {kind} data for every expert, got none for {', '.join(lost)}"
        )


def load_correction(path: str | os.PathLike[str], model: nn.Module) -> Correction:
    """The correction that :meth:`Correction.save` wrote, of whatever kind it is, on a model.

    Raises
    ------
    ValueError
        The file holds something else, and what :meth:`Correction.load` raises.
    """
    kinds = {kind._kind: kind for kind in (Tact, Repair, LeastSquares, DataFree)}
    found = read_header(Path(path))[1].get("nlm", "another kind")
    if found not in kinds:
        raise ValueError(
            f"nlm.correct: a file of corrections is one of {', '.join(kinds)}, got {found} in "
            f"{os.fspath(path)!r}"
        )
    return kinds[found].load(path, model)
