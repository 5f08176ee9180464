"""A checkpoint as it is written: safetensors files of at most so many bytes, whole or not at all.

All shapes are known before the first byte is: files, headers and offsets are laid out first. The
files grow in a hidden folder beside the target, each is flushed to the disk as it is finished and
entered in a journal with its SHA-256, and the folder (or its only file) gets its name at the end. A
process that dies leaves the target as it was; what it had finished can be taken up again.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from nlm.checkpoint.atomic import atomic_path, sync_folder
from nlm.checkpoint.headers import INDEX_SUFFIX, ITEM_BYTES, TensorEntry

_ALIGNMENT = 64
_JOURNAL = "journal.json"
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


class PartialCheckpoint:
    """The hidden folder in which a checkpoint grows.

    Parameters
    ----------
    target : the folder, or the file, that the checkpoint becomes.
    shards : its layout.
    recipe : what the checkpoint is made of, as text: only the same is resumed.
    resume : takes up what a process that died left of the same recipe; else that is removed.
    force : replaces a target that is there, at the end.
    sync : flushes each file to the disk. Without it a power cut may leave a torn checkpoint.
    digest : computes the SHA-256 of each file.

    Raises
    ------
    FileExistsError
        The target is there and ``force`` is false; or ``force`` is true and it is no checkpoint.
    FileNotFoundError
        The folder that shall hold the target is not there.
    RuntimeError
        Another process writes the same target.
    ValueError
        What is there to resume was made of another recipe.
    """

    def __init__(
        self,
        target: Path,
        shards: Sequence[Shard],
        recipe: str,
        *,
        resume: bool = False,
        force: bool = False,
        sync: bool = True,
        digest: bool = True,
    ) -> None:
        self.target, self.shards = target, tuple(shards)
        self.sync, self.digest, self._force = sync, digest, force
        self.folder = target.parent / f".{target.name}.partial"
        self._replaced = target.parent / f".{target.name}.replaced"
        self._lock = _locked(target.parent / f".{target.name}.lock")
        self._identity = hashlib.sha256(
            b"\0".join([recipe.encode(), *(shard.header for shard in self.shards)])
        ).hexdigest()
        #: file -> {"sha256": digest or None, ...}: what the one who wrote it wished to keep.
        self.finished: dict[str, dict[str, Any]] = {}
        try:
            self._clean_up()
            refuse_target(target, force)
            if resume and (self.folder / _JOURNAL).is_file():
                self.finished = self._taken_up()
            elif self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(exist_ok=True)
            self._write_journal()
        except BaseException:
            self.release()
            raise

    def open(self, shard: Shard) -> "ShardFile":
        """The file of a shard, with its header written."""
        return ShardFile(self.folder / shard.name, shard, self.digest)

    def reopen(self, shard: Shard) -> BinaryIO:
        """The file of a finished shard, to write other bytes to; :meth:`renew` ends that."""
        return (self.folder / shard.name).open("r+b", buffering=0)

    def renew(self, shard: Shard, file: BinaryIO) -> None:
        """Closes what :meth:`reopen` gave, and enters its new digest."""
        if self.sync:
            os.fsync(file.fileno())
        file.close()
        if self.digest:
            self.finished[shard.name]["sha256"] = sha256_of(self.folder / shard.name)
        self._write_journal()

    def finish(self, file: "ShardFile", notes: Mapping[str, Any] | None = None) -> None:
        """Closes a file whose tensors are all written, and enters it in the journal."""
        file.close(self.sync)
        self.finished[file.shard.name] = {"sha256": file.sha256, **(notes or {})}
        self._write_journal()

    def commit(self, write_others: Callable[[Path], None] | None = None) -> None:
        """Gives the finished checkpoint its name, with its index and what ``write_others`` adds."""
        if missing := [each.name for each in self.shards if each.name not in self.finished]:
            raise RuntimeError(f"nlm: every file is written before the end, got no {missing[0]!r}")
        if self.target.suffix == ".safetensors":
            refuse_target(self.target, self._force)
            os.replace(self.folder / self.shards[0].name, self.target)
            shutil.rmtree(self.folder)
        else:
            if len(self.shards) > 1:
                self._write_index()
            if write_others is not None:
                write_others(self.folder)
            if self.sync:
                for file in self.folder.rglob("*"):
                    _sync(file)
                sync_folder(self.folder)
            self._take_name()
        if self.sync:
            sync_folder(self.target.parent)
        self.release()

    def discard(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Leaves what was written for another process to resume."""
        self._lock.close()
        (self.target.parent / f".{self.target.name}.lock").unlink(missing_ok=True)

    def _take_name(self) -> None:
        """Renames the folder; the journal goes last, so that it can be done again until then."""
        refuse_target(self.target, self._force)
        if self.target.exists():
            os.rename(self.target, self._replaced)
        os.rename(self.folder, self.target)
        (self.target / _JOURNAL).unlink()
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _clean_up(self) -> None:
        """Ends the replacement in which another process died: the old checkpoint comes back where
        the new one had not come."""
        if self._replaced.exists() and not self.target.exists():
            os.rename(self._replaced, self.target)
        shutil.rmtree(self._replaced, ignore_errors=True)
        if self.target.is_dir():
            (self.target / _JOURNAL).unlink(missing_ok=True)

    def _write_index(self) -> None:
        weights = {entry.name: each.name for each in self.shards for entry in each.tensors}
        total = sum(entry.bytes for each in self.shards for entry in each.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        (self.folder / f"model{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")

    def _write_journal(self) -> None:
        text = json.dumps({"identity": self._identity, "files": self.finished}, indent=1)
        with atomic_path(self.folder / _JOURNAL, force=True) as temporary:
            temporary.write_text(text)

    def _taken_up(self) -> dict[str, dict[str, Any]]:
        """The finished files of the journal whose bytes are still those that were written."""
        try:
            journal = json.loads((self.folder / _JOURNAL).read_text())
            identity, files = journal["identity"], dict(journal["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"nlm: a journal to resume must be whole, got {str(self.folder / _JOURNAL)!r} "
                f"({error})"
            ) from error
        if identity != self._identity:
            raise ValueError(
                "nlm: what is resumed must be of the same recipe, inputs and layout, got another "
                f"in {str(self.folder)!r} (without --resume it is begun anew)"
            )
        whole = {}
        for shard in self.shards:
            file, entry = self.folder / shard.name, files.get(shard.name)
            if entry and file.is_file() and file.stat().st_size == shard.bytes:
                if entry["sha256"] is not None and sha256_of(file) == entry["sha256"]:
                    whole[shard.name] = entry
        return whole


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
            written = self._file.write(view)
            self._written += written
            view = view[written:]

    def close(self, sync: bool) -> None:
        if self._written != self.shard.bytes:
            raise RuntimeError(
                f"nlm: a file is as long as its header says, got {self._written} of "
                f"{self.shard.bytes} bytes for {self.shard.name!r}"
            )
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


def _locked(path: Path) -> TextIO:
    """A file that this process alone holds open; the system frees it when the process ends."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"nlm: the folder of an output must exist, got {str(path.parent)!r}"
        )
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise RuntimeError(
            f"nlm: one process at a time writes an output, got another at {str(path)!r}"
        ) from error
    return file


def refuse_target(target: Path, force: bool) -> None:
    """Raises where a checkpoint may not be written to a path; see :class:`PartialCheckpoint`."""
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"nlm: the folder of an output must exist, got {str(target.parent)!r}"
        )
    if not target.exists():
        return
    if not force:
        raise FileExistsError(
            f"nlm: an existing output is overwritten only with force (--force), got {str(target)!r}"
        )
    if target.is_dir() != (target.suffix != ".safetensors"):
        raise FileExistsError(
            f"nlm: a file replaces a file and a folder a folder, got {str(target)!r}"
        )
    if target.is_dir() and any(target.iterdir()) and not list(target.glob("*.safetensors")):
        raise FileExistsError(
            "nlm: force replaces a checkpoint's folder, which holds safetensors files, got "
            f"{str(target)!r} without any"
        )


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(_BLOCK):
            digest.update(block)
        return digest.hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
