"""The files of a checkpoint that is written: laid out before the first byte, filled from the front.

All shapes are known before: so are headers and offsets.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nlm.checkpoint.atomic import naming
from nlm.checkpoint.headers import ITEM_BYTES, TensorEntry

_ALIGNMENT = 64
_BLOCK = 1 << 22
_PREFIX = 8

Part = tuple[str, str, Sequence[int]]
"""A tensor's name, type and shape."""


@dataclass(frozen=True)
class Shard:
    """One file: its name, its header as it stands in the file, and its tensors in order."""

    name: str
    header: bytes
    tensors: tuple[TensorEntry, ...]

    @property
    def bytes(self) -> int:
        return self.tensors[-1].end if self.tensors else len(self.header)


def plan_shards(
    target: Path,
    tensors: Iterable[Part],
    shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Shard, ...]:
    """Lays out tensors in files of at most ``shard_bytes`` each.

    A tensor that is larger has a file of its own. A target that ends in ".safetensors" is one file.
    """
    is_file = target.suffix == ".safetensors"
    parts: list[list[Part]] = [[]]
    filled = 0
    for part in tensors:
        size = _bytes(part)
        if parts[-1] and not is_file and filled + size > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(part)
        filled += size
    shards = []
    for number, each in enumerate(parts, 1):
        name = target.name if is_file else "model.safetensors"
        if len(parts) > 1:
            name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        shards.append(lay_out(name, each, metadata))
    return tuple(shards)


def lay_out(name: str, tensors: Iterable[Part], metadata: Mapping[str, str] | None = None) -> Shard:
    """One file; the elements of wider types first, so that all are aligned as their types want."""
    ordered = sorted(tensors, key=lambda part: -ITEM_BYTES[part[1]])
    ends = list(itertools.accumulate(map(_bytes, ordered)))
    begins = [0, *ends][: len(ends)]
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for (tensor, dtype, shape), *offsets in zip(ordered, begins, ends, strict=True):
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX + len(text)) % _ALIGNMENT)
    text = len(text).to_bytes(_PREFIX, "little") + text
    entries = [
        TensorEntry(tensor, dtype, tuple(shape), Path(name), len(text) + begin, len(text) + end)
        for (tensor, dtype, shape), begin, end in zip(ordered, begins, ends, strict=True)
    ]
    return Shard(name, text, tuple(entries))


def _bytes(part: Part) -> int:
    return ITEM_BYTES[part[1]] * math.prod(part[2])


class ShardFile:
    """A safetensors file that grows from front to back."""

    def __init__(self, path: Path, shard: Shard, digest: bool) -> None:
        self.shard = shard
        self._path = path
        self._hash = hashlib.sha256() if digest else None
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._written = 0
        self.write(shard.header)

    @property
    def sha256(self) -> str | None:
        """Of what has been written; None where none is wanted."""
        return self._hash.hexdigest() if self._hash else None

    def write(self, data: Any) -> None:
        """Appends bytes.

        Raises
        ------
        OSError
            The disk is full or fails.
        """
        view = memoryview(data).cast("B")
        if self._hash:
            self._hash.update(view)
        while len(view):
            with naming(self._path):
                written = self._file.write(view)
            self._written += written
            view = view[written:]

    def close(self, sync: bool) -> None:
        if self._written != self.shard.bytes:
            raise RuntimeError(
                f"nlm: a file is as long as its header says, got {self._written} of "
                f"{self.shard.bytes} bytes for {self.shard.name!r}"
            )
        with naming(self._path):
            if sync:
                os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        with suppress(OSError):
            self._file.close()


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with naming(file), file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(_BLOCK):
            digest.update(block)
        return digest.hexdigest()
