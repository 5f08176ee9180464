"""Small transformers of other seeds and batches: the barriers between them, by alignment.

    OMP_NUM_THREADS=1 python benchmarks/experiments/transformer_barriers.py gpt bert vit

trains three networks of each kind, a pre-norm GPT and a post-norm masked model on the Python files
of the standard library (split by file) and a pre-norm ViT on the demo's images, prints the barrier
of the loss between each two under each alignment, and writes one JSON a kind beside this file.
``python benchmarks/barriers.py`` makes docs/barriers.md of them. The trained networks are kept in
nlm's cache; ``--quick`` does everything with next to no training.
"""

import argparse
import copy
import itertools
import json
import math
import platform
import random
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit
from small_transformers import Size, Transformer, bert, gpt, vit
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

import nlm
from nlm.align import activation_matching, orthogonal_matching, weight_matching
from nlm.demo import cache
from nlm.demo.tasks import Split
from nlm.demo.training import Recipe, fit
from nlm.demo.world import load_glyphs
from nlm.evaluate import loss_barrier
from nlm.gauge import Gauge, find

State = Mapping[str, Tensor]

RESULTS = Path(__file__).parent / "results"
LEFT_OUT = ("site-packages", "/test", "/encodings/", "pydoc_data", "idlelib")
MASKED = 0.15  # of the characters, for the masked model


@dataclass(frozen=True)
class Settings:
    """What is trained and on how much it is compared; ``files`` bounds the text."""

    recipe: Recipe
    size: Size
    steps: int
    length: int = 64
    calibration: int = 400
    evaluation: int = 96
    one_by_one: int = 16  # windows of the pseudo-perplexity
    points: int = 21
    files: int | None = None


def recipe(learning_rate: float, batch: int) -> Recipe:
    return Recipe(1, learning_rate, weight_decay=0.1, batch=batch, clip=1.0)


SIZE = Size(width=64, depth=4, heads=4, hidden=256)
SETTINGS = {
    "gpt": Settings(recipe(2e-3, 32), SIZE, steps=600),
    "bert": Settings(recipe(2e-3, 32), SIZE, steps=600),
    "vit": Settings(recipe(2e-3, 128), SIZE, steps=500, calibration=1600, evaluation=300),
}
ALPHABET = "letters"  # of the images: 52 classes


def quick(settings: Settings) -> Settings:
    """The same with next to no training and data."""
    return replace(
        settings, recipe=replace(settings.recipe, batch=8), steps=4, size=Size(16, 1, 2, 24),
        length=16, calibration=60, evaluation=20, one_by_one=2, points=3, files=40,
    )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A network to train, and how inputs and targets are drawn, from held-out data or not."""

    build: Callable[[], Transformer]
    draw: Callable[[int, torch.Generator, bool], tuple[Tensor, Tensor]]
    digest: str


def text(most: int | None) -> tuple[Tensor, Tensor, int]:
    """The training text, the held-out text and the number of characters."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in folder.rglob("*.py") if not any(x in str(p) for x in LEFT_OUT))
    random.Random(0).shuffle(files)
    files = files[:most]
    held_out = len(files) // 8
    parts = []
    for chosen in (files[held_out:], files[:held_out]):
        whole = b"\n".join(path.read_bytes() for path in chosen).lower()
        values = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
        parts.append(values[(values == 10) | ((values >= 32) & (values < 127))])
    known = torch.unique(torch.cat(parts))
    table = torch.zeros(256, dtype=torch.uint8)
    table[known.long()] = torch.arange(len(known), dtype=torch.uint8)
    return table[parts[0].long()], table[parts[1].long()], len(known)


def task_of(kind: str, settings: Settings) -> Task:
    if kind == "vit":
        glyphs = load_glyphs()
        classes = len(glyphs.alphabets[ALPHABET])
        return Task(
            lambda: vit(classes, settings.size),
            lambda count, generator, held_out: glyphs.draw(ALPHABET, count, generator),
            cache.digest(glyphs.tensors()),
        )
    train, other, characters = text(settings.files)

    def draw(count: int, generator: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor]:
        source = other if held_out else train
        starts = torch.randint(len(source) - settings.length - 1, (count, 1), generator=generator)
        found = source[starts + torch.arange(settings.length + 1)].long()
        if kind == "gpt":
            return found[:, :-1], found[:, 1:]
        found = found[:, 1:]
        hidden = torch.rand(found.shape, generator=generator) < MASKED
        return found.masked_fill(hidden, characters), found.masked_fill(~hidden, -100)

    build = {"gpt": gpt, "bert": bert}[kind]
    return Task(
        lambda: build(characters, settings.length, settings.size),
        draw,
        cache.digest({"train": train, "held out": other}),
    )


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the positions that have a target."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def trained(kind: str, seed: int, settings: Settings, task: Task) -> Transformer:
    """The network of a seed, which decides its start and its batches."""
    torch.manual_seed(seed)
    network = task.build()

    def train() -> State:
        generator = torch.Generator().manual_seed(seed)
        data = Split(*task.draw(settings.steps * settings.recipe.batch, generator, False))
        fit(network, data, settings.recipe, generator, loss=loss)
        return network.state_dict()

    key = cache.key(
        kind=kind, seed=seed, data=task.digest, steps=settings.steps, length=settings.length,
        size=asdict(settings.size), recipe=asdict(settings.recipe),
    )  # fmt: skip
    network.load_state_dict(cache.remember(f"{kind}-seed{seed}", key, train))
    return network.eval()


@dataclass(frozen=True)
class Comparison:
    """What two networks are aligned by and compared on."""

    spec: nlm.PermutationSpec
    gauge: Gauge | None
    calibration: list[Tensor]
    evaluation: list[tuple[Tensor, Tensor]]
    points: int
    one_by_one: Tensor | None  # windows of text, for a masked model

    def folded(self, network: Transformer) -> Transformer:
        network = copy.deepcopy(network)
        if self.gauge is not None:
            network.load_state_dict(self.gauge.fold(network.state_dict()))
        return network

    def scrambled(self, network: Transformer, seed: int) -> Transformer:
        """The same function: units and heads in another order, what rotates rotated at random."""
        state = self.spec.apply(self.spec.random(seed), network.state_dict())
        if self.gauge is not None:
            state = self.gauge.apply(self.gauge.random(seed), state)
        other = copy.deepcopy(network)
        other.load_state_dict(state)
        return other

    def permuted(self, a: Transformer, b: Transformer, groups: Iterable[str]) -> State:
        found = activation_matching(a, b, self.spec.restrict(groups), self.calibration)
        return self.spec.apply(found.permutation, b.state_dict())

    def rotated(self, a: Transformer, b: Transformer, gauge: Gauge) -> State:
        return orthogonal_matching(a, b, gauge, self.calibration).apply(b.state_dict())

    def alignments(self, a: Transformer, b: Transformer) -> dict[str, State]:
        """Alignment -> state dict of B, from little to all that may be done; both are folded."""
        spec = self.spec
        inside = [group for group in spec.free if spec.groups[group].parents]
        heads = dict.fromkeys(head for group in inside for head in spec.groups[group].parents)
        [stream] = [group for group in spec.free if ("norm.weight", 0) in spec.carriers(group)]
        rest = [group for group in spec.free if group != stream]
        by_weights = weight_matching(a.state_dict(), b.state_dict(), spec).permutation
        found = {
            "feed-forward": self.permuted(a, b, set(rest) - {*heads, *inside}),
            "heads": self.permuted(a, b, rest),
            "stream permuted": self.permuted(a, b, spec.free),
            "by weights": spec.apply(by_weights, b.state_dict()),
        }
        if self.gauge is not None:
            found["stream rotated"] = self.rotated(a, b, replace(self.gauge, inner=()))
            found["heads rotated"] = self.rotated(a, b, self.gauge)
        return found

    def pair(self, a: Transformer, b: Transformer) -> dict[str, Any]:
        """The losses on the line between two networks, under each alignment."""
        there, other = self.folded(a), self.folded(b)
        first = there.state_dict()
        copied = self.scrambled(there, 2)
        if self.gauge is None:
            back = self.permuted(there, copied, self.spec.free)
        else:
            back = self.rotated(there, copied, self.gauge)
        lines: dict[str, tuple[State, State]] = {"raw": (a.state_dict(), b.state_dict())}
        if self.gauge is not None:
            lines["folded"] = first, other.state_dict()
        lines["scrambled"] = first, self.scrambled(other, 1).state_dict()
        lines |= {name: (first, moved) for name, moved in self.alignments(there, other).items()}
        lines["a copy that was scrambled"] = first, back
        rows = {}
        for name, (one, two) in lines.items():
            curve = loss_barrier(a, one, two, self.evaluation, points=self.points, loss=loss)
            rows[name] = {"barrier": curve.barrier, "losses": curve.losses}
            if self.one_by_one is not None:
                middle = {entry: torch.lerp(one[entry], two[entry], 0.5) for entry in one}
                rows[name]["pseudo_perplexity"] = self.pseudo_perplexity(a, middle)
        found: dict[str, Any] = {"rows": rows}
        if self.one_by_one is not None:
            ends = [self.pseudo_perplexity(each, each.state_dict()) for each in (a, b)]
            found["pseudo_perplexity"] = ends
        return found

    def pseudo_perplexity(self, network: Transformer, state: State) -> float:
        """exp of the mean surprise at each character, masked alone (Salazar et al. 2020)."""
        assert self.one_by_one is not None
        mask = len(state["embedding.weight"]) - 1
        surprise = []
        for window in self.one_by_one:
            hidden = window.repeat(len(window), 1).fill_diagonal_(mask)
            with torch.no_grad():
                logits = functional_call(network, dict(state), (hidden,))
            surprise.append(functional.cross_entropy(logits.diagonal().T, window).item())
        return math.exp(sum(surprise) / len(surprise))


def run(kind: str, settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """The barriers between all pairs of the networks of some seeds."""
    task = task_of(kind, settings)
    networks = {seed: trained(kind, seed, settings, task) for seed in seeds}
    generator = torch.Generator().manual_seed(7)
    calibration, _ = task.draw(settings.calibration, generator, False)
    inputs, targets = task.draw(settings.evaluation, generator, True)
    whole = torch.where(targets < 0, inputs, targets) if kind == "bert" else None
    first, example = networks[seeds[0]], calibration[:4]
    spec = nlm.trace(first, example)
    gauge, refused = None, ""
    try:
        gauge = find(first, example, spec)
    except nlm.SymmetryError as error:
        refused = str(error)
    comparison = Comparison(
        spec, gauge, list(calibration.split(100)),
        list(zip(inputs.split(100), targets.split(100), strict=True)), settings.points,
        None if whole is None else whole[: settings.one_by_one],
    )  # fmt: skip
    pairs = []
    for one, two in itertools.combinations(seeds, 2):
        pairs.append({"seeds": [one, two], **comparison.pair(networks[one], networks[two])})
        for name, row in pairs[-1]["rows"].items():
            middle = row["losses"][settings.points // 2]
            text = f"{name:26} {row['barrier']:+.4f}  halfway {middle:.4f}"
            print(f"{kind} {one} {two}  {text}", flush=True)
    return {
        "kind": kind, "settings": asdict(settings), "pairs": pairs, "refused": refused,
        "proof_error": None if gauge is None else gauge.error,
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"nlm": nlm.__version__, "torch": torch.__version__}, "commit": commit(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=list(SETTINGS), metavar="gpt|bert|vit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--results", type=Path, help="the folder of the JSON files")
    parser.add_argument("--quick", action="store_true", help="written to --results alone")
    chosen = parser.parse_args()
    folder = chosen.results or (None if chosen.quick else RESULTS)
    for kind in chosen.kinds:
        settings = quick(SETTINGS[kind]) if chosen.quick else SETTINGS[kind]
        settings = replace(settings, steps=chosen.steps or settings.steps)
        found = run(kind, settings, chosen.seeds)
        if folder is not None:
            path = folder / f"transformer_barriers_{kind}.json"
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
