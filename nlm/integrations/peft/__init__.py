"""PEFT's merges of adapters on nlm, and LoRA adapters of other base models moved to one's own.

An adapter that was trained on base model B fits base model A once its factors stand in A's order of
units, which ``nlm align A B`` finds::

    from nlm.integrations.peft import align_adapter, use_as_default

    align_adapter("adapter_b", "b_to_a.safetensors", output="adapter_b_on_a", base_model="base_a")

It may then be loaded on A beside adapters of A, and merged with them. Within ``use_as_default()``
``add_weighted_adapter`` merges on nlm::

    with use_as_default():
        model.add_weighted_adapter(["a", "b"], [0.6, 0.4], "both", "ties_svd", density=0.2)

For peft from 0.21, below 0.22. :func:`align_adapter` reads files alone and does not import it.
"""

from nlm.integrations.peft.adapters import align_adapter
from nlm.integrations.peft.merging import (
    dare_linear,
    dare_ties,
    magnitude_prune,
    task_arithmetic,
    ties,
    use_as_default,
)

__all__ = [
    "align_adapter",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "task_arithmetic",
    "ties",
    "use_as_default",
]
