"""``nlm merge`` and ``nlm restore``: their options. Imports no torch: help is instant."""

from pathlib import Path
from typing import Annotated

import typer

from nlm.cli.spec import Force


def merge(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file: nlm's own, or mergekit's.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="A folder or a .safetensors file, instead of the recipe's."
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="What the buffers may take, such as 512MiB.")
    ] = "512MiB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, say what would be done, and stop.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Take up what a killed merge had finished; verify what is complete."
        ),
    ] = False,
    sync: Annotated[
        bool, typer.Option("--sync/--no-sync", help="Flush to the disk before the end.")
    ] = True,
    digest: Annotated[
        bool,
        typer.Option("--digest/--no-digest", help="Take the files' SHA-256, as --resume needs."),
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    force: Force = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Merge the checkpoints that a recipe names, in memory of a fixed size.

    The output appears whole or not at all. Foundations are aligned and experts permuted first, and
    the result is corrected, where the recipe says so: these hold whole models.
    """
    from nlm.cli.merge_command import run

    run(recipe, output, memory, dry_run, resume, sync, digest, json, force, quiet)


def restore(
    folder: Annotated[
        Path, typer.Argument(metavar="MERGED", help="A folder that the method tall_mask wrote.")
    ],
    task: Annotated[str, typer.Argument(metavar="TASK", help="An expert of the recipe.")],
    base: Annotated[Path, typer.Option("--base", help="The base of that merge.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder or .safetensors file.")],
    force: Force = False,
) -> None:
    """Write one task's checkpoint from the masks beside a merged one.

    Another base than the merge's is refused.
    """
    from nlm.streaming import write_task

    write_task(folder, base, task, output, force=force)
    print(f"the checkpoint of {task} is {output}")
