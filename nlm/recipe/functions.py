"""Functions that a user names as ``package.module:function``. Imports no torch."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def find_function(text: str, what: str) -> Callable[[], Any]:
    """A function by its name; the module may lie in the working folder.

    Parameters
    ----------
    what : who names it and for what, for the message.

    Raises
    ------
    ValueError
        There is no such module, or no such function in it.
    """
    module, _, function = text.rpartition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        if _is_of_another(error, module):
            raise
        raise ValueError(
            f"{what} package.module:function exists, got {text!r} ({error})"
        ) from error
    if not callable(found):
        raise ValueError(f"{what} package.module:function is called, got {text!r}, a "
                         f"{type(found).__name__}")  # fmt: skip
    return found


def _is_of_another(error: Exception, module: str) -> bool:
    """Whether a package is missing that the module itself imports, not the module."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return name is not None and not f"{module}.".startswith(f"{name}.")
