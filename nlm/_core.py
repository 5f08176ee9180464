"""The compiled core as raw memory sees it: loads `nlm._C` and `nlm._C_cuda`. Imports no torch.

The only file that imports them. Both are optional: `cpu_missing` and `cuda_missing` say why one is
not there. nlm/_native.py is the way from tensors to it, nlm/streaming that from files.
"""

import os
from importlib import import_module
from typing import Any

#: Element types as csrc/core/view.h numbers them, by their names in safetensors.
DTYPES = {"F16": 0, "BF16": 1, "F32": 2, "F64": 3}

#: TIES' dialects: the positions are the values of csrc/sign_merge.h's SignDialect.
DIALECTS = ("global", "mergekit", "peft", "mergekit_sum")

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def _load(name: str) -> tuple[Any, str | None]:
    """The module (compiled: nothing is known of its types), or None and why it is missing.

    A module that is there and refuses the user's NLM_ISA must not be replaced in silence.
    """
    try:
        return import_module(f"nlm.{name}"), None
    except ModuleNotFoundError:
        return None, "not built"
    except ImportError as error:
        if "NLM_ISA" in str(error):
            raise
        return None, str(error)


cpu, cpu_missing = _load("_C")
cuda, cuda_missing = _load("_C_cuda")


def forked() -> bool:
    """Whether this is a forked child, where libgomp would hang with more than one thread."""
    return _forked


def threads() -> int:
    """Threads for one call: ``OMP_NUM_THREADS``, else the processors that this process may use;
    one in a forked child.
    """
    if _forked:
        return 1
    wished = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if wished.isdigit() and int(wished) > 0:
        return int(wished)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
