"""The fast operations: one name per stem, state and results are plain tensors.

They know no model. Each dispatches on the device of its arguments; :func:`nlm.info` says which
kernels are live.
"""

from nlm.ops.channel_moments import channel_moments

__all__ = ["channel_moments"]
