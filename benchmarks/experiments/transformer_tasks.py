"""Non-local merging of small transformers: four tasks, experts of two foundations in turn.

    OMP_NUM_THREADS=1 python benchmarks/experiments/transformer_tasks.py vit gpt --seeds 0 1 2

The foundations are two of the networks that transformer_barriers.py compares (seeds s and s + 1), a
vision transformer of the demo's letters and a character GPT; experts are fine-tuned for tasks of
images or of text (``small_tasks.py``). Settings and corrections are those of the demo, with the
residual stream and the heads rotated as a further setting; refit stands beside them, as in
``refit.py``. One JSON a kind beside this file.
"""

import argparse
import copy
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit
from refit import IMAGES, SCALE
from refit import rows as refits
from small_tasks import IMAGE_TASKS, TEXT_TASKS, task
from small_training import SETTINGS, Settings, quick, recipe, task_of, trained
from small_transformers import Transformer, pooled
from torch import Tensor

import nlm
from nlm.correct import linear_probe
from nlm.demo import cache
from nlm.demo.experiment import World, compare
from nlm.demo.tasks import Pretraining, Sizes, Split, Task
from nlm.demo.training import Recipe, fit
from nlm.demo.world import Demo
from nlm.pipeline import Aligned, align_experts

RESULTS = Path(__file__).parent / "results"
TASKS = {"vit": IMAGE_TASKS, "gpt": TEXT_TASKS}
TUNING = {"vit": replace(recipe(5e-4, 128), epochs=5), "gpt": replace(recipe(5e-4, 32), epochs=2)}
PLACES = ("local", "nonlocal", "permuted", "permuted by activations", "rotated")
CORRECTIONS = ("plain", "repair", "tact")
CONTROLS = ("tact_lambda0", "probe")


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


def prepare(kind: str, seed: int, settings: Settings, sizes: Sizes, tuning: Recipe) -> Transformers:
    """Foundations, experts and data of one seed, the foundations aligned in every way."""
    first, second = (trained(kind, each, settings) for each in (seed, seed + 1))
    tasks = {
        name: task(kind, name, seed, sizes, settings.length, settings.files) for name in TASKS[kind]
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
        "weights": nlm.align(first, second, spec, "weights", seed=seed, layerwise=False),
        # the stream stays in order, as is best for transformers that are not rotated
        "activations": nlm.align(
            first, second, spec, "activations", data=data, residual="identity"
        ),
    }
    return Transformers(demo, spec, alignments, data=data)


def run(kind: str, seeds: Sequence[int], small: bool = False) -> dict[str, Any]:
    """Normalised accuracies in every setting, seed by seed."""
    settings, sizes, tuning = SETTINGS[kind], Sizes(), TUNING[kind]
    if small:
        settings, sizes = quick(settings), Sizes(64, 20, 40, 40)
        tuning = replace(tuning, epochs=1, batch=16)
    found: dict[str, Any] = {
        "kind": kind, "settings": asdict(settings), "tuning": asdict(tuning),
        "refit": {"images": IMAGES, "scale": SCALE}, "seeds": {},
    }  # fmt: skip
    for seed in seeds:
        world = prepare(kind, seed, settings, sizes, tuning)
        names = list(world.demo.tasks)
        rows: dict[str, Any] = {}
        solved: dict[str, Any] = {}
        for place in PLACES:
            for count in (2, len(names)):
                scores, *_ = compare(
                    world, place, count, corrections=CORRECTIONS, controls=CONTROLS
                )
                rows.setdefault(place, {})[str(count)] = scores
                told = ", ".join(
                    f"{name} {row['average']:.3f}/{row['worst']:.3f}"
                    for name, row in scores.items()
                )
                print(f"{kind} seed {seed}, {count} tasks, {place}: {told}", flush=True)
            many = replace(world, samples=IMAGES)
            solved[place] = refits(many, place, len(names))
            told = ", ".join(f"{name} {row['average']:.3f}" for name, row in solved[place].items())
            print(f"{kind} seed {seed}, {place}: {told}", flush=True)
        own = world.expert_accuracy("nonlocal", names)
        found["seeds"][str(seed)] = {"experts": own, "rows": rows, "refits": solved}
    found["machine"] = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    found["versions"] = {"nlm": nlm.__version__, "torch": torch.__version__}
    return {**found, "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=list(TASKS), metavar="vit|gpt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the JSON")
    parser.add_argument("--quick", action="store_true", help="next to no training and data")
    chosen = parser.parse_args()
    for kind in chosen.kinds:
        found = run(kind, chosen.seeds, chosen.quick)
        path = chosen.results / f"transformer_tasks_{kind}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
