"""What text aligns two language models, how much of it, how wide they are, and fine-tuned pairs.

    python benchmarks/experiments/text_questions.py

The open questions of Verma and Elbayad (arXiv:2403.00986), on character GPTs of Python's library of
other seeds and batches (``small_training.py``):

calibration  aligned and refitted on code, prose, C headers, shuffled words or characters at random,
             and on little or much of the code
widths       barriers between networks of other widths
fine_tuned   the loss between two networks that were fine-tuned for one task, at 21 places

One JSON beside this file, of which ``python benchmarks/questions_page.py`` makes docs/questions.md.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from question_networks import command
from small_tasks import TEXT_TASKS, reordered, task
from small_training import (
    SETTINGS,
    Settings,
    kinds_of_text,
    loss,
    quick,
    recipe,
    task_of,
    text,
    trained,
    windows,
)
from small_transformers import Size, Transformer
from torch import Tensor
from transformer_tasks import expert

import nlm
from nlm.align import activation_matching, orthogonal_matching
from nlm.demo.tasks import Sizes
from nlm.evaluate import loss_barrier
from nlm.gauge import find

State = Mapping[str, Tensor]

WIDTHS = (16, 32, 64)
STEPS = 800
NETWORKS = (0, 1, 2)  # seeds
CALIBRATION = 256  # windows
KINDS = ("code", "prose", "headers", "words shuffled", "characters at random")
AMOUNTS = (4, 32, 256)
POINTS = 21
TUNING = replace(recipe(5e-4, 32), epochs=2)
SIZES = Sizes(2000, 20, 20, 400)


def settings_of(width: int, small: bool) -> Settings:
    if small:
        return quick(SETTINGS["gpt"])
    size = Size(width, 4, 4, 4 * width)
    return replace(SETTINGS["gpt"], size=size, steps=STEPS, evaluation=256)


def calibration(kind: str, count: int, settings: Settings) -> list[Tensor]:
    """Windows of a kind of text, none of it held out."""
    generator = torch.Generator().manual_seed(11)
    length, files = settings.length, settings.files
    code, _, characters = text(files)
    if kind == "characters at random":
        found = torch.randint(characters, (count, length), generator=generator)
    elif kind in ("prose", "headers"):
        _, headers, prose = (train for train, _ in kinds_of_text(files))
        found = windows({"prose": prose, "headers": headers}[kind], count, length, generator)
    else:
        found = windows(code, count, length, generator)
        if kind == "words shuffled":
            found = reordered(kind, found, generator, files)
    return list(found.split(100))


class Pair:
    """Two networks and the held-out text that they are compared on."""

    def __init__(self, a: Transformer, b: Transformer, settings: Settings) -> None:
        self.a, self.b = a, b
        generator = torch.Generator().manual_seed(7)
        inputs, targets = task_of("gpt", settings).draw(settings.evaluation, generator, True)
        self.evaluation = list(zip(inputs.split(100), targets.split(100), strict=True))
        self.spec = nlm.trace(a, inputs[:4])
        self.gauge = find(a, inputs[:4], self.spec)

    def raw(self) -> tuple[State, State]:
        return self.a.state_dict(), self.b.state_dict()

    def permuted(self, data: list[Tensor]) -> tuple[State, State]:
        """Feed-forward units and heads; the stream stays as it is."""
        found = activation_matching(self.a, self.b, self.spec, data, residual="identity")
        return self.a.state_dict(), self.spec.apply(found.permutation, self.b.state_dict())

    def rotated(self, data: list[Tensor]) -> tuple[State, State]:
        found = orthogonal_matching(self.a, self.b, self.gauge, data)
        return found.fold(self.a.state_dict()), found.apply(self.b.state_dict())

    def halfway(self, ends: tuple[State, State]) -> float:
        """The loss halfway."""
        return loss_barrier(self.a, *ends, self.evaluation, points=3, loss=loss).losses[1]

    def own(self) -> float:
        """The mean of the networks' own losses."""
        losses = loss_barrier(self.a, *self.raw(), self.evaluation, points=2, loss=loss).losses
        return sum(losses) / 2

    def refitted(self, ends: tuple[State, State], data: list[Tensor]) -> float:
        """The loss of the mean after a refit on the same text."""
        members = {name: with_state(self.a, end) for name, end in zip("ab", ends, strict=True)}
        named = dict(zip("ab", ends, strict=True))
        mean = with_state(self.a, nlm.merge(named, method="linear"))
        solved = nlm.refit(mean, members, data, outputs=True, max_samples=None)
        return self.halfway((solved.state_dict(), solved.state_dict()))


def with_state(network: Transformer, state: State) -> Transformer:
    copied = copy.deepcopy(network)
    copied.load_state_dict(state)
    return copied


def pairs(networks: Sequence[Transformer], settings: Settings) -> Iterator[Pair]:
    for a, b in itertools.combinations(networks, 2):
        yield Pair(a, b, settings)


def calibrated(pair: Pair, settings: Settings, small: bool) -> dict[str, dict[str, float]]:
    """Text, and windows of it -> losses halfway, aligned and refitted on it."""
    asked = [(kind, CALIBRATION) for kind in KINDS] + [("code", n) for n in AMOUNTS[:-1]]
    found = {}
    for kind, count in asked:
        data = calibration(kind, min(count, 12) if small else count, settings)
        ends = pair.rotated(data)
        found[f"{kind}, {count}"] = {
            "permuted": pair.halfway(pair.permuted(data)),
            "rotated": pair.halfway(ends),
            "refitted": pair.refitted(ends, data),
            "refitted as they are": pair.refitted(pair.raw(), data),
        }
    return found


def wide(pair: Pair, settings: Settings, small: bool) -> dict[str, float]:
    """The losses halfway between two networks of a width."""
    data = calibration("code", 12 if small else CALIBRATION, settings)
    ends = pair.rotated(data)
    return {
        "own": pair.own(),
        "as they are": pair.halfway(pair.raw()),
        "permuted": pair.halfway(pair.permuted(data)),
        "rotated": pair.halfway(ends),
        "refitted": pair.refitted(ends, data),
    }


def tuned(
    networks: Sequence[Transformer], settings: Settings, small: bool
) -> dict[str, list[dict[str, list[float]]]]:
    """Task -> the losses between each two networks that were fine-tuned for it."""
    sizes = Sizes(40, 20, 20, 20) if small else SIZES
    data = calibration("code", 12 if small else CALIBRATION, settings)
    moves = []
    for pair in pairs(networks, settings):
        moves.append(orthogonal_matching(pair.a, pair.b, pair.gauge, data).moves(pair.spec))
    found: dict[str, list[dict[str, list[float]]]] = {}
    for name in TEXT_TASKS:
        own = task("gpt", name, 0, sizes, settings.length, settings.files)
        experts = [expert("gpt", seed, each, own, TUNING) for seed, each in enumerate(networks)]
        test = own.test.batches()
        found[name] = []
        for (a, b), (first, second) in zip(itertools.combinations(experts, 2), moves, strict=True):
            states = a.state_dict(), b.state_dict()
            lines = {"as they are": states, "rotated": (first(states[0]), second(states[1]))}
            found[name].append(
                {
                    title: loss_barrier(a, *ends, test, points=POINTS, loss=loss).losses
                    for title, ends in lines.items()
                }
            )
    return found


def run(seed: int, small: bool = False) -> dict[str, Any]:
    """All three questions, on networks of the seeds from ``seed`` on."""
    found: dict[str, Any] = {"widths": {}, "settings": {}}
    for width in WIDTHS[:1] if small else WIDTHS:
        settings = settings_of(width, small)
        networks = [trained("gpt", seed + number, settings) for number in NETWORKS]
        rows = [wide(pair, settings, small) for pair in pairs(networks, settings)]
        found["widths"][str(width)] = rows
        found["settings"][str(width)] = asdict(settings)
        print(f"width {width}: {rows}", flush=True)
    # the widest ones
    found["calibration"] = [calibrated(pair, settings, small) for pair in pairs(networks, settings)]
    print(f"calibration: {found['calibration']}", flush=True)
    found["fine_tuned"] = tuned(networks, settings, small)
    found["tuning"] = asdict(TUNING)
    return found


if __name__ == "__main__":
    command("text_questions", run, __doc__, seeds=[0])
