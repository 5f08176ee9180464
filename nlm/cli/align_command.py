"""The work of ``nlm align``. Files that may not be written are refused before it starts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nlm._results import Barrier
from nlm.align import AlignmentResult
from nlm.align import align as find
from nlm.checkpoint import atomic_path, read_tensors, refuse_existing
from nlm.checkpoint.names import printable
from nlm.cli.align_barriers import barriers
from nlm.cli.align_page import results
from nlm.cli.progress import Report, progress_bar
from nlm.cli.report import render
from nlm.cli.results import METHODS
from nlm.cli.spec_page import proof
from nlm.cli.spec_source import open_source
from nlm.recipe.data import open_data
from nlm.recipe.methods import BY_WEIGHTS
from nlm.symmetry import PermutationSpec
from nlm.symmetry.text import headline


@dataclass(frozen=True)
class _Side:
    """One of the two models; a file of weights has no module."""

    source: str
    state: Mapping[str, Tensor]
    model: nn.Module | None = None
    args: Any = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def run(
    a: str,
    b: str,
    output: Path,
    spec_file: str | None,
    chosen: list[str],
    data: str | None,
    samples: int | None,
    seed: int,
    html: Path | None,
    json_file: Path | None,
    model_class: str | None,
    force: bool,
    quiet: bool,
    seen: Mapping[str, Any],
) -> None:
    """Aligns two sources; writes what was found and the page, and prints it.

    By activations where there is data, else by weights, where no method is chosen. ``seen``: other
    options of :func:`nlm.align`.
    """
    method = chosen[0] if chosen else "weights" if data is None else "activations"
    if len(chosen) > 1 or (method in ("orthogonal", "dual") and data is None):
        given = [f"--{name}" for name in chosen]
        raise ValueError(
            f"nlm align: one method is chosen, --orthogonal and --dual with --data, got "
            f"{' '.join(given)}"
        )
    for target in (output, html, json_file):
        if target is not None:
            refuse_existing(target, force)
    seen = {"max_samples": samples, **seen}
    with progress_bar(quiet) as report:
        first, second = (_open(source, model_class, report) for source in (a, b))
        spec = _specification(spec_file, first, model_class, report)
        batches = None if data is None else _batches(data, first, second)
        found = _aligned(spec, first, second, method, batches, seed, report, seen)
        found.save(output, force)
        curves = None
        if batches is not None and (html is not None or json_file is not None):
            curves = _barriers(spec, first, second, found, batches, samples, report)
    page = results(spec, found.report, curves, a, b)
    for target, text in ((html, render), (json_file, json.dumps)):
        if target is not None:
            with atomic_path(target, force) as temporary:
                temporary.write_text(text(page), encoding="utf-8")
    _print(spec, found, curves)
    print(f"The alignment is {output}" + (f", the page is {html}" if html else ""))


def _open(source: str, model_class: str | None, report: Report | None) -> _Side:
    if report is not None:
        report(f"reading {source}", 0.0)
    if source.endswith(".safetensors"):
        return _Side(source, read_tensors(source)[0])
    model, args, kwargs = open_source(source, model_class).with_weights(random=False)
    return _Side(source, model.state_dict(), model, args, kwargs)


def _specification(
    file: str | None, side: _Side, model_class: str | None, report: Report | None
) -> PermutationSpec:
    """Of a file or traced; proven on A where A is a model."""
    if report is not None:
        report("finding and proving the symmetries", 0.05)
    if file is not None:
        spec = PermutationSpec.load(file)
    elif side.model is None:
        raise ValueError(f"nlm align: a file of weights needs --spec, got none for {side.source!r}")
    else:
        spec = open_source(side.source, model_class).trace(None, cache=True)
    if side.model is not None:
        spec.verify(side.model, side.args, side.kwargs)
    return spec


def _batches(data: str, first: _Side, second: _Side) -> list[Any]:
    if first.model is None or second.model is None:
        files = ", ".join(side.source for side in (first, second) if side.model is None)
        raise ValueError(f"nlm align: data needs two models to run on it, got weights in {files}")
    return open_data(data, first.model, first.source, "nlm align")


def _aligned(
    spec: PermutationSpec,
    first: _Side,
    second: _Side,
    method: str,
    data: list[Any] | None,
    seed: int,
    report: Report | None,
    seen: Mapping[str, Any],
) -> AlignmentResult:
    def progress(number: int, value: float) -> None:
        if report is not None:
            what = f"sweep {number}: {value:.6g}" if method in BY_WEIGHTS else f"batch {number}"
            report(what, 0.9 - 0.8 / (number + 1))

    if method in BY_WEIGHTS:
        return find(
            first.state, second.state, spec, method, seed=seed, layerwise=seen["layerwise"],
            progress=progress,
        )  # fmt: skip
    assert data is not None and first.model is not None and second.model is not None
    return find(
        first.model, second.model, spec, method, data=data, seed=seed, progress=progress, **seen
    )


def _barriers(
    spec: PermutationSpec,
    first: _Side,
    second: _Side,
    found: AlignmentResult,
    data: list[Any],
    samples: int | None,
    report: Report | None,
) -> Barrier | None:
    """The losses on the line between the models, before and after; None without labels."""
    if report is not None:
        report("the losses between the models", 0.92)
    assert first.model is not None
    here, there = found.moves(spec)
    pairs = {
        "not aligned": (first.state, second.state),
        "aligned": (here(first.state), there(second.state)),
    }
    return barriers(found.receiver(first.model), pairs, data, samples)


def _print(spec: PermutationSpec, found: AlignmentResult, curves: Barrier | None) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("group", "units", "for each of", "found at", "similarity of matched units"):
        table.add_column(column, justify="right" if column == "units" else "left")
    for name, similarity in found.report.correlation.items():
        group = spec.groups[name]
        how = " (by weights)" if name in found.report.by_weights else ""
        table.add_row(
            printable(name), str(group.size), printable(" x ".join(group.parents)),
            printable(group.origin), f"{similarity:.3f}{how}",
        )  # fmt: skip
    Console(highlight=False, markup=False).print(table)
    print(f"{headline(spec)}\n{proof(spec)}")
    method = METHODS.get(found.report.method, found.report.method)
    print(f"Aligned by {method} in {found.report.seconds:.1f} s.")
    if curves is not None:
        each = ", ".join(f"{value:.3g} {name}" for name, value in curves["barrier"].items())
        print(f"Barrier of the loss: {each}.")
