"""docs/symmetry.md tells the truth: pictures and table are of what is shipped, its code runs."""

import re
import runpy
from pathlib import Path

import torch
from torch import nn

import nlm
from nlm.symmetry.handlers import HANDLERS

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "symmetry.md").read_text()


class Normed(nn.Module):
    """A hidden layer through the operation that the page defines."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)
        self.weight = nn.Parameter(torch.rand(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.ops.mine.unit_norm(self.up(x), self.weight))


def test_pictures_and_table_are_of_what_is_shipped() -> None:
    script = runpy.run_path(str(DOCS / "pictures.py"))
    assert script["filled"](PAGE) == PAGE
    for name in script["DRAWN"]:
        assert (DOCS / "pictures" / f"{name}.svg").read_text() == script["picture"](name)
        assert f"(pictures/{name}.svg)" in PAGE


def test_the_handler_of_the_page_frees_the_units(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    module = tmp_path / "mine.py"
    module.write_text(code)  # torch.library reads the source of a custom operation
    runpy.run_path(str(module))
    known = HANDLERS.pop("mine.unit_norm")
    without = nlm.trace(Normed(), torch.randn(4, 5))
    assert without.free == {} and without.opaque_ops == {"mine.unit_norm.default": 1}
    HANDLERS["mine.unit_norm"] = known
    try:
        spec = nlm.trace(Normed(), torch.randn(4, 5))
    finally:
        del HANDLERS["mine.unit_norm"]
    assert spec.proven and not spec.opaque_ops
    assert {str(layout) for layout in spec.params["weight"]} == {"g0:12"}


def test_the_commands_of_the_page_exist(capsys) -> None:
    from nlm.cli.app import run

    [block] = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines():
        _, room, command, *arguments = line.partition("#")[0].split()
        assert room == "spec" and run([room, command, "--help"]) == 0
        help_text = capsys.readouterr().out
        assert all(each in help_text for each in arguments if each.startswith("-"))
