"""The fast operations: one name per stem, state and results are plain tensors.

They know no model. Each dispatches on the device of its arguments; :func:`nlm.info` says which
kernels are live.
"""

from nlm.ops.assignment import Assignment, assignment
from nlm.ops.channel_moments import channel_moments
from nlm.ops.cross_moments import cross_moments_
from nlm.ops.dare import dare
from nlm.ops.group_similarity import group_similarity_
from nlm.ops.inner_products import inner_products
from nlm.ops.magnitude_threshold import magnitude_threshold
from nlm.ops.magprune import magprune
from nlm.ops.permute import permute, permute_add_
from nlm.ops.scale_shift import scale_shift
from nlm.ops.sign_merge import sign_merge
from nlm.ops.tall_mask import tall_mask, tall_mask_agreement, tall_mask_apply
from nlm.ops.weighted_sum import weighted_sum

__all__ = [
    "Assignment",
    "assignment",
    "channel_moments",
    "cross_moments_",
    "dare",
    "group_similarity_",
    "inner_products",
    "magnitude_threshold",
    "magprune",
    "permute",
    "permute_add_",
    "scale_shift",
    "sign_merge",
    "tall_mask",
    "tall_mask_agreement",
    "tall_mask_apply",
    "weighted_sum",
]
