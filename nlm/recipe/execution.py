"""What a recipe says, done: align the foundations, permute the experts, merge, correct, complete.

Checkpoints are streamed (:mod:`nlm.streaming`). Only alignment and correction hold models: those of
two foundations, and the merged one with all experts. Permuted experts, and the mean of the aligned
foundations, are files in a hidden folder beside the output until it is done. The correction works
in the hidden folder that becomes the output: a crash leaves the merge to be resumed.
"""

import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from nlm.checkpoint.partial import is_unfinished, own_folder, tidy
from nlm.recipe.check import check
from nlm.recipe.models import Models, Progress
from nlm.recipe.recipe import Recipe, RecipeError
from nlm.streaming import MEMORY, Report, run
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
    work = target.parent / f".{target.name}.work"
    if ranks.first and target.exists():
        tidy(target)
    if problems := check(recipe, force=force or (resume and is_unfinished(target))):
        raise RecipeError(problems)
    models = Models(recipe, work, memory, progress or (lambda what, share: None), ranks.first)
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                stack.enter_context(own_folder(work))
                models.open_calibration()
        models.align(ranks)  # one that fails ends, and the others see that
        with ranks.together():
            if ranks.first:
                plan = models.plan(target)
        if not ranks.first:
            plan = models.plan(target)
        text = recipe.file.read_text(encoding="utf-8") if recipe.file is not None else ""
        moved = ranks.gather(models.moved)[0]

        def complete(folder: Path, files: dict[str, Any]) -> None:
            models.complete(folder, plan, text, files)
            shutil.rmtree(work, ignore_errors=True)  # nothing is left beside an output with a name

        return run(
            plan, "\n".join([text or repr(recipe), *moved]), resume=resume, force=force,
            progress=progress, ranks=ranks, write_others=complete, **how,
        )  # fmt: skip
