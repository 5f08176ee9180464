"""Merging beside its neighbours: ensembles, soups, negation, paths, and units that tasks share.

    python benchmarks/experiments/survey_questions.py --seeds 0 1 2

What the survey of Khan et al. (arXiv:2410.12927) gathers, on perceptrons of the demo's images:

one task    one expert, soups and ensembles of three, and what two foundations' experts merge to
negation    a task's vector subtracted: what is forgotten, and what is kept of the foundation's task
children    the error on the path between two networks that part at some step of their training
units       whether two tasks change the same units, and one task those of two foundations

One JSON beside this file, of which ``python benchmarks/questions_page.py`` makes docs/questions.md.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from question_networks import CALIBRATION, SMALL, command, default, expert, foundations, tasks
from torch import Tensor, nn

import nlm
from nlm.correct import linear_probe
from nlm.demo import cache
from nlm.demo.augmentation import stream
from nlm.demo.glyphs import Glyphs
from nlm.demo.networks import NETWORKS
from nlm.demo.tasks import Pretraining, Sizes, Split, Task, make_pretraining
from nlm.demo.training import FOUNDATION, Recipe, fit
from nlm.demo.world import load_glyphs
from nlm.evaluate import accuracy, ensemble_accuracy
from nlm.merge import greedy_soup
from nlm.symmetry.permutation import Permutation

State = Mapping[str, Tensor]

ASKED = ("upper", "cyrillic", "arrows", "greek")  # tasks
ORDERS = (0, 10, 11)  # of the batches of three fine-tunings
FACTORS = tuple(round(0.1 * number, 1) for number in range(1, 31))  # on a vector to subtract
KEPT = 0.95  # of the accuracy in the foundation's own task, on validation data
PARTINGS = (0.0, 0.02, 0.1, 0.3)  # of the steps that two children have in common
IMAGES = 24_000
POINTS = 11
LARGEST = 0.1  # of the units of a layer: those that a task changes most


@dataclass(frozen=True)
class World:
    """Two foundations, the way from the second to the first, tasks, and an expert of each."""

    network: str
    seed: int
    foundations: Sequence[nn.Sequential]
    spec: nlm.PermutationSpec
    way: Permutation
    data: Mapping[str, Task]
    before: Pretraining
    recipe: Recipe | None

    def expert(self, task: str, number: int, order: int = 0) -> nn.Sequential:
        origin = self.foundations[number]
        return expert(self.network, origin, self.data[task], self.seed, order, self.recipe)

    def moved(self, network: nn.Module) -> nn.Module:
        """A network of the second foundation's in the first one's order."""
        return loaded(network, self.spec.apply(self.way, network.state_dict()))


def prepare(seed: int, glyphs: Glyphs, small: bool) -> World:
    network, sizes = default(small), SMALL if small else Sizes()
    before = make_pretraining(glyphs, seed, sizes)
    pair = foundations(network, glyphs, seed, 2)
    spec = nlm.trace(pair[0], before.calibration[:32])
    way = nlm.align(pair[0], pair[1], spec, seed=seed, layerwise=False).permutation
    recipe = Recipe(2, 1e-3, 0.01, batch=20) if small else None
    return World(network, seed, pair, spec, way, tasks(ASKED, glyphs, seed, sizes), before, recipe)


def loaded(network: nn.Module, state: State) -> nn.Module:
    """A copy of a network with other weights, those that it is not given its own."""
    copied = copy.deepcopy(network)
    copied.load_state_dict({**network.state_dict(), **state})
    return copied


def mean_of(*networks: nn.Module) -> nn.Module:
    states = {str(number): each.state_dict() for number, each in enumerate(networks)}
    return loaded(networks[0], nlm.merge(states, method="linear"))


# --- one task, several networks -------------------------------------------------------------------


def one_task(world: World, name: str) -> dict[str, float]:
    """What several networks of one task are worth: test accuracies."""
    task = world.data[name]
    test, images = task.test.batches(), [task.calibration[:CALIBRATION]]
    tuned = [world.expert(name, 0, order) for order in ORDERS]
    other = world.expert(name, 1)
    found = {str(order): each for order, each in zip(ORDERS, tuned, strict=True)}

    def on_validation(state: State) -> float:
        return accuracy(loaded(tuned[0], state), task.validation.batches())

    greedy = loaded(tuned[0], greedy_soup(found, on_validation).merged)
    moved = world.moved(other)
    refit = partial(nlm.refit, outputs=True, ridge=0.1)
    aligned, apart = mean_of(tuned[0], moved), mean_of(tuned[0], other)
    models = {
        "one expert": tuned[0],
        "uniform soup of three": mean_of(*tuned),
        "greedy soup of three": greedy,
        "two foundations, averaged as they are": apart,
        "two foundations, as they are, refitted": refit(apart, {"a": tuned[0], "b": other}, images),
        "two foundations, aligned and averaged": aligned,
        "two foundations, aligned, refitted": refit(aligned, {"a": tuned[0], "b": moved}, images),
    }
    scores = {title: accuracy(model, test) for title, model in models.items()}
    scores["one expert of the other foundation"] = accuracy(other, test)
    scores["ensemble of three"] = ensemble_accuracy(tuned, test)
    scores["ensemble of two foundations"] = ensemble_accuracy([tuned[0], other], test)
    return scores


# --- negation -------------------------------------------------------------------------------------


def vector(network: nn.Module, start: nn.Module) -> dict[str, Tensor]:
    """What fine-tuning has added to the trunk."""
    own, before = network.state_dict(), start.state_dict()
    return {name: own[name] - before[name] for name in before if not name.startswith("head.")}


def negation(world: World, name: str) -> dict[str, dict[str, float]]:
    """Vector -> what is forgotten of its task and kept of the foundation's, and by what factor.

    A logistic probe of the foundation says how much of the task there is.
    """
    first, second = world.foundations
    task = world.data[name]
    head = linear_probe(first, task.train.batches(), max_samples=1500, classes=len(task.classes))
    own = vector(world.expert(name, 0), first)
    foreign = world.expert(name, 1)
    generator = stream(world.seed, "negation", name)
    noise = {entry: torch.randn(each.shape, generator=generator) for entry, each in own.items()}
    vectors = {
        "its own": own,
        "of the other foundation": vector(foreign, second),
        "of the other foundation, aligned": vector(world.moved(foreign), world.moved(second)),
        "noise of its lengths": {
            entry: each * (own[entry].norm() / each.norm()) for entry, each in noise.items()
        },
    }
    kept = {part: getattr(world.before, part).batches() for part in ("validation", "test")}
    asked = NETWORKS[world.network](len(task.classes))

    def scored(state: State) -> dict[str, float]:
        trunk = {entry: each for entry, each in state.items() if not entry.startswith("head.")}
        heads = {f"head.{entry}": each for entry, each in head.state_dict().items()}
        return {
            "forget": accuracy(loaded(asked, {**trunk, **heads}), task.test.batches()),
            "retain": accuracy(loaded(first, trunk), kept["test"]),
        }

    least = KEPT * accuracy(first, kept["validation"])
    found = {"nothing": {**scored(first.state_dict()), "factor": 0.0}}
    for title, way in vectors.items():
        chosen, factor = first.state_dict(), 0.0
        for number in FACTORS:  # the largest before too much is lost
            state = {
                entry: each - number * way[entry] if entry in way else each
                for entry, each in first.state_dict().items()
            }
            if accuracy(loaded(first, state), kept["validation"]) < least:
                break
            chosen, factor = state, number
        found[title] = {**scored(chosen), "factor": factor}
    return found


# --- children of one checkpoint -------------------------------------------------------------------


def child(world: World, glyphs: Glyphs, number: int, common: float, images: int) -> nn.Sequential:
    """A foundation that sees the same batches as the other for a share of its steps."""
    recipe = FOUNDATION[world.network]
    drawn = glyphs.draw("pretraining", images, stream(world.seed, "children"))
    count = images * recipe.epochs

    def order(*names: str) -> Tensor:
        generator = stream(world.seed, "children", *names)
        epochs = [torch.randperm(images, generator=generator) for _ in range(recipe.epochs)]
        return torch.cat(epochs)

    parting = int(common * count) // recipe.batch * recipe.batch
    seen = torch.cat([order("both")[:parting], order(str(number))[parting:]])
    # one epoch over what is seen, in an order that undoes the order in which fit takes it
    taken = torch.randperm(count, generator=stream(world.seed, "children", "batches"))
    places = torch.empty_like(seen)
    places[taken] = seen
    data = Split(drawn[0][places], drawn[1][places])
    network = NETWORKS[world.network](world.foundations[0][1].out_features, seed=1000 + world.seed)
    once = Recipe(1, recipe.learning_rate, recipe.weight_decay, recipe.batch)

    def train() -> State:
        fit(network, data, once, stream(world.seed, "children", "batches"))
        return network.state_dict()

    key = cache.key(
        network=world.network,
        seed=world.seed,
        number=number,
        parting=parting,
        images=images,
        recipe=asdict(recipe),
    )
    network.load_state_dict(cache.remember(f"child-{world.network}", key, train))
    return network.eval()


def children(world: World, glyphs: Glyphs, images: int) -> dict[str, dict[str, Any]]:
    """Share of the steps in common -> the error along the path, as they are and aligned."""
    found = {}
    test = world.before.test.batches()
    for common in PARTINGS:
        one, two = (child(world, glyphs, number, common, images) for number in (0, 1))
        way = nlm.align(one, two, world.spec, seed=world.seed, layerwise=False).permutation
        moved = loaded(two, world.spec.apply(way, two.state_dict()))
        found[str(common)] = {
            "as they are": errors(one, two, test), "aligned": errors(one, moved, test)
        }  # fmt: skip
    return found


def errors(one: nn.Module, two: nn.Module, test: Any) -> list[float]:
    """The error on the path between two networks."""
    ends = one.state_dict(), two.state_dict()
    places = torch.linspace(0, 1, POINTS).tolist()
    between = (
        {entry: torch.lerp(each, ends[1][entry], at) for entry, each in ends[0].items()}
        for at in places
    )
    return [1 - accuracy(loaded(one, state), test) for state in between]


# --- units ----------------------------------------------------------------------------------------


def changed(network: nn.Module, start: nn.Module) -> dict[str, set[int]]:
    """Layer -> the units whose incoming weights fine-tuning has changed most."""
    found = {}
    for entry, each in vector(network, start).items():
        if each.dim() == 2:
            lengths = each.norm(dim=1)
            count = max(1, round(LARGEST * len(lengths)))
            found[entry.removesuffix(".weight")] = set(lengths.topk(count).indices.tolist())
    return found


def units(world: World) -> dict[str, dict[str, float]]:
    """Which tasks are compared -> layer -> the share of their most changed units in common."""
    first, second = world.foundations
    moved = world.moved(second)
    own = {name: changed(world.expert(name, 0), first) for name in world.data}
    other = {name: changed(world.expert(name, 1), second) for name in world.data}
    aligned = {name: changed(world.moved(world.expert(name, 1)), moved) for name in world.data}
    pairs = {
        "two tasks, one foundation": [(own[a], own[b]) for a, b in itertools.combinations(own, 2)],
        "one task, two foundations": [(own[a], other[a]) for a in own],
        "one task, two foundations, aligned": [(own[a], aligned[a]) for a in own],
        "two tasks, two foundations, aligned": [
            (own[a], aligned[b]) for a, b in itertools.permutations(own, 2)
        ],
    }
    return {
        title: {
            layer: sum(len(a[layer] & b[layer]) / len(a[layer]) for a, b in those) / len(those)
            for layer in those[0][0]
        }
        for title, those in pairs.items()
    }


def run(seed: int, small: bool = False) -> dict[str, Any]:
    """All four, for one seed."""
    glyphs = load_glyphs()
    world = prepare(seed, glyphs, small)
    found: dict[str, Any] = {
        "one task": {name: one_task(world, name) for name in world.data},
        "negation": {name: negation(world, name) for name in world.data},
        "units": units(world),
        "children": children(world, glyphs, 256 if small else IMAGES),
    }
    print(f"seed {seed}: {found}", flush=True)
    return found


if __name__ == "__main__":
    command("survey_questions", run, __doc__)
