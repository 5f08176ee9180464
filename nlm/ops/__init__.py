"""The fast operations: one name per stem, state and results are plain tensors.

They know no model. Each dispatches on the device of its arguments; :func:`nlm.info` says which
kernels are live.
"""

from nlm.ops.assignment import Assignment, assignment
from nlm.ops.channel_moments import channel_moments
from nlm.ops.cross_moments import cross_moments_
from nlm.ops.permute import permute, permute_add_
from nlm.ops.scale_shift import scale_shift

__all__ = [
    "Assignment",
    "assignment",
    "channel_moments",
    "cross_moments_",
    "permute",
    "permute_add_",
    "scale_shift",
]
