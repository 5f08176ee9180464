"""Writing in the background: one buffer is written from while the other is filled."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

WIDEST = 8  # bytes of an element in a buffer


class Writer:
    """Two buffers and a thread: one is written from while the other is filled."""

    def __init__(self, elements: int) -> None:
        self._arrays = [np.empty(elements * WIDEST, np.uint8) for _ in range(2)]
        self._pending: list[Future[Any] | None] = [None, None]
        self._at = 0
        self._pool = ThreadPoolExecutor(1)

    def free(self) -> np.ndarray:
        """The buffer to fill, uint8; waits until it has been written."""
        if (future := self._pending[self._at]) is not None:
            self._pending[self._at] = None
            future.result()
        return self._arrays[self._at]

    def view(self, size: int) -> memoryview:
        """The first bytes of the buffer to fill."""
        return self._arrays[self._at].data[:size]

    def submit(self, write: Callable[[memoryview], Any], view: memoryview) -> None:
        """Writes in the background; the other buffer is the next to fill."""
        self.free()
        self._pending[self._at] = self._pool.submit(_whole, write, view)
        self._at = 1 - self._at

    def wait(self) -> None:
        """Until all is written."""
        for _ in range(2):
            self.free()
            self._at = 1 - self._at

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()


def _whole(write: Callable[[memoryview], Any], view: memoryview) -> None:
    """Writes all bytes with a function that may write fewer."""
    while len(view):
        written = write(view)
        view = view[len(view) if written is None else written :]
