"""The work of ``nlm spec``. Files that may not be written are refused before the work starts."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from nlm.checkpoint import atomic_path, read_shapes, refuse_existing
from nlm.checkpoint.plain_yaml import parse_yaml
from nlm.cli.progress import progress_bar
from nlm.cli.spec_page import proof, render, tables
from nlm.cli.spec_source import Source, open_source
from nlm.symmetry import PermutationSpec
from nlm.symmetry.text import counted, headline

_PIPE_WIDTH = 200  # columns where no terminal says how many there are


def discover(
    source: str,
    output: Path | None,
    outputs: Sequence[str] | None,
    model_class: str | None,
    cache: bool,
    force: bool,
) -> None:
    """Traces a source; shows the specification, or writes it."""
    _refuse(output, force)
    with progress_bar(quiet=True):
        spec = open_source(source, model_class).trace(outputs, cache)
    if output is None:
        _print_tables(spec, fold=True)
    _finish(spec, output, force)


def show(file: str, html: Path | None, every: bool, force: bool) -> None:
    """Prints the tables of a specification and writes its page."""
    _refuse(html, force, file)
    with progress_bar(quiet=True):
        spec = PermutationSpec.load(file)
    _print_tables(spec, not every)
    print(f"{headline(spec)}\n{proof(spec)}")
    if html is not None:
        with atomic_path(html, force) as temporary:
            temporary.write_text(render(spec, Path(file).stem, not every), encoding="utf-8")
        print(f"The page is {html}")


def verify(
    file: str,
    source: str,
    output: Path | None,
    seeds: int,
    model_class: str | None,
    random: bool,
    force: bool,
) -> None:
    """Proves a specification on the model of a source."""
    _refuse(output, force)
    with progress_bar(quiet=True):
        spec = PermutationSpec.load(file)
        _prove(spec, open_source(source, model_class), seeds, random)
    _finish(spec, output, force)
    if output is None:
        print(f"{file} is as it was: -o FILE writes the specification with its proof")


def import_table(table: Path, weights: Path, output: Path, source: str | None, force: bool) -> None:
    """A specification of a table, with the shapes of a file of weights."""
    _refuse(output, force, str(table))
    with progress_bar(quiet=True):
        shapes = read_shapes(weights)
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        spec = PermutationSpec.from_axes_to_perm(_read_table(table), state)
        if source is not None:
            _prove(spec, open_source(source, None))
    _finish(spec, output, force)


def export_table(file: str, output: Path, force: bool) -> None:
    """The table of a specification."""
    _refuse(output, force, file)
    with progress_bar(quiet=True):
        table = PermutationSpec.load(file).to_axes_to_perm()
    content = {name: list(groups) for name, groups in table.items()}
    with atomic_path(output, force) as temporary:
        if output.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        else:
            temporary.write_text(
                yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)
            )
    print(f"{counted(len(content), 'entry', 'entries')}; the table is {output}")


def _prove(spec: PermutationSpec, source: Source, seeds: int = 3, random: bool = False) -> None:
    model, args, kwargs = source.with_weights(random)
    spec.verify(model, args, kwargs, seeds)


def _finish(spec: PermutationSpec, output: Path | None, force: bool) -> None:
    """The closing lines, after the specification was written."""
    if output is not None:
        spec.save(output, force)
    print(f"{headline(spec)}\n{proof(spec)}")
    if output is not None:
        print(f"The specification is {output}")


def _print_tables(spec: PermutationSpec, fold: bool) -> None:
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = Console(highlight=False, width=width, markup=False)
    for table in tables(spec, fold):
        console.print(table)


def _read_table(path: Path) -> dict[str, Any]:
    """A mapping of entries to one name or null per dimension."""
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"nlm spec: a table is a file, got {str(path)!r}")
    try:
        content = parse_yaml(path.read_text())  # JSON is YAML
    except ValueError as error:
        raise ValueError(
            f"nlm spec: a table is YAML or JSON, got {str(path)!r} ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(content, dict) or not all(
        groups is None
        or (
            isinstance(groups, list)
            and all(group is None or isinstance(group, str) for group in groups)
        )
        for groups in content.values()
    ):
        raise ValueError(
            f"nlm spec: a table is a mapping of entries to lists of a name or null per dimension, "
            f"got another form in {str(path)!r}"
        )
    return content


def _refuse(output: Path | None, force: bool, source: str | None = None) -> None:
    """Raises where an output may not be written, or is what the command reads."""
    if output is None:
        return
    if source is not None and output.resolve() == Path(source).resolve():
        raise ValueError(f"nlm spec: the input and the output are two files, got {source!r} twice")
    refuse_existing(output, force)
