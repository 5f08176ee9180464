"""What checkpoints hold, from the headers of their safetensors files; no tensor is read.

A checkpoint is one ``.safetensors`` file, or a folder: the files that ``*.safetensors.index.json``
names, or ``model.safetensors``, or the only safetensors file there is. A file of the format is
eight bytes with the length of a JSON header, the header, and the tensors' bytes without a gap.

PyTorch's own files (:mod:`nlm.checkpoint.pickles`) are taken in the same way: alone, or where a
folder has no safetensors files, those that ``*.bin.index.json`` names, ``pytorch_model.bin``, or
the only one there is.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlm.checkpoint import pickles
from nlm.checkpoint.atomic import naming
from nlm.checkpoint.entries import ITEM_BYTES, TensorEntry
from nlm.checkpoint.texts import DamagedFileError, parse_json

__all__ = ["ITEM_BYTES", "Checkpoint", "TensorEntry", "open_checkpoint", "read_header"]

INDEX_SUFFIX = ".safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the format's own limit
_PREFIX = 8
_LARGEST = 1 << 63


Stamp = tuple[int, ...]
"""What of a file changes when it is written to or replaced."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, in the order of its files, and a model's ``config.json``.

    ``path`` is what was opened, a file or a folder; ``stamps`` are the files' as their headers
    were read, and ``metadata`` is what these say of themselves.
    """

    path: Path
    stamps: Mapping[Path, Stamp]
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Where the tensors lie."""
        return tuple(self.stamps)

    @property
    def folder(self) -> Path | None:
        """The folder, where the checkpoint is one."""
        return self.path if self.path.is_dir() else None


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads the headers of a checkpoint: ``path`` is a file, or a folder of one or more.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder, no file of weights in the folder, or one that its index
        names is missing.
    DamagedFileError
        A file is truncated, corrupt or of another format, or a pipe or a device; a PyTorch file
        names something to run; an index names other tensors than the files hold, or files outside
        the folder; a folder has several files and no index.
    """
    target = Path(path)
    if not target.exists():
        raise FileNotFoundError(f"nlm: a checkpoint must exist, got {str(target)!r}")
    if not (target.is_dir() or target.is_file()):
        raise DamagedFileError(
            f"nlm: a checkpoint is a file or a folder, got a pipe or a device, {str(target)!r}"
        )
    files, promised = _files(target) if target.is_dir() else ((target,), None)
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    stamps = {file: stamp(file) for file in files}
    for file in files:
        entries, about = _read(file)
        if twice := tensors.keys() & entries.keys():
            raise DamagedFileError(
                f"nlm: a tensor stands in one file of a checkpoint, got {min(twice)!r} in "
                f"{str(tensors[min(twice)].file)!r} and {str(file)!r}"
            )
        tensors |= entries
        metadata |= about
    if promised is not None:
        _check_index(target, promised, tensors)
    config = read_config(target)
    if config is not None and any(map(pickles.is_pickle, files)):
        tensors = pickles.without_twins(tensors)
    return Checkpoint(target, stamps, tensors, metadata, config)


def _read(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    return (pickles.read_pickle(file), {}) if pickles.is_pickle(file) else read_header(file)


def stamp(file: Path) -> Stamp:
    """Device, number, size and time of a file."""
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Raises where a file is no longer the one whose header was read.

    Raises
    ------
    RuntimeError
        A file was replaced, written to, or removed.
    """
    for file, known in stamps.items():
        if not file.exists() or stamp(file) != known:
            raise RuntimeError(
                f"nlm: an input must stay as it is while it is read, got {str(file)!r}, which was "
                "changed"
            )


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of one safetensors file in the order of their bytes, and its metadata.

    Raises
    ------
    DamagedFileError
        The file breaks a rule of the format.
    """
    size = file.stat().st_size
    with naming(file), file.open("rb") as opened:
        prefix = opened.read(_PREFIX)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < _PREFIX or length > min(_LONGEST_HEADER, size - _PREFIX):
            raise _damaged(file, f"a header of {length} bytes in a file of {size}")
        text = opened.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_each_once)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        begin = _PREFIX + length
        entries = {name: _entry(name, value, file, begin) for name, value in header.items()}
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("metadata that is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, str(error) or type(error).__name__) from error
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = begin
    for entry in ordered.values():
        if entry.begin != at:
            raise _damaged(file, f"a gap or an overlap at byte {at}, before {entry.name!r}")
        at = entry.end
    if at != size:
        raise _damaged(file, f"tensors that end at byte {at} of {size}")
    return ordered, dict(metadata)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that stands twice")
    return found


def _entry(name: str, value: Mapping[str, Any], file: Path, start: int) -> TensorEntry:
    name.encode("utf-8")  # half a pair of UTF-16, which JSON can name, is no text
    if not all(isinstance(value[key], list) for key in ("shape", "data_offsets")):
        raise ValueError(f"a shape or offsets of {name!r} that are no list")
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"an unknown type {dtype!r} of {name!r}")
    if not all(type(number) is int and 0 <= number < _LARGEST for number in (*shape, begin, end)):
        raise ValueError(f"sizes of {name!r} that are no whole numbers")
    expected = 0 if 0 in shape else ITEM_BYTES[dtype]
    for number in shape:
        expected *= number
        if expected >= _LARGEST:
            raise ValueError(f"a shape of {name!r} of more than {_LARGEST - 1} bytes")
    if end - begin != expected:
        raise ValueError(f"{end - begin} bytes for {expected} of {name!r}")
    return TensorEntry(name, dtype, shape, file, start + begin, start + end)


def _files(folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str] | None]:
    """The files of a folder, and what its index says of them: tensor -> file name."""
    for suffix, usual, found in (
        (INDEX_SUFFIX, "model", [each for each in folder.glob("*.safetensors") if each.is_file()]),
        (pickles.INDEX_SUFFIX, "pytorch_model", pickles.weight_files(folder)),
    ):
        indices = sorted(each for each in folder.glob(f"*{suffix}") if each.is_file())
        if len(indices) > 1 and folder / f"{usual}{suffix}" in indices:
            indices = [folder / f"{usual}{suffix}"]
        if len(indices) == 1:
            return _indexed(folder, indices[0])
        usual_file = folder / f"{usual}{suffix.removesuffix('.index.json')}"
        if usual_file in found:
            return (usual_file,), None
        if len(found) == 1:
            return (found[0],), None
        if found or indices:
            raise DamagedFileError(
                f"nlm: a folder of several files of weights has one index (*{suffix}), got "
                f"{len(indices)} in {str(folder)!r}"
            )
    raise FileNotFoundError(
        f"nlm: a checkpoint's folder holds safetensors or PyTorch files, got none in "
        f"{str(folder)!r}"
    )


def _indexed(folder: Path, index: Path) -> tuple[tuple[Path, ...], Mapping[str, str]]:
    """The files that an index names."""
    promised = _weight_map(index)
    names = sorted(set(promised.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise _damaged(index, f"a file outside its folder, {name!r}")
        if not _is_file(folder / name):
            raise FileNotFoundError(
                f"nlm: the files of a checkpoint must exist, got none called {name!r} in "
                f"{str(folder)!r}"
            )
    return tuple(folder / name for name in names), promised


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that is too long
        return False


def _weight_map(index: Path) -> dict[str, str]:
    try:
        with naming(index):
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not found or not all(isinstance(t, str) for pair in found.items() for t in pair):
            raise ValueError("a weight_map that does not name files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, str(error) or type(error).__name__) from error
    return dict(found)


def _check_index(
    folder: Path, promised: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    for name, file in promised.items():
        if name not in tensors or tensors[name].file.name != file:
            raise DamagedFileError(
                f"nlm: the index of a checkpoint names what its files hold, got {name!r}, which "
                f"is not in {file!r} of {str(folder)!r}"
            )
    if extra := tensors.keys() - promised.keys():
        raise DamagedFileError(
            f"nlm: the index of a checkpoint names what its files hold, got {min(extra)!r} of "
            f"{str(folder)!r}, which it does not name"
        )


def read_config(folder: Path) -> Mapping[str, Any] | None:
    """The ``config.json`` of a folder; None without one.

    Raises
    ------
    DamagedFileError
        It is no JSON mapping.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        with naming(file):
            config = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(config, dict):
        raise _damaged(file, "no mapping")
    return config


def _damaged(path: Path, reason: str) -> DamagedFileError:
    return DamagedFileError(f"nlm: a checkpoint's file must be whole, got {str(path)!r} ({reason})")
