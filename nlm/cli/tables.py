"""The tables of ``nlm demo``: normalised accuracy, average / worst over the tasks."""

from rich import box
from rich.table import Table

from nlm.cli.results import (
    CORRECTIONS,
    Results,
    score,
    sections,
    settings,
    shown_numbers_of_tasks,
)


def tables(results: Results) -> list[Table]:
    """One table for 4 tasks and one for the largest number; 80 columns are enough."""
    return [_table(results, tasks) for tasks in shown_numbers_of_tasks(results)]


def _table(results: Results, tasks: int) -> Table:
    table = Table(
        title=f"{tasks} tasks: normalised accuracy, average / worst",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("foundations")
    columns = settings(results)
    for words in columns.values():
        table.add_column(words, justify="right", no_wrap=True)
    for section in sections(results):
        for correction in section:
            cells = [_cell(results, setting, tasks, correction) for setting in columns]
            if any(cells):
                table.add_row(
                    CORRECTIONS.get(correction, correction), *(cell or "-" for cell in cells)
                )
        table.add_section()
    return table


def _cell(results: Results, setting: str, tasks: int, correction: str) -> str:
    scores = score(results, setting, tasks, correction)
    return f"{scores['average']:.3f} / {scores['worst']:.3f}" if scores else ""
