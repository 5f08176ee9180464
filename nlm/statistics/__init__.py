"""Running statistics of activations, and the walk over data that collects them."""

from nlm.statistics.data import Data, Forward, Mask, batches, first, run
from nlm.statistics.moments import CrossMoments, Moments
from nlm.statistics.observe import collect_cross_moments, collect_moments
from nlm.statistics.positions import attention_mask, tokens_except

__all__ = [
    "CrossMoments",
    "Data",
    "Forward",
    "Mask",
    "Moments",
    "attention_mask",
    "batches",
    "collect_cross_moments",
    "collect_moments",
    "first",
    "run",
    "tokens_except",
]
