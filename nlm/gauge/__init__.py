"""Continuous symmetries: what may be rotated in a network without changing what it computes.

Permutations are few of the symmetries of a transformer. Where a residual stream is read through
norms alone (pre-norm), and where nothing but products acts on the units of a head, any orthogonal
map will do:

=====================  ==========================================================================
residual stream        x -> Q x, one Q for the whole network; with LayerNorm, which subtracts the
                       mean, Q 1 = 1. RMSNorm allows any Q.
values of a head       v -> R v, and the output's weight by R^T, one R per head (per key head
                       where heads share keys)
queries and keys       q -> R q, k -> R k, where no rotary position stands between
=====================  ==========================================================================

A norm's gain is diagonal, which a rotation is not: it is *folded* into the weights that read the
norm, with its bias, and what has no effect is taken out (the mean of a stream that LayerNorm reads,
the biases of keys; those of values go into the output's bias). The gain of a LayerScale goes into
the weight before it. Norms stay in the state dict with gain 1 and bias 0, so that the stock class
of the model loads the result. Folding is done per model: experts have gains of their own. A head
that is tied to the embedding is untied by it; ``Gauge.untied`` says which, ``Gauge.untie(model)``
makes the model that loads it.

Which groups these are is read off the model's graph and then proven on it (:mod:`nlm.gauge.find`).
A post-norm model is refused: its stream passes through gains, and only permutations are left.

References
----------
Theus et al.: Generalized Linear Mode Connectivity for Transformers (2025). Ashkboos et al.:
SliceGPT, arXiv:2401.15024.
"""

from nlm.gauge.find import find
from nlm.gauge.gauge import Gauge, Rotation, Shift, Stream

__all__ = ["Gauge", "Rotation", "Shift", "Stream", "find"]
