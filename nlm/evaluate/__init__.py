"""How good a merge is, and where inside the network it is not."""

from nlm.evaluate.accuracy import accuracy, ensemble_accuracy, normalized_accuracy
from nlm.evaluate.barrier import BarrierCurve, loss_barrier
from nlm.evaluate.landscape import Landscape, landscape, loss_landscape
from nlm.evaluate.layers import LayerStatistics, layer_statistics
from nlm.evaluate.projection import Projection, projection

__all__ = [
    "BarrierCurve",
    "Landscape",
    "LayerStatistics",
    "Projection",
    "accuracy",
    "ensemble_accuracy",
    "landscape",
    "layer_statistics",
    "loss_barrier",
    "loss_landscape",
    "normalized_accuracy",
    "projection",
]
