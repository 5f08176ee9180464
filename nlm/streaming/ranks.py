"""Several processes, on one machine or many, that merge one checkpoint together.

``torchrun --nproc-per-node 4 -m nlm merge recipe.yaml`` starts them; all must see the inputs and
the output under the same paths. Each writes files of the result of its own; the first one makes
the folder and gives it its name.
"""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

# Others wait as long as the first process aligns. One that dies is noticed at once, as its
# connections end; a machine that vanishes without a word, after this time.
_PATIENCE = timedelta(hours=6)


class Ranks:
    """The processes of a merge: this one alone, or those of torchrun, joined by gloo until the end
    of the ``with`` statement.

    Attributes
    ----------
    rank, size : the number of this process, from 0, and of all.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._group: Any = None
        if size > 1:
            from torch import distributed

            self._is_own = not distributed.is_initialized()
            # Its functions keep the group that there is as it is imported, in their defaults.
            import torch.distributed.nn  # noqa: F401

            try:
                if self._is_own:
                    distributed.init_process_group("gloo")
                self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
            except RuntimeError as error:  # of the store or of gloo
                if self._is_own and distributed.is_initialized():
                    distributed.destroy_process_group()
                raise RuntimeError(
                    f"nlm.streaming: the processes of a merge find one another as they begin, got "
                    f"process {rank} of {size} without the others: {error}"
                ) from error

    @classmethod
    def of_environment(cls) -> "Ranks":
        """The processes that torchrun started, else this one."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        if self._group is None:
            return
        try:
            if kind is None:
                self.gather(None)  # none leaves while another still hears it
        except RuntimeError as late:
            self._end(late)
            raise
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """Gives the group up; that of the caller, where it was there before, stays.

        With the last reference its threads end, here. One that lives on while the interpreter ends,
        and holds what Python has to free, aborts the process (pytorch#179291): so what the calls
        that failed still hold is freed too.
        """
        from torch import distributed

        _free_frames(error)
        group, self._group = self._group, None
        distributed.destroy_process_group(None if self._is_own else group)

    @property
    def group(self) -> Any:
        """Their group of torch.distributed; None where there is one process."""
        return self._group

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, for every process; waits for all."""
        if self._group is None:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:  # what gloo raises where a connection ends
            raise RuntimeError(self._gone()) from error
        return values

    def part(self, batches: list[Any], least: int | None = None) -> tuple[list[Any], Any]:
        """This process's part of some batches, and the group that reduces what is measured on them.

        Where there are fewer batches than processes the first one has them all, for itself.
        ``least`` stands for their number where several lists are shared alike.
        """
        if self.size == 1 or (len(batches) if least is None else least) < self.size:
            return (batches if self.first else []), None
        return batches[self.rank :: self.size], self._group

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """What fails inside as another process is gone is told as that."""
        try:
            yield
        except RuntimeError as error:
            if self._group is None or "gloo" not in str(error):
                raise
            raise RuntimeError(self._gone()) from error

    def _gone(self) -> str:
        return (
            f"nlm.streaming: the processes of a merge all live until its end, got one of "
            f"{self.size} that process {self.rank} no longer hears"
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Goes on when all processes have done what is inside.

        Raises
        ------
        RuntimeError
            Another process failed there.
        """
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):  # others may be gone; what failed here is what to say
                self.gather(f"{type(error).__name__}: {error}")
            raise
        self._check(self.gather(None))

    def told(self, value: Any = None) -> Any:
        """What the first process says to all, within :meth:`together`.

        Raises
        ------
        RuntimeError
            Another process has failed there.
        """
        values = self.gather((value,))
        self._check(values)
        return values[0][0]

    @staticmethod
    def _check(values: list[Any]) -> None:
        for rank, what in enumerate(values):
            if isinstance(what, str):  # which none says but one that fails
                raise RuntimeError(f"nlm.streaming: process {rank} failed: {what}")


def _free_frames(error: BaseException | None) -> None:
    """Forgets the variables of all calls that an error, or one before it, has ended."""
    left, seen = [error], set()
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            left += [each.__cause__, each.__context__]


def share(sizes: dict[str, int], ranks: Ranks) -> set[str]:
    """The names of this process, so that all have about as many bytes: the largest first."""
    loads = [0] * ranks.size
    own = set()
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        rank = loads.index(min(loads))
        loads[rank] += size
        if rank == ranks.rank:
            own.add(name)
    return own
