"""Names that users choose, as names of files."""

import os
import unicodedata
from pathlib import Path

_LONGEST = 200  # bytes, of the 255 that file systems allow
# Controls, surrogates, separators of lines and paragraphs; what nobody has assigned.
_STEERING = {"Cc", "Cs", "Zl", "Zp", "Cn", "Co"}
_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}

# Signs without a picture by which two names would look alike: hyphens and spaces of no width, marks
# of annotations, tags. Joiners and marks of the direction are letters of some languages.
_UNSEEN = {0xAD, 0x200B, *range(0x2060, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFC)}
_UNSEEN |= {*range(0xE0000, 0xE0080)}


def file_name(name: str) -> str:
    """A file name for a name, another one for every other."""
    escaped = name.replace("%", "%25").replace("/", "%2F").replace("\\", "%5C")
    return escaped.replace(".", "%2E", 1) if escaped.startswith(".") else escaped


def wrong_name(name: str) -> str | None:
    """Why a name cannot be that of a file, in a sentence; None where it can."""
    if name and name.isprintable() and len(file_name(name).encode()) <= _LONGEST:
        return None
    shown = name if len(name) <= _LONGEST else f"{name[:40]}..."
    return f"a task's name is printable and at most {_LONGEST} bytes long, got {shown!r}"


def printable(text: str) -> str:
    """A text that others wrote, for a terminal or a page: what steers stands as its escape.

    Control characters move the cursor, rename the window or hide what follows, separators begin a
    line, overrides of the direction turn letters around, half a pair of UTF-16 can't be written,
    and signs without a picture make two names one to the eye. Other spaces, joiners and marks of
    the direction stay: names are written with them.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    return (
        unicodedata.category(character) in _STEERING
        or unicodedata.bidirectional(character) in _TURNING
        or ord(character) in _UNSEEN
    )


def lies_in(file: Path, folder: Path) -> bool:
    """Whether a file is one of a folder's own, in no folder within it."""
    return os.path.realpath(file.parent) == os.path.realpath(folder)


def contains(output: Path, file: Path) -> bool:
    """Whether a file is an output, or lies in the folder that it is."""
    outer, inner = (Path(os.path.realpath(each)) for each in (output, file))
    return inner == outer or outer in inner.parents
