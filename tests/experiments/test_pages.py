"""Every page of an experiment names the commands that make it, and its pictures are there."""

import re
import shlex
from pathlib import Path

import _pages
import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "barriers", "corrections", "every_merge", "figures", "proteins", "questions", "refit",
    "transformer_tasks",
)  # fmt: skip
TABLES = ("faults", "many_models", "recovery", "support")  # nothing is drawn


@pytest.mark.parametrize("name", PAGES + TABLES)
def test_a_page_says_how_it_is_made(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text()
    [block] = re.findall(r"## Again\n\n```sh\n(.*?)```", text, flags=re.DOTALL)
    *experiments, maker = map(shlex.split, block.splitlines())
    for command in (*experiments, maker):
        assert command[0] == "python" and (ROOT / command[1]).is_file(), command
        for option in (each for each in command[2:] if each.startswith("--")):
            assert f'"{option}"' in (ROOT / command[1]).read_text()
    assert all("experiments" in command[1] for command in experiments) and len(maker) == 2
    pictures = re.findall(r"\(pictures/(.*?)\)", text)
    assert bool(pictures) == (name in PAGES)
    assert all((_pages.PICTURES / each).is_file() for each in pictures)


def test_a_picture_of_dots() -> None:
    panels = {"one": {"a": {"x": 0.1, "y": 0.5}}, "two": {"a": {"x": 0.3}, "b": {"y": 0.9}}}
    picture = _pages.dots(panels, "share", 1.0)
    assert picture.startswith(b"\x89PNG") and picture != _pages.dots(
        {"one": panels["one"]}, "share"
    )
    assert picture == _pages.dots(panels, "share", 1.0)
