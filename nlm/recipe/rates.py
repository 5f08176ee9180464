"""How fast this machine reads, writes and computes, measured briefly; how much memory is free."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_BYTES = 1 << 25  # of each measurement
_BLOCK = 1 << 22
_DROPPED = ("active_file", "inactive_file")  # pages of files


@dataclass(frozen=True)
class Rates:
    """Bytes per second: of ``read`` and ``write`` on the disk, and of one pass over ``memory``."""

    read: float
    write: float
    memory: float


def measure_rates(inputs: Sequence[Path], folder: Path) -> Rates:
    """Rates of this moment, from 32 MiB each, in a fraction of a second on most disks.

    Parameters
    ----------
    inputs : files that will be read: what of them is in the system's cache is read from there.
    folder : where the output will be; a hidden file is written, flushed to the disk and removed.
    """
    return Rates(_read(inputs), _write(folder), _memory())


def _read(inputs: Sequence[Path]) -> float:
    """From places all over the files, in blocks."""
    sizes = [file.stat().st_size for file in inputs]
    count = max(1, _BYTES // _BLOCK)
    begun, done = time.perf_counter(), 0
    for number in range(count):
        place = sum(sizes) * number // count
        for file, size in zip(inputs, sizes, strict=True):
            if place < size:
                with file.open("rb", buffering=0) as opened:
                    opened.seek(place)
                    done += len(opened.read(_BLOCK))
                break
            place -= size
    return done / (time.perf_counter() - begun)


def _write(folder: Path) -> float:
    block = os.urandom(1 << 16) * (_BLOCK >> 16)
    begun = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_BYTES // _BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _BYTES / (time.perf_counter() - begun)


def _memory() -> float:
    """Of a weighted sum, which most methods are not much slower than; the second time, in memory
    that is there."""
    left, right = (np.ones(_BYTES // 8, np.float32) for _ in range(2))
    into = np.empty_like(left)
    for _ in range(2):
        begun = time.perf_counter()
        np.add(left, right, out=into)
        seconds = time.perf_counter() - begun
    return (left.nbytes + right.nbytes) / seconds


def available_memory() -> int | None:
    """Bytes that a process can have before the system swaps or kills; None where none tells."""
    found = [_of_machine(), _of_group()]
    known = [each for each in found if each is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _of_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container leaves: its limit less what it holds, of which file pages can be dropped."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        pages = sum(int(line.split()[1]) for line in lines if line.split()[0] in _DROPPED)
    except (OSError, ValueError, IndexError):
        return None
    return max(0, limit - used + pages)
