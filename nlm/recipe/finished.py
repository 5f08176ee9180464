"""Outputs that are there already: whether one is what a recipe asks for, by identity and SHA-256.

The model card of a folder has the identity of the merge that wrote it (the recipe's text, its
inputs by size and time, nlm's version) and the digest of each file of tensors. A single file has no
card: it is merged once more, and compared.
"""

import hashlib
import time
from pathlib import Path

import nlm
from nlm.checkpoint.headers import Stamp, stamp
from nlm.checkpoint.shards import sha256_of
from nlm.recipe.opened import Opened, written_bytes, written_entries
from nlm.recipe.recipe import Recipe
from nlm.streaming import Report
from nlm.streaming.folder import read_card


def named_files(recipe: Recipe) -> dict[Path, Stamp]:
    """The files beside the models by which a merge is known again."""
    align, correct = recipe.align, recipe.correct
    named = [] if align is None else [align.spec, align.data]
    named += [] if correct is None else correct.data.values()
    named += [recipe.score, *(each.data for each in recipe.experts)]
    files = [Path(each) for each in named if each is not None]
    files += [each.permutation for each in recipe.experts if each.permutation is not None]
    return {file: stamp(file) for file in files if file.is_file()}


def identity(recipe: Recipe, text: str, opened: Opened) -> str:
    """What a merge is known by: the recipe, its inputs by size and time, and nlm's version."""
    models = [
        *opened.foundations.values(), *opened.experts.values(), *opened.curvatures.values(),
        *([] if opened.base is None else [opened.base]),
    ]  # fmt: skip
    stamps = named_files(recipe) | {f: s for model in models for f, s in model.stamps.items()}
    inputs = sorted((str(file.resolve()), of[2:]) for file, of in stamps.items())
    return hashlib.sha256(f"{text}\n{inputs}\n{nlm.__version__}".encode()).hexdigest()


def check_finished(target: Path, wanted: str) -> dict[str, str | None]:
    """The digests of the files of a folder that this very merge wrote before, all verified.

    Raises
    ------
    FileExistsError
        Another merge wrote it, or none; its files have no digests, or other ones.
    """
    found, digests = read_card(target)
    if found != wanted:
        whose = "one without a card of nlm" if found is None else "another"
        raise FileExistsError(
            f"nlm: an output that --resume finds is of the same recipe and the same inputs, got "
            f"{whose} in {str(target)!r} (--force replaces it)"
        )
    for name, digest in digests.items():
        if digest is None:
            raise FileExistsError(
                f"nlm: a finished output is verified by its SHA-256, got one that was made without "
                f"(--no-digest), {str(target)!r}"
            )
        if not (target / name).is_file() or sha256_of(target / name) != digest:
            raise FileExistsError(
                f"nlm: a finished output has the files of its card, got other bytes in "
                f"{str(target / name)!r} (--force makes it anew)"
            )
    return digests


def check_same_file(made: Path, target: Path) -> None:
    """Whether a single file is what the merge gives now.

    Raises
    ------
    FileExistsError
        It is another.
    """
    if sha256_of(made) != sha256_of(target):
        raise FileExistsError(
            f"nlm: a file that --resume finds is what the recipe gives, got other bytes in "
            f"{str(target)!r} (--force replaces it)"
        )


def report_of(
    recipe: Recipe, opened: Opened, digests: dict[str, str | None], begun: float
) -> Report:
    """What was done where there was nothing left to do."""
    start = opened.start
    assert start is not None
    models = {id(each): each for each in (*opened.experts.values(), start)}
    return Report(
        time.perf_counter() - begun,
        sum(entry.bytes for model in models.values() for entry in model.tensors.values()),
        written_bytes(recipe, start),
        len(written_entries(recipe, start)),
        digests,
        tuple(digests),
        complete=True,
    )
