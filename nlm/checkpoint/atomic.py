"""A file appears under its name complete, or not at all.

The bytes go to a temporary file in the same folder, which is flushed to the disk and renamed; a
rename within one folder is atomic, so that a reader sees the old file or the new one.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within, an error of the system that names no file names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8; an error names it."""
    with naming(path):
        path.write_text(text, encoding="utf-8")


def refuse_existing(path: str | os.PathLike[str], force: bool = False) -> Path:
    """The path, after checking that it may be written.

    Raises
    ------
    FileExistsError
        The path exists and ``force`` is false, or it is a folder.
    FileNotFoundError
        Its folder does not exist.
    """
    target = Path(path)
    if target.is_dir():
        raise FileExistsError(f"nlm: an output file must not be a folder, got {str(target)!r}")
    if target.exists() and not force:
        raise FileExistsError(
            f"nlm: an existing file is overwritten only with force (--force), got {str(target)!r}"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"nlm: the folder of an output file must exist, got {str(target.parent)!r}"
        )
    return target


@contextmanager
def atomic_path(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; renamed to ``path`` on success.

    On an exception the temporary file is removed and ``path`` is as it was. A file that came into
    being under ``path`` meanwhile is overwritten only with ``force``.
    """
    target = refuse_existing(path, force)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    try:
        with naming(target):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        refuse_existing(target, force)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system can open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
