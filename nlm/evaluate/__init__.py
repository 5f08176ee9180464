"""How good a merge is, and where inside the network it is not."""

from nlm.evaluate.accuracy import accuracy, ensemble_accuracy, normalized_accuracy
from nlm.evaluate.barrier import BarrierCurve, loss_barrier
from nlm.evaluate.layers import LayerStatistics, layer_statistics

__all__ = [
    "BarrierCurve",
    "LayerStatistics",
    "accuracy",
    "ensemble_accuracy",
    "layer_statistics",
    "loss_barrier",
    "normalized_accuracy",
]
