"""Tasks for small transformers: the demo's images, and four questions about text.

kind      Python code, C headers or prose (what ships with Python)
package   which of six packages of Python's library
order     text as it is, its words shuffled, or its characters in reverse
comment   code, or comments and docstrings

Windows of ``length`` characters start anywhere; validation and test draw from files (of prose and
headers: from a last eighth) that training and calibration never see.
"""

import io
import itertools
import random
import sysconfig
import tokenize
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from small_training import characters, encode, kinds_of_text, text, windows
from torch import Tensor

from nlm.demo.augmentation import stream
from nlm.demo.tasks import Sizes, Split, Task, make_task
from nlm.demo.world import load_glyphs

TEXT_TASKS = ("kind", "package", "order", "comment")
IMAGE_TASKS = ("digits", "upper", "cyrillic", "arrows")
PACKAGES = ("asyncio", "email", "lib2to3", "multiprocessing", "unittest", "xml")
ORDERS = ("as it is", "words shuffled", "reversed")

Sources = Mapping[str, tuple[Tensor, Tensor]]  # class -> text for training and text held out


def task(kind: str, name: str, seed: int, sizes: Sizes, length: int, files: int | None) -> Task:
    """The splits of one task of a kind of network; other seeds draw others."""
    if kind == "vit":
        return make_task(name, load_glyphs(), seed, sizes)
    if name == "order":
        train, other, _ = text(files)
        sources: Sources = dict.fromkeys(ORDERS, (train, other))
    else:
        sources = {"kind": _kinds, "package": _packages, "comment": _comments}[name](files)

    def draw(split: str, count: int) -> Split:
        generator = stream(seed, "text", name, split)
        held_out = split in ("validation", "test")
        labels = torch.randint(len(sources), (count,), generator=generator)
        inputs = torch.empty(count, length, dtype=torch.int64)
        for number, (which, both) in enumerate(sources.items()):
            at = labels == number
            drawn = windows(both[held_out], int(at.sum()), length, generator)
            inputs[at] = reordered(which, drawn, generator, files)
        return Split(inputs, labels)

    return Task(
        name,
        tuple(sources),
        train=draw("train", sizes.train),
        validation=draw("validation", sizes.validation),
        calibration=draw("calibration", sizes.calibration).inputs,
        test=draw("test", sizes.test),
    )


def reordered(which: str, drawn: Tensor, generator: torch.Generator, files: int | None) -> Tensor:
    """Windows whose words were shuffled (spaces stay), or which were reversed."""
    if which == "reversed":
        return drawn.flip(1)
    if which != "words shuffled" or not len(drawn):
        return drawn
    space = encode(b" ", files)[0]
    shuffled = drawn.clone()
    for row, own in zip(shuffled, drawn, strict=True):
        breaks = [-1, *(own == space).nonzero().flatten().tolist(), len(own)]
        words = [own[a + 1 : b] for a, b in itertools.pairwise(breaks)]
        order = torch.randperm(len(words), generator=generator).tolist()
        gap = own.new_tensor([space])
        parts = [part for index in order for part in (words[index], gap)]
        row.copy_(torch.cat(parts)[: len(row)])
    return shuffled


def _kinds(files: int | None) -> Sources:
    return dict(zip(("Python", "C header", "prose"), kinds_of_text(files), strict=True))


@cache
def _packages(files: int | None) -> Sources:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return {
        name: _split_by_file(sorted(folder.glob(f"{name}/**/*.py")), Path.read_bytes, files)
        for name in PACKAGES
    }


@cache
def _comments(files: int | None) -> Sources:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(folder.glob("*.py"))
    return {
        "code": _split_by_file(paths, lambda path: _part(path, False), files),
        "comment": _split_by_file(paths, lambda path: _part(path, True), files),
    }


def _part(path: Path, comments: bool) -> bytes:
    """What a file comments and documents, or its other lines."""
    lines = path.read_bytes().splitlines(keepends=True)
    told: set[int] = set()
    start = True
    for token in tokenize.tokenize(io.BytesIO(b"".join(lines)).readline):
        alone = token.line.lstrip().startswith(("#", '"', "'", 'r"'))
        if (token.type == tokenize.COMMENT and alone) or (token.type == tokenize.STRING and start):
            told.update(range(token.start[0] - 1, token.end[0]))
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            start = True
        elif token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.ENCODING):
            start = False
    return b"".join(line for number, line in enumerate(lines) if (number in told) == comments)


def _split_by_file(
    paths: list[Path], read: Callable[[Path], bytes], files: int | None
) -> tuple[Tensor, Tensor]:
    """The text of an eighth of the files, at least one, is held out."""
    paths = list(paths)
    random.Random(0).shuffle(paths)
    paths = paths[:files]
    held_out = max(1, len(paths) // 8)
    train, other = paths[held_out:], paths[:held_out]
    return tuple(encode(characters(map(read, part)), files) for part in (train, other))  # type: ignore[return-value]
