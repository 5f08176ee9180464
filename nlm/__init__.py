"""Non-local model merging: align, merge and correct experts of different foundation models.

The public names are imported when they are first used, so that ``import nlm`` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ops": "nlm.ops",
    "info": "nlm._info",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nlm' has no attribute {name!r}")
    module = import_module(_HOME[name])
    value = module if _HOME[name] == f"nlm.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
