"""``nlm bench``: its commands and their options. Imports no torch: help is instant."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _RunByDefault(TyperGroup):
    """``nlm bench [OP]`` is ``nlm bench run [OP]``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="bench",
    cls=_RunByDefault,
    help="Time the operations beside stock PyTorch. `nlm bench [OP] [--peers]` is `nlm bench run`.",
)


@app.command()
def run(
    operation: Annotated[
        str | None, typer.Argument(metavar="OP", help="One operation; default: all.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Time the stock peers too.")] = False,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeat it for several numbers of threads.")
    ] = None,
    workload: Annotated[
        str, typer.Option(metavar="PART", help="Only workloads whose name contains this.")
    ] = "",
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each workload.")] = 3.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="One round of one workload each: does it run?")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Write the results here.", show_default="bench.json")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Check every workload against float64, then time it as a fraction of the machine's limit."""
    from nlm.cli.bench_commands import run

    run(operation, peers, threads or [], workload, seconds, quick, json, force)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD.json")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json")],
    worse: Annotated[
        float, typer.Option(min=1.0, help="How many times slower is a regression.")
    ] = 1.2,
) -> int:
    """Name what became slower between two runs on one machine; exit code 1 where something did.

    Times count in units of the machine's limit that the same run measured.
    """
    from nlm.cli.bench_compare import compare

    return compare(old, new, worse)
