"""What a recipe says, done: align the foundations, permute the experts, merge, correct, complete.

Checkpoints are streamed (:mod:`nlm.streaming`). Only alignment and correction hold models: those of
two foundations, and the merged one with all experts. Permuted experts, and the mean of the aligned
foundations, are files in a hidden folder beside the output until it is done. The correction works
in the hidden folder that becomes the output: a crash leaves the merge to be resumed.
"""

import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from nlm.checkpoint.partial import is_unfinished, own_folder, tidy
from nlm.recipe.check import check
from nlm.recipe.finished import check_finished, check_same_file, identity, report_of
from nlm.recipe.models import Models, Progress
from nlm.recipe.opened import Opened, open_all, sentence_of
from nlm.recipe.recipe import Recipe, RecipeError
from nlm.streaming import MEMORY, Report, run
from nlm.streaming.folder import read_card
from nlm.streaming.ranks import Ranks


def execute(
    recipe: Recipe,
    output: Path | None = None,
    *,
    memory: int = MEMORY,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    **how: Any,
) -> Report:
    """Merges what a recipe names; the output appears whole or not at all.

    Parameters
    ----------
    output : instead of the recipe's.
    memory : bytes that the buffers of the merge may take; see :class:`nlm.streaming.Plan`.
    resume, force, progress, ranks : see :func:`nlm.streaming.run`, whose further arguments ``how``
        are. The first process aligns, permutes and corrects for all; on data all align
        together, each on its share of the batches.

    Raises
    ------
    RecipeError
        What :func:`nlm.recipe.check` finds.
    ValueError
        No output; and what :func:`nlm.streaming.run`, :func:`nlm.align` and the correction raise.
    """
    if output is not None:
        recipe = replace(recipe, output=replace(recipe.output, path=output))
    ranks = ranks or Ranks()
    target = recipe.output.path
    if target is None:
        raise ValueError("nlm.recipe: a merge has an output, got none (output.path, or --output)")
    target = Path(os.path.realpath(target))
    opened = open_all(recipe)
    text = recipe.text or _told(recipe)
    known = identity(recipe, text, opened)
    work = target.parent / f".{target.name}.work"
    with ranks.together():
        if ranks.first and target.exists():
            tidy(target)
    is_there = resume and not force and not opened.problems and _is_finished(target)
    if is_there and target.is_dir():
        with ranks.together():
            report = _finished(recipe, target, opened, known) if ranks.first else None
        return ranks.gather(report)[0]
    if is_there:
        return _compared(recipe, target, work, opened, memory, progress, ranks, how)
    if problems := check(recipe, opened, force=force or (resume and is_unfinished(target))):
        raise RecipeError(problems)
    models = Models(recipe, work, memory, progress or (lambda what, share: None), ranks)
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                stack.enter_context(own_folder(work))
            models.open_calibration()
        models.align()
        with ranks.together():
            if ranks.first:
                plan = models.plan(target)
        if not ranks.first:
            plan = models.plan(target)
        moved = ranks.gather(models.moved)[0]

        def complete(folder: Path, files: dict[str, Any]) -> None:
            models.complete(folder, plan, recipe.text, files, known)
            shutil.rmtree(work, ignore_errors=True)  # nothing is left beside an output with a name

        report = run(
            plan, "\n".join([text, *moved]), resume=resume, force=force,
            progress=progress, ranks=ranks, write_others=complete,
            assist=models.assist, **how,
        )  # fmt: skip
    if report.complete and target.is_dir():  # as they are since the correction
        report = replace(report, files=read_card(target)[1])
    return report


def _told(recipe: Recipe) -> str:
    """A recipe that was written in Python, wherever its output goes."""
    return repr(replace(recipe, output=replace(recipe.output, path=None)))


def _is_finished(target: Path) -> bool:
    """Whether an output has its name, and nothing lies beside it to be taken up."""
    is_partial = (target.parent / f".{target.name}.partial").exists()
    return target.exists() and not is_unfinished(target) and not is_partial


def _finished(recipe: Recipe, target: Path, opened: Opened, known: str) -> Report:
    """The report of a folder that is there, where it is this merge's and whole."""
    begun = time.perf_counter()
    try:
        digests = check_finished(target, known)
    except FileExistsError as error:
        raise FileExistsError(f"nlm: {recipe.where('output')}{sentence_of(error)}") from None
    return report_of(recipe, opened, digests, begun)


def _compared(
    recipe: Recipe,
    target: Path,
    work: Path,
    opened: Opened,
    memory: int,
    progress: Progress | None,
    ranks: Ranks,
    how: dict[str, Any],
) -> Report:
    """The report of a single file that is there, where the same merge gives it again."""
    begun = time.perf_counter()
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                stack.enter_context(own_folder(work))
        again = work / target.name
        report = execute(
            recipe, again, memory=memory, progress=progress, ranks=ranks, **{**how, "sync": False}
        )
        with ranks.together():
            if ranks.first:
                check_same_file(again, target)
    return report_of(recipe, opened, {target.name: next(iter(report.files.values()))}, begun)
