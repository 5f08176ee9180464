"""Writes the pages of the public names, reference/, and of the operations, kernels/.

    python docs/reference.py

A test fails where they are not what this script would write.
"""

import ast
import itertools
import re
import subprocess
import textwrap
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent

ROOMS = {
    "nlm.symmetry": "What may be permuted",
    "nlm.align": "Aligning",
    "nlm.merge": "Merging",
    "nlm.correct": "Correcting",
    "nlm.pipeline": "The whole way in one call",
    "nlm.evaluate": "Evaluating",
    "nlm.statistics": "Streamed statistics",
    "nlm.gauge": "Continuous symmetries",
    "nlm.checkpoint": "Files of weights",
    "nlm.recipe": "Recipes",
    "nlm.streaming": "Merging chunk by chunk",
    "nlm.report": "Reports",
    "nlm.integrations.mergekit": "mergekit",
    "nlm.integrations.fusion_bench": "FusionBench",
    "nlm.integrations.peft": "PEFT",
    "nlm.integrations.git_rebasin": "Git Re-Basin's functions",
    "nlm.integrations.zipit": "ZipIt's functions",
    "nlm.integrations.rebasin": "rebasin's classes",
    "nlm.integrations.sd_mecha": "sd-mecha",
}
WITHOUT_ALL = {
    "nlm.pipeline": ("merge_nonlocal", "align_experts", "choose", "Aligned", "Choice"),
    "nlm.report": ("Report", "merge_report"),
}
PLACES = {
    "front room": "nlm/ops/{}.py",
    "C++": "csrc/{}.cpp",
    "CUDA": "csrc/{}.cu",
    "Triton": "kernels/{}.py",
    "tests": "tests/ops/test_{}.py",
    "benchmark": "benchmarks/bench_{}.py",
}


def pages() -> dict[str, str]:
    """Name of a file below docs/ -> its text."""
    found = {"reference/index.md": _index()}
    found |= {f"reference/{room}.md": _room(room) for room in ROOMS}
    stems = operations()
    found["kernels/index.md"] = _kernels(stems)
    return found | {f"kernels/{stem}.md": _kernel(stem) for stem in stems}


def names(room: str) -> list[str]:
    """The public names of a room that have a docstring of their own."""
    if ".integrations." in room:  # the host need not be there
        return [name for name in _listed(room) if not name.isupper()]
    known = WITHOUT_ALL.get(room) or import_module(room).__all__
    module = import_module(room)
    return [name for name in known if callable(getattr(module, name))]


def _listed(room: str) -> list[str]:
    """``__all__`` of a module that is not imported."""
    path = ROOT.joinpath(*room.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    [found] = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    return ast.literal_eval(found)


def operations() -> list[str]:
    """The stems of the operations, as their files stand in the front room."""
    files = sorted((ROOT / "nlm" / "ops").glob("[!_]*.py"))
    return [path.stem for path in files]


def _index() -> str:
    import nlm

    lines = [
        "# Reference", "",
        "The names of the package itself, and the room that each is from:", "",
        "| name | room |", "|---|---|",
    ]  # fmt: skip
    for name in nlm.__all__:
        if name.startswith("_"):
            continue
        room = getattr(getattr(nlm, name), "__module__", None) or f"nlm.{name}"
        room = f"nlm.{name}" if f"nlm.{name}" in ROOMS else room  # a package that can be called
        known = next((each for each in ROOMS if room.startswith(each)), None)
        told = f"[{known}]({known}.md)" if known else "below"
        if name == "ops":
            told = "[operations](../kernels/index.md)"
        lines.append(f"| `nlm.{name}` | {told} |")
    own = [name for name in ("info", "load", "MultiTaskModel") if name in nlm.__all__]
    homes = {name: getattr(nlm, name).__module__ for name in own}
    return "\n".join([*lines, "", *(f"::: {homes[name]}.{name}\n" for name in own)])


def _room(room: str) -> str:
    lines = [f"# {ROOMS[room]}", "", f"`{room}`", "", f"::: {room}"]
    lines += ["    options:", "      members: false", "      show_root_heading: false", ""]
    return "\n".join([*lines, *(_entry(f"{room}.{name}") for name in names(room))])


def _entry(name: str) -> str:
    """A name's; a function whose module has its name is found behind that."""
    if place(name) == name:
        return f"::: {name}\n"
    options = f"      heading: {name}\n      toc_label: {name.rpartition('.')[2]}\n"
    return f"::: {place(name)}\n    options:\n{options}"


def place(name: str) -> str:
    """The full name of what a name of a room stands for."""
    path = ROOT.joinpath(*name.split("."))
    room = path.parent / "__init__.py"
    is_function = path.with_suffix(".py").exists() and room.exists()
    is_function &= f'"{path.name}"' in room.read_text() if is_function else False
    return f"{name}.{path.name}" if is_function else name


def _kernels(stems: list[str]) -> str:
    lines = ["# Operations", "", "One stem in every room, and one page each:", ""]
    lines += ["| operation | |", "|---|---|"]
    rows = [f"| [`{stem}`]({stem}.md) | {_first_line(stem)} |" for stem in stems]
    return "\n".join([*lines, *rows, ""])


def _first_line(stem: str) -> str:
    """What an operation is, as its front room begins."""
    source = (ROOT / "nlm" / "ops" / f"{stem}.py").read_text()
    told = ast.get_docstring(ast.parse(source)) or ""
    return told.partition("\n\n")[0].replace("\n", " ")


def _kernel(stem: str) -> str:
    tracked = set(
        subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    )
    places = [
        f"{what} `{path}`"
        for what, pattern in PLACES.items()
        if (path := pattern.format(stem)) in tracked
    ]
    return "\n".join([
        f"# {stem}", "", "; ".join(places) + ".", "",
        f"::: nlm.ops.{stem}", "    options:", "      show_root_heading: false", "",
        *_explained(stem),
    ])  # fmt: skip


def _explained(stem: str) -> list[str]:
    """How each kernel works, as its file begins."""
    bodies = sorted((ROOT / "csrc").glob(f"{stem}*_body.h"))
    triton, cuda = ROOT / "kernels" / f"{stem}.py", ROOT / "csrc" / f"{stem}.cu"
    lines = ["## On a CPU", "", *_told(ROOT / "csrc" / f"{stem}.cpp"), "## On a GPU", ""]
    found = [path for path in (triton, cuda, *bodies) if path.exists()]
    for path in found:
        lines += _told(path)
    none = "No kernel of its own: tensors there go through the reference."
    return lines if found else [*lines, none, ""]


def _told(path: Path) -> list[str]:
    """The text that a file begins with, in Markdown: formulas and lists as they stand."""
    source = path.read_text()
    if path.suffix == ".py":
        comment = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    else:
        head = itertools.takewhile(lambda line: line.startswith("//"), source.splitlines())
        comment = [line[2:].removeprefix(" ") for line in head]
    lines = [f"`{path.relative_to(ROOT)}`:", ""]
    for is_plain, group in itertools.groupby(_blocks(comment), lambda block: block[0]):
        for _, block in group:
            text = "\n".join(block)
            fenced = f"```text\n{textwrap.dedent(text)}\n```"
            lines += [_escaped(text) if is_plain else fenced, ""]
    return lines


def _blocks(comment: list[str]) -> list[tuple[bool, list[str]]]:
    """Runs of lines, and whether they are prose: what is indented stays as it is."""
    found: list[tuple[bool, list[str]]] = []
    for paragraph in "\n".join(comment).split("\n\n"):
        lines = [line for line in paragraph.split("\n") if line]
        for is_plain, run in itertools.groupby(lines, lambda line: not line.startswith("  ")):
            found.append((is_plain, list(run)))
    return found


def _escaped(text: str) -> str:
    """Prose of a comment, in which only backticks and ``*Words*`` are markup."""
    text = re.sub(r":\w+:(`[^`]+`)", r"\1", text)
    parts = re.split(r"(``.+?``|`.+?`|\*\w+\.?\*)", text, flags=re.DOTALL)
    plain = [re.sub(r"([\\*_\[\]>#])", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [part.replace("<", "&lt;") for part in plain]
    return "".join(parts)


def main() -> None:
    for name, text in pages().items():
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
