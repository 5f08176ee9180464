"""The work of ``nlm merge``."""

import json as json_format
from dataclasses import asdict
from pathlib import Path

from nlm.cli.check import show
from nlm.cli.progress import progress_bar
from nlm.recipe import RecipeError, check, plan, read_recipe, read_size
from nlm.recipe.execution import execute


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
    budget = read_size(memory, "nlm merge: --memory")
    recipe = read_recipe(file)
    if problems := check(recipe, output=output, force=force or resume):
        raise RecipeError(problems)
    if dry_run:
        show(plan(recipe), json)
        return
    with progress_bar(quiet) as progress:
        report = execute(
            recipe, output, memory=budget, resume=resume, force=force, sync=sync, digest=digest,
            progress=progress,
        )  # fmt: skip
    target = output or recipe.output.path
    if json:
        print(json_format.dumps({"output": str(target), **asdict(report)}, indent=1))
        return
    rate = (report.read + report.written) / report.seconds / 1e9
    print(
        f"{report.tensors} tensors, {report.written / 1e9:.2f} GB in {report.seconds:.1f} s "
        f"({rate:.2f} GB/s read and written); the output is {target}"
    )
