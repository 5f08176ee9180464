"""What the integrations share: which host they fit, and what an alignment may be given as."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlm.align import AlignmentResult
    from nlm.symmetry import Permutation


def check(where: str, host: str, oldest: str, too_new: str) -> None:
    """Raises ImportError, in one sentence, where there is no host that an integration fits.

    Parameters
    ----------
    where : the integration. host : the distribution.
    oldest, too_new : its versions, from the one and below the other.
    """
    try:
        found = metadata.version(host)
    except metadata.PackageNotFoundError:
        found = "no such package"
    else:
        from packaging.version import Version

        if Version(oldest) <= Version(found) < Version(too_new):
            return
    wanted = f"{host}>={oldest},<{too_new}"
    raise ImportError(f"{where}: the host must be {wanted}, got {found}: pip install {wanted!r}")


class Switch:
    """Something of a host that is replaced as long as any context is open, in any thread."""

    def __init__(self, on: Callable[[], None], off: Callable[[], None]) -> None:
        self._on, self._off = on, off
        self._lock, self._open = threading.Lock(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._open == 0:
                self._on()
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    self._off()


def permutation_of(
    where: str, alignment: "AlignmentResult | Permutation | str | os.PathLike[str] | Any"
) -> "Permutation":
    """The permutation of an alignment: of what ``nlm align`` wrote or ``nlm.align`` returned.

    Raises
    ------
    ValueError
        It is an orthogonal one, which is no permutation alone.
    """
    from nlm.align import AlignmentResult, OrthogonalAlignment

    if isinstance(alignment, Mapping):
        return dict(alignment)
    found = alignment
    if not isinstance(found, AlignmentResult):
        found = AlignmentResult.load(found)
    if isinstance(found, OrthogonalAlignment):
        raise ValueError(f"{where}: an alignment is a permutation alone, got one with rotations")
    return found.permutation
