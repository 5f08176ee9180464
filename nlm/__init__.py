"""Non-local model merging: align, merge and correct experts of different foundation models.

The public names are imported when they are first used, so that ``import nlm`` costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_ROOMS = {"evaluate": "nlm.evaluate", "ops": "nlm.ops"}
_HOME = {
    **_ROOMS,
    "AxisGroup": "nlm.symmetry",
    "CrossMoments": "nlm.statistics",
    "Merged": "nlm.merge",
    "Moments": "nlm.statistics",
    "MultiTaskModel": "nlm._multitask",
    "PermutationSpec": "nlm.symmetry",
    "Repair": "nlm.correct",
    "SymmetryError": "nlm.symmetry",
    "Tact": "nlm.correct",
    "align": "nlm.align",
    "info": "nlm._info",
    "linear_probe": "nlm.correct",
    "merge": "nlm.merge",
    "merge_nonlocal": "nlm.pipeline",
    "reset_batch_norm": "nlm.correct",
    "trace": "nlm.symmetry",
}

__all__ = sorted([*_HOME, "__version__"])

_FUNCTIONS_NAMED_AS_THEIR_ROOM = ("align", "merge")


class _Package(ModuleType):
    """``nlm.align`` and ``nlm.merge`` are the functions, also after their rooms were imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FUNCTIONS_NAMED_AS_THEIR_ROOM and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nlm' has no attribute {name!r}")
    home = import_module(_HOME[name])
    value = home if name in _ROOMS else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
