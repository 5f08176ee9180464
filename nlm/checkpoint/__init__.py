"""Files: tensors in and out as safetensors, written whole or not at all. Imports no torch.

Small files go through the safetensors library as one piece (``read_tensors``, ``write_tensors``);
checkpoints that may not fit in memory through ``headers``, ``mapping`` and ``shards``.
"""

from nlm.checkpoint.atomic import atomic_path, refuse_existing
from nlm.checkpoint.cache import cache_folder
from nlm.checkpoint.headers import Checkpoint, TensorEntry, open_checkpoint
from nlm.checkpoint.tensors import (
    DamagedFileError,
    read_kind,
    read_shapes,
    read_tensors,
    write_tensors,
)

__all__ = [
    "Checkpoint",
    "DamagedFileError",
    "TensorEntry",
    "atomic_path",
    "cache_folder",
    "open_checkpoint",
    "read_kind",
    "read_shapes",
    "read_tensors",
    "refuse_existing",
    "write_tensors",
]
