"""Merging checkpoints that need not fit in memory.

The tensors of all models are read where they lie in their files, chunk by chunk; a chunk of the
result is computed into one of two buffers while the other is being written. What the process holds
is a fixed number of buffers, whatever the size of the models.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import nlm
from nlm._names import is_statistic
from nlm.checkpoint.headers import ITEM_BYTES, Checkpoint, TensorEntry, check_unchanged
from nlm.checkpoint.mapping import MappedFiles
from nlm.checkpoint.partial import PartialCheckpoint
from nlm.checkpoint.shards import Shard
from nlm.streaming import kernels
from nlm.streaming.kernels import Block
from nlm.streaming.masks import write_masks
from nlm.streaming.methods import Buffers, Method, Piece, Ties, method_of
from nlm.streaming.plan import Plan, problems
from nlm.streaming.ranks import Ranks, share
from nlm.streaming.writer import WIDEST, Writer

Progress = Callable[[str, float], None]

_CHUNK = 1 << 20  # elements
_GROUP = kernels.GROUP  # a chunk begins with one


@dataclass
class Report:
    """How a merge went: wall seconds, bytes of the inputs and of the result, file -> SHA-256.

    ``read`` and ``written`` are bytes, ``tensors`` how many the result has.
    ``resumed`` are the files that were finished before; ``complete`` says that all were.
    """

    seconds: float
    read: int
    written: int
    tensors: int
    files: dict[str, str | None]
    resumed: tuple[str, ...] = ()
    complete: bool = False


def run(
    plan: Plan,
    recipe: str = "",
    *,
    resume: bool = False,
    force: bool = False,
    sync: bool = True,
    digest: bool = True,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    write_others: Callable[[Path, dict[str, Any]], None] | None = None,
    assist: Callable[[], None] | None = None,
) -> Report:
    """Merges checkpoints into a new one, which appears whole or not at all.

    Parameters
    ----------
    plan : the models, the method, its parameters and the place of the result.
    recipe : what is done, as text: a merge is resumed only with the same, of the same files.
    resume : takes up the finished files of a process that died.
    force : replaces an output that is there.
    sync : flushes to the disk before the output gets its name.
    digest : computes the files' SHA-256, without which nothing can be resumed.
    progress : called with what is being done and the share of bytes; may raise to stop.
    ranks : the processes that merge together, by default this one.
    write_others : called with the folder and what was written, file -> {"sha256": ...}, to add
        other files; what it changes in a file it changes there too. The first process calls it.
    assist : called by the others meanwhile.

    Raises
    ------
    ValueError
        The models do not go together, a parameter is out of range, or merged weights are not
        finite.
    RuntimeError
        There is no compiled core, an input changed, or another process writes the output.
    OSError
        A disk is full or fails. What was finished can be resumed.
    """
    begun = time.perf_counter()
    ranks = ranks or Ranks()
    kernels.check_core()
    if found := next(problems(plan), None):
        raise ValueError(f"nlm.streaming: {found}")
    method = method_of(plan.method, plan.value, plan.options)
    if method.needs_base and plan.base is None:
        raise ValueError(f"nlm.streaming: {plan.method!r} starts from a base, got none")
    models = [*plan.experts.values(), *plan.curvatures.values()]
    models = models if plan.base is None else [plan.base, *models]
    stamps = {str(file.resolve()): stamp[2:] for file, stamp in plan.stamps().items()}
    facts = (plan.method, plan.options, plan.heads, stamps, nlm.__version__, kernels.isa())
    identity = f"{recipe}\n{facts!r}"
    report = progress or (lambda what, share: None)
    with MappedFiles(models) as files, kernels.bus_errors_explained(files.places()):

        def opened(join: bool) -> PartialCheckpoint:
            return PartialCheckpoint(
                plan.output, plan.shards(), identity, resume=resume, force=force, sync=sync,
                digest=digest, join=join,
            )  # fmt: skip

        def complete(folder: Path) -> None:
            if plan.method == "tall_mask":
                write_masks(folder, plan)
            if write_others is not None:
                write_others(folder, written)
            check_unchanged(plan.stamps())

        with ranks.together():
            partial = opened(join=False) if ranks.first else None
        is_whole = ranks.gather(partial is not None and partial.named)[0]
        with ranks.together():  # none begins before all have seen what is finished
            partial = partial or (None if is_whole else opened(join=True))
        written = {} if partial is None else dict(partial.finished)
        resumed = tuple(written)
        if partial is not None and not partial.named:
            with _kept(partial, ranks):
                _Merge(plan, method, files, partial, report, ranks).all()
                with ranks.together():
                    check_unchanged(plan.stamps())
                partial.read_finished()
                written = dict(partial.finished)
                with ranks.together():
                    if ranks.first:
                        partial.commit(complete)
                    elif assist is not None:
                        assist()
    return Report(
        time.perf_counter() - begun,
        sum(entry.bytes for model in models for entry in model.tensors.values()),
        sum(shard.bytes for shard in plan.shards()),
        len(plan.entries()),
        {name: each["sha256"] for name, each in written.items()},
        resumed,
        is_whole,
    )


@contextmanager
def _kept(partial: PartialCheckpoint, ranks: Ranks) -> Iterator[None]:
    """Where what is inside fails, what was finished is left to be resumed."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            partial.read_finished()
        is_known = any(each["sha256"] for each in partial.finished.values())
        if is_known or not ranks.first:
            partial.release()
        else:
            partial.discard()
        raise


class _Merge:
    """One run: the plan, and what is open for it."""

    def __init__(
        self,
        plan: Plan,
        method: Method,
        files: MappedFiles,
        partial: PartialCheckpoint,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self.plan, self.method, self.files, self.partial = plan, method, files, partial
        self.progress, self.ranks = progress, ranks
        held = 2 + method.scratch + len(plan.experts)
        elements = min(_CHUNK, plan.memory // (WIDEST * held)) // _GROUP * _GROUP
        if elements == 0:
            raise ValueError(
                f"nlm.streaming: the memory holds {held} buffers of {_GROUP} elements, "
                f"{held * _GROUP * WIDEST} bytes, got {plan.memory}"
            )
        self.elements = elements
        self.buffers = Buffers(elements)
        # What another run had finished is the first process's.
        self.resumed = set(partial.finished) if ranks.first else set()
        left = {s.name: s.bytes for s in partial.shards if s.name not in partial.finished}
        self.own = share(left, ranks)
        self.total = sum(left[name] for name in self.own)
        self.done = 0

    def all(self) -> None:
        """Writes this process's share of the files, and again what all ballots decide."""
        with self.ranks.together():
            ballots = self._first_time()
        ties = self._ties()
        if ties is None:
            return
        for each in self.ranks.gather(ballots):
            ties.remember(each)
        again = set(self.method.again())
        with self.ranks.together():
            for shard in self.partial.shards:
                chosen = [entry for entry in shard.tensors if entry.name in again]
                if chosen and shard.name in self.own | self.resumed:
                    self.progress("votes of zero", 1.0)
                    self._write_again(shard, chosen)

    def _ties(self) -> Ties | None:
        return self.method if isinstance(self.method, Ties) else getattr(self.method, "ties", None)

    def _first_time(self) -> dict[str, list[int]]:
        """Writes the files; the ballots of all that are finished here."""
        if self.method.surveys:
            self.progress("thresholds", 0.0)
            merged = [e for e in self.plan.entries().values() if self.plan.is_merged(e)]
            with self._pieces(merged) as pieces:
                self.method.survey(pieces)
        for shard in self.partial.shards:
            if shard.name in self.own:
                self._write(shard)
                self.done += shard.bytes
        notes = self.partial.finished.values()
        return {name: ballot for each in notes for name, ballot in each["ballots"].items()}

    def _write(self, shard: Shard) -> None:
        file = self.partial.open(shard)
        try:
            with Writer(self.elements) as writer:
                done = self.done + len(shard.header)
                for entry in shard.tensors:
                    self.progress(entry.name, done / self.total)
                    for view in self._chunks(entry, writer):
                        writer.submit(file.write, view)
                        done += len(view)
                        self.progress(entry.name, done / self.total)
            ties = self._ties()
            ballots = {} if ties is None else ties.ballots()
            names = {entry.name for entry in shard.tensors}
            own = {name: ballot for name, ballot in ballots.items() if name in names}
            self.partial.finish(file, {"ballots": own})
        except BaseException:
            file.abandon()
            raise

    def _write_again(self, shard: Shard, chosen: Sequence[TensorEntry]) -> None:
        with Writer(self.elements) as writer, self.partial.reopen(shard) as file:
            for entry in chosen:
                file.seek(entry.begin)
                for view in self._chunks(entry, writer):
                    writer.submit(file.write, view)
                writer.wait()  # the place is the file's, not the writer's
            self.partial.renew(shard, file)

    def _chunks(self, target: TensorEntry, writer: "Writer") -> Iterator[memoryview]:
        """The bytes of one tensor of the result, in chunks that the writer's buffers hold."""
        source = self.plan.start.tensors[target.name]
        if not source.is_float:
            yield from self._copied(source)
            return
        with self._pieces([source]) as (piece,):
            if self.plan.is_merged(source):
                self.method.begin(piece, self.buffers)
            for begin in range(0, piece.size, self.elements):
                size = min(self.elements, piece.size - begin)
                block = Block(writer.free().ctypes.data, target.dtype)
                if self.plan.is_merged(source):
                    self._check_experts(piece, begin, size)
                    self.method.fill(piece, begin, size, block, self.buffers)
                    self._check_finite(target, block, size)
                else:
                    self._average(piece, begin, size, block)
                yield writer.view(size * ITEM_BYTES[target.dtype])

    def _copied(self, source: TensorEntry) -> Iterator[memoryview]:
        """An entry that is no weight: one for all models, or a statistic."""
        own = self.files.bytes(source)
        if not is_statistic(source.name):
            for task, expert in self.plan.experts.items():
                if not np.array_equal(self.files.bytes(expert.tensors[source.name]), own):
                    raise ValueError(
                        "nlm.streaming: entries that are not floating-point are one for all "
                        f"models, got other {source.dtype} values for {source.name!r} of {task!r}"
                    )
        yield own.data

    def _average(self, piece: Piece, begin: int, size: int, target: Block) -> None:
        """The experts' mean, in float64."""
        total = self.buffers.array("total", "F64", size)
        total[:] = 0
        for block in piece.experts.values():
            kernels.converted(block.at(begin), self.buffers.block("one", "F64"), size)
            np.add(total, self.buffers.array("one", "F64", size), out=total)
        np.divide(total, len(piece.experts), out=total)
        kernels.converted(self.buffers.block("total", "F64"), target, size)

    def _check_experts(self, piece: Piece, begin: int, size: int) -> None:
        """Whether experts are finite, for methods that leave some of their entries out."""
        for task, block in piece.experts.items() if self.method.selects else ():
            if not self._is_finite(block.at(begin), size):
                raise ValueError(
                    f"nlm.streaming: weights are finite, got NaN or inf in {piece.name!r} of "
                    f"{task!r}"
                )

    def _is_finite(self, block: Block, size: int) -> bool:
        if block.dtype != "F64":
            return math.isfinite(kernels.inner_products(None, [block], size).item())
        kernels.converted(block, self.buffers.block("one", "F64"), size)  # squares may overflow
        return bool(np.isfinite(self.buffers.array("one", "F64", size)).all())

    def _check_finite(self, entry: TensorEntry, block: Block, size: int) -> None:
        if not self._is_finite(block, size):
            raise ValueError(
                f"nlm.streaming: merged weights are finite, got NaN or inf in {entry.name!r} "
                f"({entry.dtype}){self._culprit(entry.name)}"
            )

    def _culprit(self, name: str) -> str:
        """Which of the inputs is not finite, in words."""
        models = {"the base": self.plan.start, **self.plan.experts}
        for who, model in models.items():
            with self._pieces([model.tensors[name]], only=model) as (piece,):
                (block,) = piece.experts.values()
                for begin in range(0, piece.size, self.elements):
                    size = min(self.elements, piece.size - begin)
                    kernels.converted(block.at(begin), self.buffers.block("one", "F64"), size)
                    if not np.isfinite(self.buffers.array("one", "F64", size)).all():
                        return f", as {who!r} has"
        return ", of finite inputs"

    @contextmanager
    def _pieces(
        self, entries: Sequence[TensorEntry], only: Checkpoint | None = None
    ) -> Iterator[list[Piece]]:
        """Tensors in the address space; their pages are given back at the end."""
        models = self.plan.experts if only is None else {"only": only}
        base = self.plan.base if only is None else None
        known = self.plan.curvatures if only is None else {}
        copies: list[np.ndarray] = []  # of tensors that do not lie as their type wants
        opened: list[TensorEntry] = []

        def block(model: Checkpoint, name: str) -> Block:
            entry = model.tensors[name]
            opened.append(entry)
            self.files.will_need(entry, 0, entry.bytes)
            address = self.files.address(entry)
            if entry.order is not None or address % ITEM_BYTES[entry.dtype]:
                copies.append(self.files.bytes(entry).copy())
                address = copies[-1].ctypes.data
            return Block(address, entry.dtype)

        yield [
            Piece(
                entry.name,
                entry.shape,
                None if base is None else block(base, entry.name),
                {task: block(model, entry.name) for task, model in models.items()},
                {t: block(f, entry.name) for t, f in known.items() if entry.name in f.tensors},
            )
            for entry in entries
        ]
        for entry in opened:
            self.files.done_with(entry)
