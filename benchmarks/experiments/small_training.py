"""How the small transformers of the barriers are trained, and the data that they are trained on.

The text is what ships with Python, split by file: its library is what the language models learn,
and telling three kinds of text apart (code, C headers, prose) is what a language model is
fine-tuned for. The images are the demo's letters; a vision model is fine-tuned for Greek ones.
"""

import random
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from small_transformers import Size, Transformer, bert, gpt, pooled, vit
from torch import Tensor
from torch.nn import functional

from nlm.demo import cache as kept
from nlm.demo.tasks import Split
from nlm.demo.training import Recipe, fit
from nlm.demo.world import load_glyphs

LEFT_OUT = ("site-packages", "/test", "/encodings/", "pydoc_data", "idlelib")
MASKED = 0.3  # of the characters, for the masked model
LETTERS, GREEK = "letters", "greek"  # 52 and 24 classes


@dataclass(frozen=True)
class Settings:
    """What is trained and on how much it is compared; ``files`` bounds the text."""

    recipe: Recipe
    size: Size
    steps: int
    tuning: Recipe | None = None  # None: not fine-tuned
    tuning_steps: int = 0
    length: int = 64
    calibration: int = 400
    evaluation: int = 192
    one_by_one: int = 16  # windows of the pseudo-perplexity
    points: int = 21
    files: int | None = None


def recipe(learning_rate: float, batch: int) -> Recipe:
    return Recipe(1, learning_rate, weight_decay=0.1, batch=batch, clip=1.0)


SETTINGS = {
    "gpt": Settings(recipe(2e-3, 32), Size(128, 4, 4, 512), steps=2100),
    "bert": Settings(
        recipe(3e-3, 32), Size(64, 4, 4, 256), steps=3000, tuning=recipe(3e-4, 32), tuning_steps=200
    ),
    "vit": Settings(
        recipe(2e-3, 128), Size(64, 4, 4, 256), steps=500, calibration=1600, evaluation=300,
        tuning=recipe(5e-4, 128), tuning_steps=150,
    ),
}  # fmt: skip


def quick(settings: Settings) -> Settings:
    """The same with next to no training and data."""
    return replace(
        settings, recipe=replace(settings.recipe, batch=8), steps=4, size=Size(16, 1, 2, 24),
        tuning=settings.tuning and replace(settings.tuning, batch=8), tuning_steps=2,
        length=16, calibration=60, evaluation=20, one_by_one=2, points=3, files=40,
    )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A network to train, and how inputs and targets are drawn, from held-out data or not."""

    build: Callable[[], Transformer]
    draw: Callable[[int, torch.Generator, bool], tuple[Tensor, Tensor]]
    digest: str


def task_of(kind: str, settings: Settings) -> Task:
    """What a network of a kind learns first."""
    if kind == "vit":
        return _images(LETTERS, settings)
    train, other, characters = text(settings.files)

    def draw(count: int, generator: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor]:
        found = windows(other if held_out else train, count, settings.length + 1, generator)
        if kind == "gpt":
            return found[:, :-1], found[:, 1:]
        found = found[:, 1:]
        hidden = torch.rand(found.shape, generator=generator) < MASKED
        return found.masked_fill(hidden, characters), found.masked_fill(~hidden, -100)

    build = {"gpt": gpt, "bert": bert}[kind]
    return Task(
        lambda: build(characters, settings.length, settings.size),
        draw,
        kept.digest({"train": train, "held out": other}),
    )


def tuning_of(kind: str, settings: Settings) -> Task:
    """What it is fine-tuned for."""
    if kind == "vit":
        return _images(GREEK, settings)
    *_, characters = text(settings.files)
    sources = kinds_of_text(settings.files)

    def draw(count: int, generator: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor]:
        labels = torch.randint(len(sources), (count,), generator=generator)
        inputs = torch.empty(count, settings.length, dtype=torch.int64)
        for number, parts in enumerate(sources):
            at = labels == number
            inputs[at] = windows(parts[held_out], int(at.sum()), settings.length, generator)
        return inputs, labels

    parts = {
        f"{number} {held_out}": part
        for number, both in enumerate(sources)
        for held_out, part in enumerate(both)
    }
    return Task(
        lambda: pooled(bert(characters, settings.length, settings.size), len(sources)),
        draw,
        kept.digest(parts),
    )


def _images(alphabet: str, settings: Settings) -> Task:
    glyphs = load_glyphs()
    classes = len(glyphs.alphabets[alphabet])
    return Task(
        lambda: vit(classes, settings.size),
        lambda count, generator, held_out: glyphs.draw(alphabet, count, generator),
        kept.digest(glyphs.tensors()),
    )


def windows(source: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Stretches of a text that start anywhere, int64 [count, length]."""
    starts = torch.randint(len(source) - length, (count, 1), generator=generator)
    return source[starts + torch.arange(length)].long()


@cache
def text(most: int | None) -> tuple[Tensor, Tensor, int]:
    """The training text, the held-out text and the number of characters."""
    train, other = (characters(contents) for contents in _files(most))
    return encode(train, most), encode(other, most), len(_known(most))


@cache
def kinds_of_text(most: int | None) -> list[tuple[Tensor, Tensor]]:
    """Code, C headers and prose (the topics of Python's help), each for training and held out."""
    found = [text(most)[:2]]
    headers = sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h"))
    for contents in (map(Path.read_bytes, headers), map(str.encode, topics.values())):
        whole = encode(characters(contents), most)
        cut = len(whole) - len(whole) // 8
        found.append((whole[:cut], whole[cut:]))
    return found


@cache
def _files(most: int | None) -> tuple[list[bytes], list[bytes]]:
    """The files of Python's library, for training and held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in folder.rglob("*.py") if not any(x in str(p) for x in LEFT_OUT))
    random.Random(0).shuffle(files)
    contents = [path.read_bytes() for path in files[:most]]
    held_out = len(contents) // 8
    return contents[held_out:], contents[:held_out]


@cache
def _known(most: int | None) -> list[int]:
    """The bytes that the files of the library have."""
    return torch.unique(torch.cat([characters(contents) for contents in _files(most)])).tolist()


def characters(contents: Iterable[bytes]) -> Tensor:
    """Lower-cased printable ASCII and line feeds, uint8."""
    values = torch.frombuffer(bytearray(b"\n".join(contents).lower()), dtype=torch.uint8)
    return values[(values == 10) | ((values >= 32) & (values < 127))]


def encode(values: Tensor | bytes, most: int | None) -> Tensor:
    """The numbers of characters, uint8; what the library's files lack is number 0."""
    if isinstance(values, bytes):
        values = torch.frombuffer(bytearray(values), dtype=torch.uint8)
    known = _known(most)
    table = torch.zeros(256, dtype=torch.uint8)
    table[known] = torch.arange(len(known), dtype=torch.uint8)
    return table[values.long()]


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the positions that have a target."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def trained(kind: str, seed: int, settings: Settings) -> Transformer:
    """The network of a seed, which decides its start and its batches."""
    task = task_of(kind, settings)
    torch.manual_seed(seed)
    network = task.build()
    key = kept.key(
        kind=kind, seed=seed, data=task.digest, steps=settings.steps, length=settings.length,
        size=asdict(settings.size), recipe=asdict(settings.recipe),
        start=kept.digest(network.state_dict()),
    )  # fmt: skip
    return _trained(network, task, f"{kind}-seed{seed}", key, seed, settings.recipe, settings.steps)


def fine_tuned(kind: str, seed: int, settings: Settings) -> Transformer:
    """The network of a seed after fine-tuning; all seeds start from one head of the new task."""
    assert settings.tuning is not None
    before, task = trained(kind, seed, settings), tuning_of(kind, settings)
    torch.manual_seed(0)
    network = task.build()
    state = before.state_dict()
    heads = {name for name in state if name.startswith("head.")}
    network.load_state_dict({k: v for k, v in state.items() if k not in heads}, strict=False)
    key = kept.key(
        kind=kind, seed=seed, data=task.digest, steps=settings.tuning_steps,
        recipe=asdict(settings.tuning), start=kept.digest(network.state_dict()),
    )  # fmt: skip
    name = f"{kind}-seed{seed}-tuned"
    return _trained(network, task, name, key, seed, settings.tuning, settings.tuning_steps)


def _trained(
    network: Transformer, task: Task, name: str, key: str, seed: int, recipe: Recipe, steps: int
) -> Transformer:
    def train() -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        data = Split(*task.draw(steps * recipe.batch, generator, False))
        fit(network, data, recipe, generator, loss=loss)
        return network.state_dict()

    network.load_state_dict(kept.remember(name, key, train))
    return network.eval()
