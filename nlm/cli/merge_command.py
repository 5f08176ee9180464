"""The work of ``nlm merge``. Imports no torch: where nothing is aligned, none is needed."""

import json as json_format
from dataclasses import asdict, replace
from pathlib import Path

from nlm.cli.check import show
from nlm.cli.progress import progress_bar
from nlm.recipe import (
    Opened,
    Rates,
    Recipe,
    RecipeError,
    check,
    forecast,
    measure_rates,
    open_all,
    read_recipe,
)
from nlm.recipe.execution import execute
from nlm.recipe.forecast import readable
from nlm.recipe.nodes import size_of
from nlm.streaming.ranks import Ranks


def run(
    file: Path,
    output: Path | None,
    memory: str,
    dry_run: bool,
    resume: bool,
    sync: bool,
    digest: bool,
    json: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Checks a recipe and merges what it names; every problem is told before any work.

    Raises
    ------
    nlm.recipe.RecipeError
        The recipe, or what it names, is wrong.
    """
    budget = size_of(memory)
    if budget is None:
        raise ValueError(f"nlm merge: --memory is bytes such as 512MiB, got {memory!r}")
    recipe = read_recipe(file)
    if output is not None:
        recipe = replace(recipe, output=replace(recipe.output, path=output))
    opened = open_all(recipe)
    if dry_run:
        if problems := check(recipe, opened, force=force):
            raise RecipeError(problems)
        show(forecast(recipe, opened), json, _rates(recipe, opened))
        return
    size = None
    if opened.start is not None and not opened.problems:
        expected = forecast(recipe, opened)
        size = expected.read + expected.written
    with (
        Ranks.of_environment() as ranks,
        progress_bar(quiet or not ranks.first, size) as progress,
    ):
        if opened.problems:
            raise RecipeError(check(recipe, opened, force=force))
        report = execute(
            recipe, memory=budget, resume=resume, force=force, sync=sync, digest=digest,
            progress=progress, ranks=ranks,
        )  # fmt: skip
    if not ranks.first:
        return
    if json:
        print(json_format.dumps({"output": str(recipe.output.path), **asdict(report)}, indent=1))
        return
    if report.complete:
        print(
            f"the output is complete, as the SHA-256 of {len(report.files)} files says: "
            f"{recipe.output.path}"
        )
        return
    rate = readable((report.read + report.written) / report.seconds)
    print(
        f"{report.tensors} tensors, {readable(report.written)} in {report.seconds:.1f} s "
        f"({rate} a second read and written); the output is {recipe.output.path}"
    )


def _rates(recipe: Recipe, opened: Opened) -> Rates:
    """Measured on the inputs, and where the output will be, or beside the recipe."""
    models = (opened.base, *opened.foundations.values(), *opened.experts.values())
    files = dict.fromkeys(file for each in models if each is not None for file in each.files)
    place = recipe.output.path or recipe.file or Path("here")
    return measure_rates(list(files), place.absolute().parent)
