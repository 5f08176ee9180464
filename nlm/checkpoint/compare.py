"""Whether checkpoints go together, from their headers and configurations alone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nlm._names import matches
from nlm.checkpoint.headers import Checkpoint, TensorEntry

_FEW = 3


def differences(
    start: Checkpoint, other: Checkpoint, who: str, apart: Iterable[str] = ()
) -> Iterator[str]:
    """In what a checkpoint differs from the one that it is merged with, a sentence for each kind.

    Parameters
    ----------
    who : the other one, in words.
    apart : patterns of entries that each keeps for itself (heads): they may differ or be missing.
    """
    patterns = tuple(apart)
    ours, theirs = (_shared(each, patterns) for each in (start, other))
    for what, names in (
        ("missing", [name for name in ours if name not in theirs]),
        ("extra", [name for name in theirs if name not in ours]),
    ):
        if names:
            yield f"the models have the same entries, got {_few(names)} {what} in {who}"
    sizes = _vocabularies(start, other)
    both = [name for name in ours if name in theirs]
    shapes = [name for name in both if ours[name].shape != theirs[name].shape]
    of_words = [name for name in shapes if _by_words(ours[name], theirs[name], sizes)]
    if sizes is not None and sizes[0] != sizes[1]:
        where = f" ({_few(of_words)})" if of_words else ""
        yield (
            f"the models have the same vocabulary, got {sizes[1]} words in {who} and {sizes[0]} in "
            f"the start{where}: give them one tokenizer first"
        )
    if left := [name for name in shapes if name not in of_words]:
        name = left[0]
        more = f" (and {len(left) - 1} more)" if left[1:] else ""
        yield (
            f"the models have the same shapes, got {list(theirs[name].shape)} for {name!r}{more} "
            f"of {who} and {list(ours[name].shape)} in the start: name what each task keeps for "
            "itself as heads"
        )
    if kinds := [name for name in both if ours[name].is_float != theirs[name].is_float]:
        name = kinds[0]
        yield (
            f"an entry is a weight in all models or in none, got {theirs[name].dtype} for {name!r} "
            f"of {who} and {ours[name].dtype} in the start"
        )


def unmergeable(checkpoint: Checkpoint, apart: Iterable[str] = ()) -> list[str]:
    """The entries whose type is real but too small to compute in, or complex."""
    patterns = tuple(apart)
    return [
        name
        for name, entry in checkpoint.tensors.items()
        if entry.dtype.startswith(("F8", "C")) and not matches(name, patterns)
    ]


def _shared(checkpoint: Checkpoint, patterns: tuple[str, ...]) -> dict[str, TensorEntry]:
    return {n: entry for n, entry in checkpoint.tensors.items() if not matches(n, patterns)}


def _vocabularies(*checkpoints: Checkpoint) -> tuple[int, ...] | None:
    """The sizes of the vocabularies, where all configurations say them."""
    sizes = tuple(_vocabulary(each.config or {}) for each in checkpoints)
    return None if None in sizes else sizes  # type: ignore[return-value]


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    found = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return found if isinstance(found, int) else None


def _by_words(ours: TensorEntry, theirs: TensorEntry, sizes: tuple[int, ...] | None) -> bool:
    """Whether two shapes differ where one has a word for each entry, and nowhere else."""
    if sizes is None or len(ours.shape) != len(theirs.shape):
        return False
    pairs = zip(ours.shape, theirs.shape, strict=True)
    return {pair for pair in pairs if pair[0] != pair[1]} == {sizes}


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _FEW} more" if names[_FEW:] else ""
    return ", ".join(map(repr, names[:_FEW])) + more
