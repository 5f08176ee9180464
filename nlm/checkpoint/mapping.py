"""Checkpoints in the address space: their bytes are read from the disk as they are needed."""

import mmap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from nlm.checkpoint.atomic import naming
from nlm.checkpoint.headers import Checkpoint, TensorEntry, check_unchanged
from nlm.checkpoint.names import printable


class MappedFiles:
    """The files of checkpoints, mapped for reading; a context manager.

    Raises RuntimeError where a file is no longer the one whose header was read.

    Pages of a mapped file are the file's own, and no memory that the process holds: the system
    takes them back when it needs them.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._bytes: dict[Path, np.ndarray] = {}
        try:
            for checkpoint in checkpoints:
                for file in checkpoint.files:
                    if file not in self._maps:
                        self._open(file)
                check_unchanged(checkpoint.stamps)
        except BaseException:
            self.close()
            raise

    def address(self, entry: TensorEntry) -> int:
        """Where a tensor's bytes begin, in the file's order. Tensors of odd length may leave it
        unaligned."""
        return self._bytes[entry.file].ctypes.data + entry.begin

    def bytes(self, entry: TensorEntry) -> np.ndarray:
        """A tensor's bytes, uint8; not to be kept beyond the files' closing. A copy where the file
        has its axes in another order."""
        found = self._bytes[entry.file][entry.begin : entry.end]
        if entry.order is None:
            return found
        lying = found.reshape(*(entry.shape[axis] for axis in entry.order), -1)
        last = len(entry.order)
        return lying.transpose(*np.argsort(entry.order), last).reshape(-1)

    def places(self) -> list[tuple[int, int, str]]:
        """Where the files lie: address, bytes and name of each."""
        found = self._bytes.items()
        return [(array.ctypes.data, array.nbytes, printable(str(file))) for file, array in found]

    def will_need(self, entry: TensorEntry, begin: int, end: int) -> None:
        """Bytes ``begin`` to ``end`` of a tensor will be read soon."""
        self._advise(entry, begin, end, "MADV_WILLNEED")

    def done_with(self, entry: TensorEntry) -> None:
        """A tensor's pages need not stay in the address space."""
        self._advise(entry, 0, entry.bytes, "MADV_DONTNEED")

    def close(self) -> None:
        self._bytes.clear()
        for mapped in self._maps.values():
            with suppress(BufferError):  # a traceback still shows its bytes: it goes with them
                mapped.close()
        self._maps.clear()

    def __enter__(self) -> "MappedFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, file: Path) -> None:
        with naming(file), file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps[file] = mapped
        self._bytes[file] = np.frombuffer(mapped, np.uint8)

    def _advise(self, entry: TensorEntry, begin: int, end: int, advice: str) -> None:
        page = mmap.PAGESIZE
        first = (entry.begin + begin) // page * page
        length = min(entry.begin + end, entry.end) - first
        if length > 0 and hasattr(mmap, advice):
            self._maps[entry.file].madvise(getattr(mmap, advice), first, length)
