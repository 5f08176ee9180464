"""``nlm spec``: its commands and their options. Imports no torch: help is instant."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="spec", help="The permutation symmetries of a model, in a file.", no_args_is_help=True
)

_Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A folder with config.json, a config.json, a Hugging Face id that is in the local "
        "cache, or package.module:function that returns (model, example_inputs[, kwargs]).",
    ),
]
_File = Annotated[
    str, typer.Argument(metavar="FILE", help="A specification: JSON, YAML, or a shipped name.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
ModelClass = Annotated[
    str | None,
    typer.Option("--class", help="The class in transformers, where config.json is vague."),
]
_Random = Annotated[
    bool, typer.Option("--random", help="Prove on random weights where the source has none.")
]


@app.command()
def discover(
    source: _Source,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the specification here.")
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(help="Names of the outputs that count; repeat it for several."),
    ] = None,
    model_class: ModelClass = None,
    cache: Annotated[bool, typer.Option(help="Keep and reuse what was found.")] = True,
    force: Force = False,
) -> None:
    """Find what may be permuted in a model.

    From a configuration alone (no weights are read) the model is traced on meta tensors; then
    nothing is proven: nlm spec verify does that. A function's model is proven at once.
    """
    from nlm.cli.spec_commands import discover

    discover(source, output, outputs, model_class, cache, force)


@app.command()
def show(
    file: _File,
    html: Annotated[Path | None, typer.Option(help="Write a page with a drawing here.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Show layers that are alike each.")] = False,
    force: Force = False,
) -> None:
    """Show the groups of a specification, and draw them over the modules."""
    from nlm.cli.spec_commands import show

    show(file, html, every, force)


@app.command()
def verify(
    file: _File,
    source: _Source,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the proven specification here.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Random permutations of all groups.")] = 3,
    model_class: ModelClass = None,
    random: _Random = False,
    force: Force = False,
) -> None:
    """Prove a specification on a model with its weights; exit code 1 where it does not hold."""
    from nlm.cli.spec_commands import verify

    verify(file, source, output, seeds, model_class, random, force)


@app.command("import")
def import_(
    table: Annotated[Path, typer.Argument(help="axes_to_perm as YAML or JSON.")],
    weights: Annotated[
        Path, typer.Option(help="A safetensors file, or a folder of them: names and shapes.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Write the specification here.")],
    source: Annotated[
        str | None, typer.Option(help="Prove it on this model (a SOURCE as of discover).")
    ] = None,
    force: Force = False,
) -> None:
    """Make a specification of a Git Re-Basin table: a group or null per dimension of an entry."""
    from nlm.cli.spec_commands import import_table

    import_table(table, weights, output, source, force)


@app.command()
def export(
    file: _File,
    output: Annotated[Path, typer.Option("-o", "--output", help="Write the table here.")],
    force: Force = False,
) -> None:
    """Write a specification as a Git Re-Basin table, where it can be said in one."""
    from nlm.cli.spec_commands import export_table

    export_table(file, output, force)
