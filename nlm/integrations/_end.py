"""Ending a host's command line sooner: what a process holds goes back to the system as a whole."""

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending() -> Iterator[None]:
    """For what a program does last: where it succeeds the process ends with it, code 0.

    First what the interpreter does that can be seen from outside: threads are waited for, functions
    of :mod:`atexit` are called, what was printed is written. Then the process is left without
    freeing a million objects one by one, a quarter of the time that large hosts take to start. An
    error, or another code, takes the usual way. What runs a program within itself (a profiler) does
    not go on after it.
    """
    try:
        yield
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what libraries have printed
    os._exit(0)
