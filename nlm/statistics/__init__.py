"""Running statistics of activations, and the walk over data that collects them."""

from nlm.statistics.data import Data, Forward, Mask, batches, run
from nlm.statistics.moments import CrossMoments, Moments
from nlm.statistics.observe import collect_cross_moments, collect_moments

__all__ = [
    "CrossMoments",
    "Data",
    "Forward",
    "Mask",
    "Moments",
    "batches",
    "collect_cross_moments",
    "collect_moments",
    "run",
]
