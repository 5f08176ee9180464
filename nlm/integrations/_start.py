"""Starting a host's command line sooner: what a run does not need is not imported."""

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_loading = threading.RLock()


class Postponed(ModuleType):
    """A module that is imported when something of it is asked for; the same object afterwards.

    Other threads wait for it, outside the import system, which would see two threads whose imports
    need one another: no thread may ask for it first within an import that it needs itself. In a
    host's command the main thread is the first to.
    """

    def __getattr__(self, name: str) -> Any:
        with _loading:  # other threads wait; this one comes back here while the module runs
            if self.__dict__.pop("__waits__", False):
                try:
                    self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
                except BaseException:
                    self.__dict__["__waits__"] = True
                    raise
                self.__class__ = ModuleType  # type: ignore[assignment]
        if type(self) is Postponed:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self, name)


def postpone(name: str) -> None:
    """Has a package that is there, and not imported yet, wait until it is needed."""
    if name in sys.modules or (spec := find_spec(name)) is None:
        return
    module = module_from_spec(spec)
    module.__class__ = Postponed
    module.__dict__["__waits__"] = True
    sys.modules[name] = module


@contextmanager
def importing(*postponed: str) -> Iterator[None]:
    """Within it imports run without the collector of cycles, and do not wait for some packages.

    It finds nothing among a million objects that stay: a sixth of the time of large hosts.

    Parameters
    ----------
    postponed : packages that the host imports as wholes (``import peft``) and mostly does not use.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        for name in postponed:
            postpone(name)
        yield
    finally:
        if was_on:
            gc.enable()
