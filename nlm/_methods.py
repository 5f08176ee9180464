"""What the merge methods are, apart from tensors: their names, options and rules. Imports no torch.

:mod:`nlm.merge` applies them to tensors in memory, :mod:`nlm.streaming` to files.
"""

import hashlib
from typing import Any

from nlm._core import DIALECTS as DIALECTS

METHODS = (
    "linear", "slerp", "task_arithmetic", "model_stock", "ties", "dare", "dare_ties", "tall_mask",
    "consensus",
)  # fmt: skip

RESCALES = ("expected", "l1", "none")

#: option -> its default and the methods that read it
OPTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "scale": (1.0, ("task_arithmetic", "ties", "dare", "dare_ties", "consensus")),
    "density": (0.2, ("ties",)),
    "dialect": ("global", ("ties", "dare_ties")),
    "mask_threshold": (0.4, ("tall_mask", "consensus")),
    "agreement": (2, ("consensus",)),
    "drop": (0.9, ("dare", "dare_ties")),
    "seed": (None, ("dare", "dare_ties")),
    "rescale": ("expected", ("dare", "dare_ties")),
    "t": (0.5, ("slerp",)),
    "weights": (None, tuple(m for m in METHODS if m not in ("slerp", "model_stock"))),
}


def kept_entries(density: float, entries: int, dialect: str) -> int:
    """How many entries of so many TIES keeps.

    Raises
    ------
    ValueError
        An unknown dialect, or a density outside (0, 1].
    """
    if dialect not in DIALECTS:
        raise ValueError(
            f"nlm.merge: the TIES dialect is one of {', '.join(DIALECTS)}, got {dialect!r}"
        )
    if not 0 < density <= 1:
        raise ValueError(f"nlm.merge: a density lies in (0, 1], got {density}")
    kept = int(density * entries)
    return max(1, kept) if dialect.startswith("mergekit") else kept


def check_dropping(drop: float, seed: int | None, rescale: str) -> int:
    """The seed of DARE.

    Raises
    ------
    ValueError
        No seed, an unknown rescaling, or a share to drop outside [0, 1).
    """
    if seed is None:
        raise ValueError("nlm.merge: what is dropped at random has a seed, got none")
    if rescale not in RESCALES:
        raise ValueError(
            f"nlm.merge: the rescaling is one of {', '.join(RESCALES)}, got {rescale!r}"
        )
    if not 0 <= drop < 1:
        raise ValueError(f"nlm.merge: the share to drop lies in [0, 1), got {drop}")
    return seed


def tensor_seed(seed: int, task: str, name: str) -> int:
    """The seed of what is dropped from one tensor of one task, in [0, 2^63)."""
    text = "\0".join((str(seed), task, name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
