"""Does variance collapse with width, with depth, and with how much the foundations have seen?

    python benchmarks/experiments/size_questions.py --seeds 0 1 2

Four tasks, experts of two foundations in turn: perceptrons of other widths, of other depths, and
trained on other numbers of images, in as many steps. Local, as they are and permuted, without a
correction and with several. One JSON beside this file, of which ``python
benchmarks/questions_page.py`` makes docs/questions.md.
"""

from dataclasses import replace
from typing import Any

from question_networks import SMALL, command, perceptron, score, variances

from nlm.demo.experiment import World, prepare
from nlm.demo.training import FOUNDATION, Recipe
from nlm.demo.world import Settings
from nlm.evaluate import accuracy

TASKS = 4
IMAGES = 24_000
WIDTHS = {f"width {width}": (width, 4, IMAGES) for width in (64, 128, 256, 512)}
DEPTHS = {f"depth {depth}": (256, depth, IMAGES) for depth in (2, 6)}
SEEN = {f"{images} images": (256, 4, images) for images in (1500, 6000)}
SIZES = WIDTHS | DEPTHS | SEEN
SETTINGS = ("local", "nonlocal", "permuted", "permuted by activations")
CORRECTIONS = ("plain", "repair", "tact", "refit_tact")


def recipe(network: str, images: int) -> Recipe:
    """As many steps for fewer images."""
    usual = FOUNDATION[network]
    return replace(usual, epochs=usual.epochs * IMAGES // images)


def measured(world: World) -> dict[str, Any]:
    """Accuracies and variances of one size in every setting."""
    data, names = world.demo.tasks, list(world.demo.tasks)
    pretraining = world.demo.pretraining.test.batches()
    found: dict[str, Any] = {
        "foundations": [accuracy(each, pretraining) for each in world.demo.foundations],
        "experts": world.expert_accuracy("nonlocal", names),
        "settings": {},
    }
    for setting in SETTINGS:
        aligned = world.aligned(setting, TASKS)
        own = world.expert_accuracy(setting, names)
        rows, choices = score(aligned, data, CORRECTIONS, own)
        ratios = variances(choices["plain"].model, aligned, data)
        found["settings"][setting] = {"rows": rows, "variance_ratio": ratios}
    return found


def settings_of(width: int, depth: int, images: int, small: bool) -> Settings:
    """What is trained for one size, or next to nothing of it."""
    if small:
        few = Recipe(2, 1e-3, 0.01, batch=20)
        network = perceptron(width // 16, min(depth, 3))
        return Settings(network, images // 100, SMALL, few, few)
    network = perceptron(width, depth)
    return Settings(network, images, foundation=recipe(network, images))


def run(seed: int, small: bool = False) -> dict[str, Any]:
    """Every size of one seed."""
    found = {}
    for name, size in SIZES.items():
        settings = settings_of(*size, small)
        found[name] = measured(prepare(seed, TASKS, settings=settings))
        told = {setting: each["rows"] for setting, each in found[name]["settings"].items()}
        aligned = {row: round(each["average"], 3) for row, each in told["permuted"].items()}
        print(f"seed {seed}, {name}: permuted {aligned}", flush=True)
    return found


if __name__ == "__main__":
    command("size_questions", run, __doc__)
