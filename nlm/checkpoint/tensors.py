"""Named tensors to one safetensors file and back.

Torch is imported only when torch tensors are asked for.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nlm.checkpoint.atomic import atomic_path
from nlm.checkpoint.texts import DamagedFileError


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:
    """Writes torch tensors or numpy arrays to a safetensors file, atomically.

    Parameters
    ----------
    path : the file; an existing one is refused unless ``force``.
    tensors : name -> tensor or array; tensors on a GPU are copied to the host.
    metadata : text to keep in the header.

    Raises
    ------
    FileExistsError, FileNotFoundError
        See :func:`nlm.checkpoint.refuse_existing`.
    TypeError
        Torch tensors beside NumPy arrays.
    """
    arrays = {name: _own_storage(value) for name, value in tensors.items()}
    is_torch = any(map(_is_torch, arrays.values()))
    if strangers := [name for name, value in arrays.items() if _is_torch(value) != is_torch]:
        raise TypeError(
            f"nlm: the tensors of one file are all torch tensors or all NumPy arrays, got both "
            f"({type(arrays[strangers[0]]).__name__} for {strangers[0]!r})"
        )
    save_file: Any
    if is_torch:
        from safetensors.torch import save_file
    else:
        from safetensors.numpy import save_file
    with atomic_path(path, force) as temporary:
        save_file(arrays, os.fspath(temporary), metadata=dict(metadata or {}))
        _settle_header(temporary)


def _settle_header(path: str | os.PathLike[str]) -> None:
    """Brings the metadata of a file into the order of its names: safetensors writes it in another
    one each time, and the same content should be the same bytes.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if metadata := header.get("__metadata__"):
            header["__metadata__"] = dict(sorted(metadata.items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= length:  # as long, but for escapes
                file.seek(8)
                file.write(text.ljust(length))


def read_tensors(
    path: str | os.PathLike[str], framework: str = "pt"
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors (``framework`` "pt" or "np") and the metadata of a safetensors file at ``path``.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DamagedFileError
        The file is truncated, corrupt, or no safetensors file.
    """
    from safetensors import safe_open

    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"nlm: a tensor file must exist, got {name!r}")
    try:
        with safe_open(name, framework=framework) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged(name, error) from error


def read_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a safetensors file, or in all those of a folder at ``path``.

    No tensor is read.

    Raises
    ------
    FileNotFoundError
        There is no such file, or none in the folder.
    DamagedFileError
        A file is truncated, corrupt, or no safetensors file.
    """
    from safetensors import safe_open

    target = Path(path)
    files = sorted(target.glob("*.safetensors")) if target.is_dir() else [target]
    files = [each for each in files if each.is_file()]
    if not files:
        raise FileNotFoundError(f"nlm: a tensor file must exist, got {str(target)!r}")
    shapes: dict[str, tuple[int, ...]] = {}
    for each in files:
        try:
            with safe_open(os.fspath(each), framework="np") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except SafetensorError as error:
            raise _damaged(each, error) from error
    return shapes


def read_kind(
    path: str | os.PathLike[str], kind: str, caller: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a file at ``path`` whose metadata entry "nlm" is ``kind``.

    ``caller`` begins the messages of errors.

    Raises
    ------
    ValueError
        The file holds something else.
    """
    tensors, metadata = read_tensors(path)
    if (found := metadata.get("nlm", "another kind")) != kind:
        raise ValueError(f"{caller}: a file of {kind} is read, got {found} in {os.fspath(path)!r}")
    return tensors, metadata


def _damaged(path: str | os.PathLike[str], error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"nlm: a tensor file must be a whole safetensors file, got {os.fspath(path)!r} ({error})"
    )


def _own_storage(value: Any) -> Any:
    """The values in contiguous host memory that no other entry shares (the format requires it)."""
    if _is_torch(value):
        host = value.detach().cpu()
        return host.contiguous() if not host.is_contiguous() else host.clone()
    return value.copy(order="C")


def _is_torch(value: Any) -> bool:
    return type(value).__module__.startswith("torch")
