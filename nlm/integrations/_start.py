"""Starting a host's command line sooner: what a run does not need is not imported."""

import copy
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_lock = threading.Lock()  # held for a few assignments, never during an import


class Postponed(ModuleType):
    """A module that is imported when something of it is asked for; the same object afterwards.

    It is the import system that imports it then. So other threads wait for it as for any import,
    and of two threads whose imports need one another one goes on with what there is.
    """

    def __getattr__(self, name: str) -> Any:
        with _lock:
            if self.__dict__.pop("__waits__", False):
                sys.modules.pop(self.__name__, None)  # to be imported, and found by _Finder
        try:
            __import__(self.__name__)
        except BaseException:
            with _lock:
                sys.modules.setdefault(self.__name__, self)
                self.__dict__["__waits__"] = True
            raise
        if type(self) is Postponed:  # in the middle of its own import
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self, name)


class _Same(Loader):
    """Loads a module into an object that is there."""

    def __init__(self, module: Postponed, spec: ModuleSpec) -> None:
        assert spec.loader is not None
        self.module, self.spec, self.loader = module, spec, spec.loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        module.__class__ = ModuleType


class _Finder(MetaPathFinder):
    """Finds what was postponed, as often as it is imported until that succeeds."""

    def __init__(self) -> None:
        self.loaders: dict[str, _Same] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        loader = self.loaders.get(fullname)
        if loader is None or type(loader.module) is not Postponed:
            return None
        spec = copy.copy(loader.spec)
        spec.loader = loader
        return spec


_finder = _Finder()


def postpone(name: str) -> None:
    """Has a package that is there, and not imported yet, wait until it is needed."""
    if name in sys.modules or (spec := find_spec(name)) is None:
        return
    module = module_from_spec(spec)
    module.__class__ = Postponed
    module.__dict__["__waits__"] = True
    assert isinstance(module, Postponed)
    _finder.loaders[name] = _Same(module, spec)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
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
