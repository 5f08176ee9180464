"""Files: tensors in and out as safetensors, written whole or not at all. Imports no torch."""

from nlm.checkpoint.atomic import atomic_path, refuse_existing
from nlm.checkpoint.cache import cache_folder
from nlm.checkpoint.tensors import (
    DamagedFileError,
    read_kind,
    read_shapes,
    read_tensors,
    write_tensors,
)

__all__ = [
    "DamagedFileError",
    "atomic_path",
    "cache_folder",
    "read_kind",
    "read_shapes",
    "read_tensors",
    "refuse_existing",
    "write_tensors",
]
