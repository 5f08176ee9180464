"""A checkpoint as it grows: whole or not at all, taken up again after a crash.

Files (:mod:`nlm.checkpoint.shards`) grow in a hidden folder beside the target. Each is flushed to
the disk as it is finished, with a note of its SHA-256 and of what it is part of, and the folder (or
its only file) gets its name at the end. A process that dies leaves the target as it was, or in one
moment of a replacement under another name, from which it comes back. The notes go last of all: as
long as there are any, what lies beside them is known to be nlm's, and what it is.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nlm.checkpoint.atomic import atomic_path, naming, sync_folder, write_text
from nlm.checkpoint.headers import INDEX_SUFFIX
from nlm.checkpoint.shards import Shard, ShardFile, sha256_of
from nlm.checkpoint.texts import parse_json

_NOTES = ".nlm"  # the folder of what is known of the files until the checkpoint has its name
_JOURNAL = "journal.json"
_OWN = {"heads", "masks", "tasks", _NOTES}  # folders of a checkpoint


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

    Attributes
    ----------
    finished : file -> {"sha256": digest or None, ...}: what the one who wrote it wished to keep.
    named : whether a process that died had given all of it its name; nothing is left to write.

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
        target = Path(os.path.realpath(target))
        self.target, self.shards = target, tuple(shards)
        self.sync, self.digest, self._force = sync, digest, force
        self.folder = target.parent / f".{target.name}.partial"
        self._replaced = target.parent / f".{target.name}.replaced"
        self._identity = hashlib.sha256(
            b"\0".join([recipe.encode(), *(shard.header for shard in self.shards)])
        ).hexdigest()
        self.finished: dict[str, dict[str, Any]] = {}
        self.named = False
        self._notes = self.folder / _NOTES
        self._lock: int | None = None if join else locked(self.folder)
        try:
            if resume and not join and self._has_name():
                self.named = True
                self._end()
                self.release()
                return
            if not join:
                self._clean_up()
                refuse_target(target, force)
                if not self._notes.exists() and any(self.folder.iterdir()):
                    raise FileExistsError(
                        f"nlm: a folder of half a checkpoint is nlm's own, got {str(self.folder)!r}"
                    )
                if not resume:
                    _empty(self.folder)
                self._notes.mkdir(exist_ok=True)
                if not (self._notes / _JOURNAL).exists():
                    self._write(_JOURNAL, {})
            self._check_identity()
            if join:
                self.read_finished()
            else:
                self._take_up()
        except BaseException:
            if self._lock is not None and {each.name for each in self.folder.iterdir()} <= {_NOTES}:
                _remove(self.folder)  # nothing that could be resumed
            self.release()
            raise

    def open(self, shard: Shard) -> ShardFile:
        """The file of a shard, with its header written."""
        return ShardFile(self.folder / shard.name, shard, self.digest)

    def reopen(self, shard: Shard) -> BinaryIO:
        """The file of a finished shard, to write other bytes to; :meth:`renew` ends that."""
        return (self.folder / shard.name).open("r+b", buffering=0)

    def renew(self, shard: Shard, file: BinaryIO) -> None:
        """Closes what :meth:`reopen` gave, and notes its new digest."""
        with naming(self.folder / shard.name):
            if self.sync:
                os.fsync(file.fileno())
            file.close()
        digest = sha256_of(self.folder / shard.name) if self.digest else None
        self._note(shard, {**self.finished[shard.name], "sha256": digest})

    def finish(self, file: ShardFile, notes: Mapping[str, Any] | None = None) -> None:
        """Closes a file whose tensors are all written, and notes that it is whole."""
        file.close(self.sync)
        self._note(file.shard, {"sha256": file.sha256, **(notes or {})})

    def read_finished(self) -> None:
        """Reads the notes of the finished files, of all processes that write."""
        self.finished = self._noted(self._notes)

    def _noted(self, notes: Path) -> dict[str, dict[str, Any]]:
        """The notes of this recipe's files. One that the disk did not keep says nothing."""
        found = {each.name: _read(notes / f"{each.name}.json") for each in self.shards}
        return {
            name: note
            for name, note in found.items()
            if note.get("identity") == self._identity and "sha256" in note
        }

    def _take_up(self) -> None:
        """Keeps the notes of those files whose bytes are still what they were.

        Nothing is known of a file without a digest: it is written anew. A link leads to what is not
        nlm's to write to.
        """
        for link in filter(Path.is_symlink, self.folder.rglob("*")):
            link.unlink()
        self.read_finished()
        for shard in self.shards:
            entry, file = self.finished.get(shard.name, {}), self.folder / shard.name
            digest = entry.get("sha256")
            if digest is None or not file.is_file() or sha256_of(file) != digest:
                self.finished.pop(shard.name, None)
                (self._notes / f"{shard.name}.json").unlink(missing_ok=True)

    def commit(self, write_others: Callable[[Path], None] | None = None) -> None:
        """Gives the finished checkpoint its name, with its index and what ``write_others`` adds."""
        if missing := [each.name for each in self.shards if each.name not in self.finished]:
            raise RuntimeError(f"nlm: every file is written before the end, got no {missing[0]!r}")
        if self.target.suffix == ".safetensors":
            refuse_target(self.target, self._force)
            os.replace(self.folder / self.shards[0].name, self.target)
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
        if self.sync:  # the names are on the disk before what they replace goes
            sync_folder(self.target.parent)
        self._end()
        if self.sync:
            sync_folder(self.target.parent)
        self.release()

    def discard(self) -> None:
        """Removes what was written."""
        with suppress(OSError):
            _remove(self.folder)
        self.release()

    def release(self) -> None:
        """Leaves what was written for another process to resume."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_name(self) -> None:
        """Renames the folder, with its notes, so that it can be done again."""
        refuse_target(self.target, self._force)
        if self.target.exists():
            os.rename(self.target, self._replaced)
        os.rename(self.folder, self.target)

    def _end(self) -> None:
        """Removes what is left beside a checkpoint that has its name, the notes last."""
        shutil.rmtree(self._replaced, ignore_errors=True)
        if (self.target / _NOTES).is_dir():
            _remove(self.target / _NOTES)
        if self._notes.is_dir() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            _remove(self.folder)

    def _has_name(self) -> bool:
        """Whether all of this recipe has its name, and only its notes are left."""
        if self.target.suffix != ".safetensors":
            notes = self.target / _NOTES
            self.finished = self._noted(notes)
            return _read(notes / _JOURNAL).get("identity") == self._identity
        self.finished = self._noted(self._notes)
        (shard,) = self.shards
        digest = self.finished.get(shard.name, {}).get("sha256")
        is_moved = self.target.is_file() and not (self.folder / shard.name).exists()
        return digest is not None and is_moved and sha256_of(self.target) == digest

    def _clean_up(self) -> None:
        """Ends the replacement in which another process died: the old checkpoint comes back where
        the new one had not come."""
        is_new = (self.target / _NOTES).is_dir()
        if self._replaced.exists() and not self.target.exists():
            os.rename(self._replaced, self.target)
        elif self._replaced.exists() and not is_new:
            raise FileExistsError(
                f"nlm: what is replaced is kept here, got a folder in the way, "
                f"{str(self._replaced)!r}"
            )
        if is_new:
            shutil.rmtree(self._replaced, ignore_errors=True)
            _remove(self.target / _NOTES)

    def _write_index(self) -> None:
        weights = {entry.name: each.name for each in self.shards for entry in each.tensors}
        total = sum(entry.bytes for each in self.shards for entry in each.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        write_text(self.folder / f"model{INDEX_SUFFIX}", json.dumps(index, indent=2) + "\n")

    def _note(self, shard: Shard, entry: dict[str, Any]) -> None:
        self.finished[shard.name] = entry
        self._write(f"{shard.name}.json", entry)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        with atomic_path(self._notes / name, force=True) as temporary:
            temporary.write_text(json.dumps({**content, "identity": self._identity}))

    def _check_identity(self) -> None:
        if _read(self._notes / _JOURNAL).get("identity") != self._identity:
            raise ValueError(
                "nlm: what is resumed must be of the same recipe, inputs and layout, got another "
                f"in {str(self.folder)!r} (without --resume it is begun anew)"
            )


def locked(folder: Path) -> int:
    """A descriptor of the folder, made if need be, that this process alone has locked; the system
    frees it when the process ends."""
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"nlm: the folder of an output must exist, got {str(folder.parent)!r}"
        )
    if folder.is_symlink():
        raise FileExistsError(f"nlm: a folder of half a checkpoint is no link, got {str(folder)!r}")
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise OSError(error.errno, error.strerror, os.fspath(folder)) from error
            raise RuntimeError(
                f"nlm: one process at a time writes an output, got another in {str(folder)!r}"
            ) from error
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
        os.close(descriptor)  # it got its name as the output meanwhile


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """A folder of this process alone, emptied before and removed afterwards.

    Raises
    ------
    RuntimeError
        Another process has it.
    """
    descriptor = locked(folder)
    try:
        _empty(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def tidy(target: Path) -> None:
    """Removes what a process left that died when a checkpoint had its name, its last notes gone."""
    with suppress(OSError):
        (target / _NOTES).rmdir()  # only where it is empty: the journal, which goes last, is gone
    for kind in (".work", ".partial"):
        folder = target.parent / f".{target.name}{kind}"
        if folder.is_dir():
            with suppress(RuntimeError):
                descriptor = locked(folder)
                if kind == ".work" or _holds_nothing(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


def _holds_nothing(folder: Path) -> bool:
    """Whether there is nothing in a folder, or nothing but a journal of no files."""
    return {each for each in folder.rglob("*") if not each.is_dir()} <= {folder / _NOTES / _JOURNAL}


def is_unfinished(target: Path) -> bool:
    """Whether a process died as it removed its notes of a checkpoint that has its name."""
    target = Path(os.path.realpath(target))
    if target.suffix != ".safetensors":
        return (target / _NOTES).is_dir()
    return target.exists() and (target.parent / f".{target.name}.partial" / _NOTES).is_dir()


def _read(note: Path) -> dict[str, Any]:
    """What a note says; nothing where there is none, or one that is not whole."""
    try:
        with naming(note):
            found = parse_json(note.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remove(folder: Path) -> None:
    _empty(folder)
    folder.rmdir()


def _empty(folder: Path) -> None:
    """Removes what a folder holds: the notes last, and of these the journal."""
    last = (_NOTES, _JOURNAL)
    for each in sorted(folder.iterdir(), key=lambda path: (path.name in last, path.name)):
        if not each.is_dir() or each.is_symlink():
            each.unlink()
        elif each.name == _NOTES:
            _remove(each)
        else:
            shutil.rmtree(each)


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
    if not target.is_dir():
        return
    if any(target.iterdir()) and not list(target.glob("*.safetensors")):
        raise FileExistsError(
            "nlm: force replaces a checkpoint's folder, which holds safetensors files, got "
            f"{str(target)!r} without any"
        )
    if others := [
        each.name for each in target.iterdir() if each.is_dir() and each.name not in _OWN
    ]:
        raise FileExistsError(
            f"nlm: force replaces a checkpoint's folder, which holds no other folders, got "
            f"{others[0]!r} in {str(target)!r}"
        )


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
