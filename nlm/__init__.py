"""Non-local model merging: align, merge and correct experts of different foundation models.

The public names are imported when they are first used, so that ``import nlm`` costs nothing.
``nlm.align`` and ``nlm.merge`` are packages that can be called: ``nlm.align(...)`` is
``nlm.align.align(...)``.
"""

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_CALLABLE_ROOMS = ("align", "merge")
_FOLDERS = ("checkpoint", "correct", "gauge", "statistics", "symmetry")
_ROOMS = {"evaluate": "nlm.evaluate", "ops": "nlm.ops"} | {
    name: f"nlm.{name}" for name in _CALLABLE_ROOMS
}
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
    "align_many": "nlm.align",
    "info": "nlm._info",
    "linear_probe": "nlm.correct",
    "load": "nlm.loading",
    "merge_nonlocal": "nlm.pipeline",
    "refit": "nlm.correct",
    "reset_batch_norm": "nlm.correct",
    "trace": "nlm.symmetry",
}

__all__ = sorted([*_HOME, "__version__"])


class _CallableRoom(ModuleType):
    """A package that is also the function of its own name, with its documentation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self)(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        return signature(_function(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)


class _Package(ModuleType):
    """Makes a callable room of ``nlm.align`` and ``nlm.merge`` as their import binds them here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE_ROOMS and isinstance(value, ModuleType):
            value.__class__ = _CallableRoom
            function = _function(value)
            value.__doc__ = f"{name}{signature(function)}\n\n{function.__doc__}"
        super().__setattr__(name, value)


def _function(room: ModuleType) -> Any:
    return getattr(room, room.__name__.rpartition(".")[2])


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"nlm.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'nlm' has no attribute {name!r}")
    home = import_module(_HOME[name])
    value = home if name in _ROOMS else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
