"""Tensor files that say in their metadata what they hold."""

import os
from typing import Any

from nlm.checkpoint import read_tensors


def read_kind(
    path: str | os.PathLike[str], kind: str, caller: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a file whose metadata entry "nlm" is ``kind``.

    Raises
    ------
    ValueError
        The file holds something else.
    """
    tensors, metadata = read_tensors(path)
    if (found := metadata.get("nlm", "another kind")) != kind:
        raise ValueError(f"{caller}: a file of {kind} is read, got {found} in {os.fspath(path)!r}")
    return tensors, metadata
