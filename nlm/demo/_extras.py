"""The packages of the ``demo`` extra, imported when they are first needed."""

from importlib import import_module
from types import ModuleType


def require(module: str, package: str) -> ModuleType:
    """Return ``module``; where ``package`` is missing the error says how to install it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"nlm.demo: the demo needs {package}, got no such package: pip install nlm[demo]"
        ) from error
