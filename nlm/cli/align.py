"""``nlm align``: its options. Imports no torch: help is instant."""

from pathlib import Path
from typing import Annotated

import typer

from nlm.cli.spec import Force, ModelClass

_Model = "a safetensors file (with --spec), a folder with config.json and weights, a Hugging Face "
_Model += "id that is in the local cache, or package.module:function"


def align(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The model that stays: {_Model}.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model whose units are permuted.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Write what was found here (safetensors).")
    ],
    spec: Annotated[
        str | None,
        typer.Option(help="A specification: JSON, YAML, or a shipped name. Default: traced."),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="By weights (the default without data).")
    ] = False,
    frank_wolfe: Annotated[
        bool,
        typer.Option(
            "--frank-wolfe",
            help="By weights, from where steps of all groups together lead: ten times as long.",
        ),
    ] = False,
    layerwise: Annotated[
        bool | None,
        typer.Option(
            "--layerwise/--no-layerwise",
            help="Where weights count: a second start, from where one layer after the other "
            "settles; the better end is kept, in twice the time. By weights alone the default is "
            "to try it where the first end is no clear one.",
        ),
    ] = None,
    orthogonal: Annotated[
        bool,
        typer.Option(
            "--orthogonal",
            help="By activations, and up to rotations of the residual stream and of the inside of "
            "heads: for pre-norm transformers.",
        ),
    ] = False,
    dual: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="By weights and, to this share, by activations, in one objective.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="By activations on this (the page shows the loss on it, where it has labels): a "
            "safetensors file of inputs by name, a text file (in "
            "the tokens of A's folder), or package.module:function that returns batches.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="How many samples of the data are used.")
    ] = None,
    stride: Annotated[
        int, typer.Option(min=1, help="By activations: one of so many positions is used.")
    ] = 1,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="By activations: at most so many of a batch.")
    ] = None,
    heads: Annotated[
        str, typer.Option(help="By activations: matched, monotonic (in order) or identity.")
    ] = "matched",
    residual: Annotated[
        str, typer.Option(help="By activations: seen at all, first or last, or left: identity.")
    ] = "all",
    seed: Annotated[int, typer.Option(min=0, help="Of the order of groups, of positions.")] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the figures of the alignment here.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write what the page shows here, for nlm report.")
    ] = None,
    model_class: ModelClass = None,
    force: Force = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Find the permutation of B's units that aligns it with A.

    In Python nlm.align.AlignmentResult.load reads it, and the specification applies it to B and to
    its experts. With --orthogonal, nlm.align.OrthogonalAlignment.load: .apply is for B and its
    experts, .fold for A and its own.
    """
    from nlm.cli.align_command import run

    asked = {
        "weights": weights,
        "frank-wolfe": frank_wolfe,
        "orthogonal": orthogonal,
        "dual": dual is not None,
    }
    chosen = [name for name, on in asked.items() if on]
    seen: dict[str, object] = {
        "stride": stride,
        "max_tokens": max_tokens,
        "heads": heads,
        "residual": residual,
        "layerwise": layerwise,
    }
    if dual is not None:
        seen["dual"] = dual
    run(
        a, b, output, spec, chosen, data, samples, seed, html, json, model_class, force, quiet, seen
    )  # fmt: skip
