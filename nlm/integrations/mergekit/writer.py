"""The host's writer of results, of which each goes to its file while the next one is computed.

The host holds a shard of up to 5 GB until it is full, and writes it then. Files, their names and
sizes and what they hold are the same; tensors lie in them in the order in which they came.
"""

import inspect
import itertools
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from mergekit.io import tasks
from mergekit.io.tensor_writer import TensorWriter
from torch import Tensor

from nlm.checkpoint.entries import TORCH_TYPES
from nlm.checkpoint.shards import Part, Shard, lay_out
from nlm.integrations import _host

log = logging.getLogger(__name__)

_NAMES = tuple(TORCH_TYPES.values())
_TYPES = {getattr(torch, name): kind for kind, name in TORCH_TYPES.items()}
_METADATA = {"format": "pt"}
_MOST_WAITING = 1 << 28  # bytes of tensors that are computed and not written yet
_ENTRY = 200  # bytes of a header for a tensor, beside its name
_PREFIX = 8


class Stream:
    """A safetensors file that is written as its tensors come, by a thread.

    Parameters
    ----------
    path : the file; until it is closed it has another name.
    room : bytes that are kept free for the header. Where it needs more, or where a wider type
        follows a narrower one and would lie askew, the file is copied once.
    """

    def __init__(self, path: Path, room: int) -> None:
        self._room = -(-room // 64) * 64
        self._path = path
        self._file = path.open("w+b", buffering=0)
        self._file.seek(self._room)
        self._parts: list[Part] = []
        self._sizes: list[int] = []
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor, which nobody writes to afterwards.

        Raises
        ------
        TypeError
            The format has no such type.
        OSError
            One before it could not be written.
        """
        if tensor.dtype not in _TYPES:
            raise TypeError(
                f"nlm.integrations.mergekit: a safetensors file holds {', '.join(_NAMES)}, got "
                f"{tensor.dtype} of {name!r}"
            )
        flat = tensor.detach().cpu().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy().data
        self._parts.append((name, _TYPES[tensor.dtype], tensor.shape))
        self._sizes.append(len(data))
        self._waiting.append((self._thread.submit(self._write, data), len(data)))
        while sum(size for _, size in self._waiting) > _MOST_WAITING:
            self._waiting.popleft()[0].result()

    def close(self, path: Path) -> None:
        """Ends the file under its name.

        Raises
        ------
        OSError
            It could not be written, and is gone.
        """
        try:
            while self._waiting:
                self._waiting.popleft()[0].result()
            shard = lay_out(path.name, self._parts, _METADATA)
            as_they_came = [entry.name for entry in shard.tensors] == [p[0] for p in self._parts]
            if as_they_came and len(shard.header) <= self._room:
                text = shard.header[_PREFIX:].ljust(self._room - _PREFIX)
                self._file.seek(0)
                self._write(memoryview(len(text).to_bytes(_PREFIX, "little") + text))
                os.replace(self._path, path)
            else:
                try:
                    self._copy(shard, path)
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Ends the thread, and removes what has no name yet."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _write(self, data: memoryview) -> None:
        while len(data):
            data = data[self._file.write(data) :]

    def _copy(self, shard: Shard, path: Path) -> None:
        """The tensors in another order, behind a header of another size."""
        ends = itertools.accumulate(self._sizes, initial=self._room)
        places = dict(zip([name for name, *_ in self._parts], ends, strict=False))
        with path.open("wb", buffering=0) as target:
            target.write(shard.header)
            for entry in shard.tensors:
                at, end = places[entry.name], places[entry.name] + entry.bytes
                while at < end:
                    at += os.sendfile(target.fileno(), self._file.fileno(), at, end - at)


class StreamedWriter(TensorWriter):
    """The host's writer, whose shards are :class:`Stream`."""

    _made: ClassVar[set[Stream]] = set()  # those that are open, of all writers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._streams: dict[int, Stream] = {}

    def save_tensor(self, name: str, tensor: Tensor, clone: bool = False) -> None:
        if not self.safe_serialization:
            super().save_tensor(name, tensor, clone)
            return
        with self._lock:
            full = self.current_shard_size + tensor.nbytes > self.max_shard_size > 0
            if self.current_shard and full:
                self._flush_current_shard()
            if self.shards_written not in self._streams:
                place = Path(self.out_path) / f".shard-{self.shards_written + 1}.partial"
                self._streams[self.shards_written] = stream = Stream(place, _room())
                self._made.add(stream)
            self._streams[self.shards_written].add(name, tensor)
            self.current_shard[name] = tensor.new_empty(0)  # its name is what counts
            self.current_shard_size += tensor.nbytes

    def _write_shard_task(
        self, shard_data: dict[str, Tensor], shard_index: int, shard_path: str
    ) -> None:
        if shard_index not in self._streams:
            super()._write_shard_task(shard_data, shard_index, shard_path)
            return
        stream = self._streams.pop(shard_index)
        self._made.discard(stream)
        stream.close(Path(shard_path))

    @classmethod
    def abandon(cls) -> None:
        """Removes what merges that failed have left."""
        while cls._made:
            cls._made.pop().abandon()


# What StreamedWriter takes of the host's writer and calls or replaces in it, beside public names.
_FIELDS = {
    "_lock", "current_shard", "current_shard_size", "max_shard_size", "out_path",
    "safe_serialization", "shards_written",
}  # fmt: skip
_CALLS = {
    "save_tensor": ["self", "name", "tensor", "clone"],
    "_flush_current_shard": ["self"],
    "_write_shard_task": ["self", "shard_data", "shard_index", "shard_path"],
}


def fits(writer: type) -> bool:
    """Whether a writer of the host is the one that :class:`StreamedWriter` was written for."""
    calls = {name: getattr(writer, name, None) for name in _CALLS}
    return _annotated(writer) >= _FIELDS and all(
        call is not None and list(inspect.signature(call).parameters) == _CALLS[name]
        for name, call in calls.items()
    )


def _annotated(kind: type) -> set[str]:
    """The names that a class itself annotates.

    From Python 3.14 on annotations are computed when asked for; those of which a name is known to
    type checkers alone are not, and do not fail here.
    """
    if sys.version_info >= (3, 14):
        from annotationlib import Format, get_annotations

        return set(get_annotations(kind, format=Format.FORWARDREF))
    return set(inspect.get_annotations(kind))


def _room() -> int:
    """Bytes for the header of a model twice as large as the largest one that is read."""
    loaders = tasks.LoaderCache().loaders.values()
    names = [sum(len(name) + _ENTRY for name in each.index.tensor_paths) for each in loaders]
    return 4096 + 2 * max(names, default=0)


def _replace() -> None:
    tasks.TensorWriter = StreamedWriter


def _restore() -> None:
    tasks.TensorWriter = TensorWriter
    StreamedWriter.abandon()


_switch = _host.Switch(_replace, _restore)


@contextmanager
def streamed() -> Iterator[None]:
    """Within it the host writes results as they come.

    A host whose writer is another than the one of 0.1.5, of which this uses names that are not
    public, writes as it does, and the log says so.
    """
    if not fits(TensorWriter):
        log.warning(
            "nlm.integrations.mergekit: results are streamed by the writer of mergekit 0.1.5, got "
            "another: the host's own holds a shard in memory until it is full"
        )
        yield
        return
    with _switch():
        yield
