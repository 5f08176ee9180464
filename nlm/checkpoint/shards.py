"""A checkpoint as it is written: safetensors files of at most so many bytes, whole or not at all.

All shapes are known before the first byte is: files, headers and offsets are laid out first. The
files grow in a hidden folder beside the target, each is flushed to the disk as it is finished, with
a note of its SHA-256 beside it, and the folder (or its only file) gets its name at the end. A
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
from typing import Any, BinaryIO

from nlm.checkpoint.atomic import atomic_path, sync_folder
from nlm.checkpoint.headers import INDEX_SUFFIX, ITEM_BYTES, TensorEntry

_ALIGNMENT = 64
_JOURNAL = "journal.json"
_NOTE = ".json"  # beside each finished file
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
    join : writes to the folder that another process made for the same recipe.

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
        join: bool = False,
    ) -> None:
        self.target, self.shards = target, tuple(shards)
        self.sync, self.digest, self._force = sync, digest, force
        self.folder = target.parent / f".{target.name}.partial"
        self._replaced = target.parent / f".{target.name}.replaced"
        self._identity = hashlib.sha256(
            b"\0".join([recipe.encode(), *(shard.header for shard in self.shards)])
        ).hexdigest()
        #: file -> {"sha256": digest or None, ...}: what the one who wrote it wished to keep.
        self.finished: dict[str, dict[str, Any]] = {}
        self._lock: int | None = None if join else _locked(self.folder)
        try:
            if not join:
                self._clean_up()
                refuse_target(target, force)
                if not resume:
                    _empty(self.folder)
                if not (self.folder / _JOURNAL).exists():
                    self._write(_JOURNAL, {"identity": self._identity})
            self._check_identity()
            self.read_finished(check=not join)
        except BaseException:
            if self._lock is not None and not any(self.folder.iterdir()):
                self.folder.rmdir()
            self.release()
            raise

    def open(self, shard: Shard) -> "ShardFile":
        """The file of a shard, with its header written."""
        return ShardFile(self.folder / shard.name, shard, self.digest)

    def reopen(self, shard: Shard) -> BinaryIO:
        """The file of a finished shard, to write other bytes to; :meth:`renew` ends that."""
        return (self.folder / shard.name).open("r+b", buffering=0)

    def renew(self, shard: Shard, file: BinaryIO) -> None:
        """Closes what :meth:`reopen` gave, and notes its new digest."""
        if self.sync:
            os.fsync(file.fileno())
        file.close()
        digest = sha256_of(self.folder / shard.name) if self.digest else None
        self._note(shard, {**self.finished[shard.name], "sha256": digest})

    def finish(self, file: "ShardFile", notes: Mapping[str, Any] | None = None) -> None:
        """Closes a file whose tensors are all written, and notes that it is whole."""
        file.close(self.sync)
        self._note(file.shard, {"sha256": file.sha256, **(notes or {})})

    def read_finished(self, check: bool = False) -> None:
        """Takes up the finished files; with ``check`` those whose bytes are still what they were.

        Nothing is known of a file without a digest: it is written anew.
        """
        self.finished = {}
        for shard in self.shards:
            file, note = self.folder / shard.name, self.folder / (shard.name + _NOTE)
            if not note.is_file() or not file.is_file():
                continue
            entry = json.loads(note.read_text())
            if not check or (entry["sha256"] and sha256_of(file) == entry["sha256"]):
                self.finished[shard.name] = entry

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
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_name(self) -> None:
        """Renames the folder; the notes go last, so that it can be done again until then."""
        refuse_target(self.target, self._force)
        if self.target.exists():
            os.rename(self.target, self._replaced)
        os.rename(self.folder, self.target)
        self._remove_notes()
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _clean_up(self) -> None:
        """Ends the replacement in which another process died: the old checkpoint comes back where
        the new one had not come."""
        if self._replaced.exists() and not self.target.exists():
            os.rename(self._replaced, self.target)
        shutil.rmtree(self._replaced, ignore_errors=True)
        if (self.target / _JOURNAL).exists():
            self._remove_notes()

    def _remove_notes(self) -> None:
        for note in self.target.glob(f"*.safetensors{_NOTE}"):
            note.unlink()
        (self.target / _JOURNAL).unlink()

    def _write_index(self) -> None:
        weights = {entry.name: each.name for each in self.shards for entry in each.tensors}
        total = sum(entry.bytes for each in self.shards for entry in each.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        (self.folder / f"model{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")

    def _note(self, shard: Shard, entry: dict[str, Any]) -> None:
        self.finished[shard.name] = entry
        self._write(shard.name + _NOTE, entry)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        with atomic_path(self.folder / name, force=True) as temporary:
            temporary.write_text(json.dumps(content))

    def _check_identity(self) -> None:
        found = json.loads((self.folder / _JOURNAL).read_text())["identity"]
        if found != self._identity:
            raise ValueError(
                "nlm: what is resumed must be of the same recipe, inputs and layout, got another "
                f"in {str(self.folder)!r} (without --resume it is begun anew)"
            )


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


def _locked(folder: Path) -> int:
    """A descriptor of the folder, made if need be, that this process alone has locked; the system
    frees it when the process ends."""
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"nlm: the folder of an output must exist, got {str(folder.parent)!r}"
        )
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise RuntimeError(
                f"nlm: one process at a time writes an output, got another in {str(folder)!r}"
            ) from error
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
        os.close(descriptor)  # it got its name as the output meanwhile


def _empty(folder: Path) -> None:
    for each in folder.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


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
