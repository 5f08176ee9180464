"""Non-local merging of small transformers: four tasks, experts of two foundations in turn.

    OMP_NUM_THREADS=1 python benchmarks/experiments/transformer_tasks.py vit gpt --seeds 0 1 2

The foundations are two of the networks that transformer_barriers.py compares (seeds s and s + 1), a
vision transformer of the demo's letters and a character GPT; experts are fine-tuned for tasks of
images or of text (``small_tasks.py``). Settings and corrections are those of the demo, with the
residual stream and the heads rotated as a further setting; refit stands beside them, as in
``refit.py``. One JSON a kind and seed beside this file, written anew after each row; a run that was
ended goes on.

Text takes longer than images, so it has fewer samples to choose and test on and fewer scales, the
default ridge, no alignment by weights, and is compared at four tasks. Where units are permuted by
activations, streams of images stay in order, those of text are permuted as all norms see them.
"""

import argparse
import copy
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit, networks, unfinished, write
from refit import CORRECTIONS as REFITS
from refit import DEFAULT, IMAGES, RIDGES, SCALE
from refit import rows as refits
from small_tasks import IMAGE_TASKS, TEXT_TASKS, task
from small_training import SETTINGS, Settings, quick, recipe, task_of, trained
from small_transformers import Transformer, pooled
from torch import Tensor

import nlm
from nlm.correct import linear_probe
from nlm.demo import cache
from nlm.demo.experiment import SCALES_TIMES_TASKS, World, compare
from nlm.demo.tasks import Pretraining, Sizes, Split, Task
from nlm.demo.training import Recipe, fit
from nlm.demo.world import Demo
from nlm.pipeline import Aligned, align_experts

RESULTS = Path(__file__).parent / "results"
TASKS = {"vit": IMAGE_TASKS, "gpt": TEXT_TASKS}
TUNING = {"vit": replace(recipe(5e-4, 128), epochs=5), "gpt": replace(recipe(5e-4, 32), epochs=2)}
PLACES = ("local", "nonlocal", "rotated", "permuted by activations", "permuted")
CORRECTIONS = ("plain", "repair", "tact")
CONTROLS = ("tact_lambda0", "probe")


@dataclass(frozen=True)
class Amounts:
    """How much is drawn of each task, and how thoroughly a kind is compared."""

    sizes: Sizes
    counts: tuple[int, ...]  # of tasks
    scales: tuple[float, ...]  # times the number of tasks
    refit_samples: int  # a task
    ridges: tuple[float, ...]  # none: the default one alone
    places: tuple[str, ...]
    residual: str = "all"  # how streams are seen where units are permuted by activations


AMOUNTS = {
    "vit": Amounts(Sizes(), (2, 4), SCALES_TIMES_TASKS, IMAGES, RIDGES, PLACES, "identity"),
    "gpt": Amounts(Sizes(4000, 200, 128, 400), (4,), (0.8, 1.2, 2.0), 128, (), PLACES[:-1]),
}


@dataclass
class Transformers(World):
    """The demo's comparison with transformers, whose residual stream may be rotated too."""

    data: Sequence[Tensor] = field(default_factory=list)

    def aligned(self, setting: str, count: int) -> Aligned:
        if setting != "rotated":
            return super().aligned(setting, count)
        experts = {
            name: (number, self.demo.experts[name][number])
            for name in list(self.demo.tasks)[:count]
            for number in [self.origin(setting, name)]
        }
        return align_experts(
            self.demo.foundations, experts, self.spec, "orthogonal", data=self.data
        )


def expert(kind: str, seed: int, foundation: Transformer, own: Task, tuning: Recipe) -> Transformer:
    """A foundation fine-tuned for a task, from a logistic probe as its head."""
    network = pooled(copy.deepcopy(foundation), len(own.classes))

    def train() -> Mapping[str, Tensor]:
        probe = linear_probe(network, own.train.batches(), max_samples=1500)
        network.head.load_state_dict(probe.state_dict())
        generator = torch.Generator().manual_seed(seed)
        fit(network, own.train, tuning, generator)
        return network.state_dict()

    key = cache.key(
        start=cache.digest(foundation.state_dict()), seed=seed, recipe=asdict(tuning),
        data=cache.digest({"inputs": own.train.inputs, "labels": own.train.labels}),
    )  # fmt: skip
    network.load_state_dict(cache.remember(f"{kind}-seed{seed}-{own.name}", key, train))
    return network.eval()


def prepare(
    kind: str, seed: int, settings: Settings, amounts: Amounts, tuning: Recipe
) -> Transformers:
    """Foundations, experts and data of one seed, the foundations aligned in every way."""
    first, second = (trained(kind, each, settings) for each in (seed, seed + 1))
    tasks = {
        name: task(kind, name, seed, amounts.sizes, settings.length, settings.files)
        for name in TASKS[kind]
    }
    experts = {
        name: {
            number: expert(kind, seed + number, [first, second][number], own, tuning)
            for number in range(1 + place % 2)
        }
        for place, (name, own) in enumerate(tasks.items())
    }
    generator = torch.Generator().manual_seed(seed)
    before = task_of(kind, settings)
    inputs, _ = before.draw(settings.calibration, generator, False)
    held_out = Split(*before.draw(settings.evaluation, generator, True))
    demo = Demo(seed, (first, second), experts, tasks, Pretraining((), held_out, inputs, held_out))  # type: ignore[arg-type]
    spec, data = nlm.trace(first, inputs[:4]), list(inputs.split(100))
    alignments = {
        "activations": nlm.align(
            first, second, spec, "activations", data=data, residual=amounts.residual
        ),
    }
    if "permuted" in amounts.places:
        alignments["weights"] = nlm.align(
            first, second, spec, "weights", seed=seed, layerwise=False
        )
    return Transformers(demo, spec, alignments, data=data)


def run(
    kind: str,
    seeds: Sequence[int],
    small: bool = False,
    save: Callable[[dict[str, Any]], object] = lambda found: None,
    before: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Normalised accuracies in every setting, seed by seed.

    ``save`` gets what there is so far, ``before`` what there is before the first: it returns what a
    run that was ended has found.
    """
    settings, amounts, tuning = SETTINGS[kind], AMOUNTS[kind], TUNING[kind]
    if small:
        settings, tuning = quick(settings), replace(tuning, epochs=1, batch=16)
        amounts = replace(amounts, sizes=Sizes(64, 20, 40, 40))
    found: dict[str, Any] = {
        "kind": kind, "settings": asdict(settings), "tuning": asdict(tuning),
        "amounts": asdict(amounts), "refit": {"images": amounts.refit_samples, "scale": SCALE},
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"nlm": nlm.__version__, "torch": torch.__version__},
        "commit": commit(), "seeds": {},
    }  # fmt: skip
    found = found if before is None else before(found)
    for seed in seeds:
        start = time.perf_counter()
        world = prepare(kind, seed, settings, amounts, tuning)
        many = replace(world, samples=amounts.refit_samples)
        of = networks(world.demo)
        if found["seeds"].get(str(seed), {}).get("networks") != of:
            found["seeds"][str(seed)] = {"networks": of, "rows": {}, "refits": {}}
        here = found["seeds"][str(seed)]
        if "experts" not in here:
            here["experts"] = own = world.expert_accuracy("nonlocal", list(world.demo.tasks))
            told(kind, seed, "experts", start, {name: {"average": own[name]} for name in own})
        for place in amounts.places:
            for count in map(str, amounts.counts):
                rows = here["rows"].setdefault(place, {})
                if count not in rows:
                    rows[count], *_ = compare(
                        world, place, int(count), corrections=CORRECTIONS, controls=CONTROLS,
                        multiples=amounts.scales,
                    )  # fmt: skip
                    told(kind, seed, f"{count} tasks, {place}", start, rows[count])
                    save(found)
            solved = here["refits"].setdefault(place, {})
            for name in (*REFITS, DEFAULT):
                if name not in solved and (amounts.ridges or name != "refit"):
                    ridges = amounts.ridges or (None,)
                    solved |= refits(many, place, len(TASKS[kind]), ridges, (name,))
                    told(kind, seed, place, start, {name: solved[name]})
                    save(found)
    return found


def told(kind: str, seed: int, what: str, start: float, rows: Mapping[str, Any]) -> None:
    """Prints what was found, and when."""
    numbers = ", ".join(f"{name} {row['average']:.3f}" for name, row in rows.items())
    print(
        f"{time.perf_counter() - start:6.0f} s  {kind} seed {seed}, {what}: {numbers}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=list(TASKS), metavar="vit|gpt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the JSON")
    parser.add_argument("--quick", action="store_true", help="next to no training and data")
    chosen = parser.parse_args()
    for kind in chosen.kinds:
        for seed in chosen.seeds:
            path = chosen.results / f"transformer_tasks_{kind}_seed{seed}.json"
            run(kind, (seed,), chosen.quick, partial(write, path), partial(unfinished, path))


if __name__ == "__main__":
    main()
