"""What the demo keeps between runs: glyph renderings and trained checkpoints, and nothing else.

Each is one safetensors file in the user's cache folder, named after a SHA-256 of the settings that
made it, so that other settings never find it. A file is written whole or not at all and carries a
SHA-256 of its content; one that is damaged is made again with one warning, and deleting one file
makes that one again. ``NLM_CACHE`` names another folder.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nlm.checkpoint import DamagedFileError, cache_folder, read_tensors, write_tensors


def key(**settings: Any) -> str:
    """A SHA-256 of settings, which are anything that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names, types, shapes and bytes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        state.update(tensor.numpy().data)
    return state.hexdigest()


def path(name: str, settings_key: str) -> Path:
    """Where the file of this name and these settings lies, if it does."""
    return cache_folder() / f"{name}-{settings_key[:16]}.safetensors"


def remember(
    name: str, settings_key: str, make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Read the file of this name and these settings; where there is none, make and write it."""
    file = path(name, settings_key)
    tensors = _read(file, settings_key)
    if tensors is None:
        tensors = {entry: tensor.detach() for entry, tensor in make().items()}
        _write(file, tensors, settings_key)
    return tensors


def _read(file: Path, settings_key: str) -> dict[str, Tensor] | None:
    """The content of a whole file of these settings, else None."""
    try:
        tensors, metadata = read_tensors(file)
    except FileNotFoundError:
        return None
    except DamagedFileError:
        whole = False
    else:
        whole = metadata == {"settings": settings_key, "content": digest(tensors)}
    if whole:
        return tensors
    warnings.warn(
        f"nlm.demo: a cached file must be whole, got {str(file)!r} damaged; it is made again",
        stacklevel=3,
    )
    return None


def _write(file: Path, tensors: Mapping[str, Tensor], settings_key: str) -> None:
    """Write a file; a folder that cannot be written to costs a warning, not the run."""
    metadata = {"settings": settings_key, "content": digest(tensors)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, tensors, metadata, force=True)
    except OSError as error:
        warnings.warn(
            f"nlm.demo: the cache folder must be writable, got {str(file.parent)!r} ({error}); "
            "the next run starts from nothing (NLM_CACHE names another folder)",
            stacklevel=3,
        )
