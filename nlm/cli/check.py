"""``nlm check``: what is wrong with a recipe, or what it will read and write. Imports no torch."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from nlm.checkpoint.names import printable
from nlm.recipe import Forecast, Rates, RecipeError, forecast, open_all, read_recipe
from nlm.recipe import check as find


def check(file: Path, as_json: bool) -> None:
    """Prints the problems to stderr, or the forecast where there are none; with JSON, both."""
    expected = None
    try:
        recipe = read_recipe(file)
        opened = open_all(recipe)
        problems = find(recipe, opened)
        expected = None if problems else forecast(recipe, opened)
    except RecipeError as error:
        problems = list(error.problems)
    if as_json:
        content = None if expected is None else asdict(expected)
        print(json.dumps({"problems": problems, "forecast": content}, indent=2))
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    if problems:
        raise typer.Exit(1)
    if expected is not None and not as_json:
        show(expected)


def show(expected: Forecast, as_json: bool = False, rates: Rates | None = None) -> None:
    """Prints a forecast, as a table or as JSON; with rates also how long it takes."""
    if as_json:
        content = asdict(expected)
        if rates is not None:
            content |= {"seconds": expected.seconds(rates), "rates": asdict(rates)}
        print(json.dumps(content, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for row in expected.rows(rates):
        table.add_row(*map(printable, row))
    Console(highlight=False, markup=False).print(table)
