"""Experts of more than two foundations, and experts that drifted far from the one they share.

    python benchmarks/experiments/foundation_questions.py --seeds 0 1 2

foundations  eight tasks, whose experts come from one to four foundations in turn, brought into one
             order in several ways
tasks        two to eight tasks, whose experts come from one or two foundations
drift        the other kind of non-locality: four experts of one foundation, fine-tuned for longer
             and at higher rates until they are two hundred times further away

One JSON beside this file, of which ``python benchmarks/questions_page.py`` makes docs/questions.md.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from question_networks import (
    SMALL,
    command,
    default,
    expert,
    foundations,
    score,
    tasks,
    variances,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import nlm
from nlm.demo.tasks import TASKS, Sizes, Task, make_pretraining
from nlm.demo.training import Recipe
from nlm.demo.world import load_glyphs
from nlm.evaluate import accuracy
from nlm.pipeline import Aligned, align_experts

COUNTS = (1, 2, 3, 4)  # of foundations
# Alignment -> method and strategy.
ALIGNMENTS = {
    "as they are": (None, "reference"),
    "weights, each with the first": ("weights", "reference"),
    "weights, all together": ("weights", "universe"),
    "activations, each with the first": ("activations", "reference"),
    "activations, each with the mean of the others": ("activations", "mean"),
}
DRIFTING = 4  # tasks
DRIFTS = {
    "1 epoch at 0.0001": Recipe(1, 1e-4, 0.01),
    "2 epochs at 0.0005": Recipe(2, 5e-4, 0.01),
    "5 epochs at 0.001": Recipe(5, 1e-3, 0.01),
    "10 epochs at 0.003": Recipe(10, 3e-3, 0.01),
    "15 epochs at 0.01": Recipe(15, 1e-2, 0.01),
}


@dataclass(frozen=True)
class World:
    """Foundations, what may be permuted in them, and the tasks."""

    network: str
    seed: int
    models: Sequence[nn.Sequential]
    data: Mapping[str, Task]
    spec: nlm.PermutationSpec
    images: list[Tensor]
    recipe: Recipe | None = None

    def experts(self, count: int, tasks: int) -> dict[str, tuple[int, nn.Module]]:
        """The experts of the first tasks, of so many foundations in turn."""
        return {
            name: (
                place % count,
                expert(
                    self.network, self.models[place % count], self.data[name], self.seed,
                    recipe=self.recipe,
                ),
            )
            for place, name in enumerate(list(self.data)[:tasks])
        }  # fmt: skip

    def aligned(self, count: int, tasks: int, method: str | None, strategy: str) -> Aligned:
        given = {"data": self.images} if method == "activations" else {}
        experts = self.experts(count, tasks)
        return align_experts(
            self.models[:count], experts, self.spec, method, strategy=strategy, **given
        )

    def scores(self, aligned: Aligned, corrections: Sequence[str]) -> dict[str, Any]:
        """Normalised accuracies, and the ratios of variances of the merge as it is."""
        data = {name: self.data[name] for name in aligned.experts}
        own = {
            name: accuracy(model, data[name].test.batches())
            for name, model in aligned.experts.items()
        }
        rows, choices = score(aligned, data, corrections, own)
        ratios = variances(choices["plain"].model, aligned, data)
        return {"rows": rows, "variance_ratio": ratios}


def several(world: World) -> dict[str, Any]:
    """Number of foundations -> alignment -> scores of all tasks."""
    found: dict[str, Any] = {}
    for count in COUNTS:
        rows = found[str(count)] = {}
        for title, (method, strategy) in ALIGNMENTS.items():
            if (count == 1 and method) or (count == 2 and strategy != "reference"):
                continue  # there is nothing to align, or no more than two models
            aligned = world.aligned(count, len(world.data), method, strategy)
            rows[title] = world.scores(aligned, ("plain", "tact", "refit_tact"))
            told = {row: round(each["average"], 3) for row, each in rows[title]["rows"].items()}
            print(f"seed {world.seed}, {count} foundations, {title}: {told}", flush=True)
    return found


def counted(world: World) -> dict[str, Any]:
    """Number of foundations, aligned -> number of tasks -> scores."""
    return {
        str(count): {
            str(tasks): world.scores(
                world.aligned(count, tasks, "activations" if count > 1 else None, "reference"),
                ("plain", "repair", "tact"),
            )
            for tasks in range(2, len(world.data) + 1)
        }
        for count in (1, 2)
    }


def apart(experts: Mapping[str, nn.Module], foundation: nn.Module) -> dict[str, float]:
    """How far experts lie from their foundation, relative to it, and how alike the ways are."""
    start = _flat(foundation)
    ways = [_flat(each) - start for each in experts.values()]
    alike = [float(cosine_similarity(a, b, 0)) for a, b in itertools.combinations(ways, 2)]
    return {
        "distance": sum(float(way.norm() / start.norm()) for way in ways) / len(ways),
        "cosine": sum(alike) / len(alike),
    }


def _flat(network: nn.Module) -> Tensor:
    trunk = network.get_submodule("trunk")
    return torch.cat([each.detach().flatten() for each in trunk.parameters()])


def drifting(
    network: str, foundation: nn.Sequential, data: Mapping[str, Task], seed: int, small: bool
) -> dict[str, Any]:
    """Recipe -> how far its experts are, and their merges."""
    found = {}
    for name, recipe in DRIFTS.items():
        recipe = Recipe(2, recipe.learning_rate, 0.01, batch=20) if small else recipe
        experts = {
            task: expert(network, foundation, own, seed, recipe=recipe)
            for task, own in data.items()
        }
        alone = {task: accuracy(experts[task], data[task].test.batches()) for task in data}
        base = {k: v for k, v in foundation.state_dict().items() if not k.startswith("head.")}
        aligned = Aligned(base, experts, [foundation.state_dict()])
        scores, choices = score(aligned, data, ("plain", "repair", "tact", "refit_tact"), alone)
        ratios = variances(choices["plain"].model, aligned, data)
        found[name] = {
            **apart(experts, foundation), "experts": alone, "rows": scores,
            "variance_ratio": ratios,
        }  # fmt: skip
        told = {row: round(each["average"], 3) for row, each in scores.items()}
        print(f"seed {seed}, {name}: {found[name]['distance']:.3f} away, {told}", flush=True)
    return found


def run(seed: int, small: bool = False) -> dict[str, Any]:
    """All questions, for one seed."""
    network, glyphs = default(small), load_glyphs()
    data = tasks(TASKS[: 4 if small else 8], glyphs, seed, SMALL if small else Sizes())
    models = foundations(network, glyphs, seed, max(COUNTS))
    images = make_pretraining(glyphs, seed, Sizes()).calibration
    spec = nlm.trace(models[0], images[:32])
    recipe = Recipe(2, 1e-3, 0.01, batch=20) if small else None
    world = World(network, seed, models, data, spec, [images], recipe)
    few = {name: data[name] for name in list(data)[:DRIFTING]}
    return {
        "foundations": several(world),
        "tasks": counted(world),
        "drift": drifting(network, models[0], few, seed, small),
    }


if __name__ == "__main__":
    command("foundation_questions", run, __doc__)
