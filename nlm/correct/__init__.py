"""Matching the activations of a merged model to those of its experts."""

from nlm.correct.batch_norm import reset_batch_norm
from nlm.correct.by_name import CORRECTIONS, correct
from nlm.correct.calibration import CalibrationSize, calibration_size
from nlm.correct.correction import Correction
from nlm.correct.data_free import DataFree
from nlm.correct.fitting import expert_moments
from nlm.correct.least_squares import LeastSquares
from nlm.correct.low_rank import LowRank
from nlm.correct.points import default_points
from nlm.correct.probe import fit_logistic, linear_probe
from nlm.correct.random_fields import random_fields
from nlm.correct.refit import refit
from nlm.correct.repair import Repair
from nlm.correct.selection import Selection
from nlm.correct.tact import Tact

__all__ = [
    "CORRECTIONS",
    "CalibrationSize",
    "Correction",
    "DataFree",
    "LeastSquares",
    "LowRank",
    "Repair",
    "Selection",
    "Tact",
    "calibration_size",
    "correct",
    "default_points",
    "expert_moments",
    "fit_logistic",
    "linear_probe",
    "random_fields",
    "refit",
    "reset_batch_norm",
]
