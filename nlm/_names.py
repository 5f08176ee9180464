"""The names of a model's entries: which are statistics, which match a pattern. Imports no torch."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def is_statistic(name: str) -> bool:
    """Whether an entry is a BatchNorm statistic: permuted, but no part of cost or task vectors."""
    return name.rpartition(".")[2] in _STATISTICS


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Patterns as a tuple; a plain string is one pattern, not its letters.

    Raises
    ------
    TypeError
        Neither a string nor several.
    """
    if not isinstance(patterns, Iterable):
        raise TypeError(f"nlm: patterns of names are strings, got {patterns!r}")
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Whether a name matches one of the shell-like patterns; "head" also stands for "head.*"."""
    return any(
        fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
        for pattern in as_patterns(patterns)
    )
