"""Four and eight foundations brought into one order: the mean of them all, strategy by strategy.

    python benchmarks/experiments/many_models.py --seeds 0 1 2

trains foundations of the demo (other weights, images and batches each; kept in the cache), aligns
them with ``nlm.align_many`` by every strategy, and writes for each the objective (the sum over all
pairs), the seconds, and loss and accuracy of the mean of all models on held-out images, as JSON.
"""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import nlm
from nlm.align.many import STRATEGIES
from nlm.demo import cache
from nlm.demo.glyphs import Glyphs, render
from nlm.demo.networks import NETWORKS
from nlm.demo.tasks import Sizes, Split, make_pretraining
from nlm.demo.training import FOUNDATION, train_foundation

RESULTS = Path(__file__).parent / "results"
COUNTS = (4, 8)
IMAGES = 24_000


def foundations(network: str, glyphs: Glyphs, seed: int, count: int) -> list[nn.Sequential]:
    """Trained here, or read from the cache."""
    recipe = FOUNDATION[network]
    found = []
    for index in range(count):
        settings = {
            "network": network, "images": IMAGES, "recipe": asdict(recipe), "seed": seed,
            "index": index, "glyphs": cache.digest(glyphs.tensors()),
        }  # fmt: skip

        def train(index: int = index) -> Mapping[str, Tensor]:
            # seeds of the weights are 2 * seed + index: far apart, no two foundations share one
            return train_foundation(network, glyphs, IMAGES, recipe, 100 * seed, index).state_dict()

        name = f"many-{network}-seed{seed}-{index}"
        model = NETWORKS[network](len(glyphs.alphabets["pretraining"]))
        model.load_state_dict(cache.remember(name, cache.key(**settings), train))
        found.append(model)
    return found


def score(
    network: nn.Module, states: Sequence[Mapping[str, Tensor]], data: Split
) -> dict[str, float]:
    """Loss and accuracy of the mean of state dicts."""
    model = copy.deepcopy(network)
    named = {str(number): state for number, state in enumerate(states)}
    model.load_state_dict(nlm.merge(named, method="linear", heads=()))
    with torch.no_grad():
        outputs = model(data.inputs)
    right = (outputs.argmax(1) == data.labels).float().mean()
    return {
        "loss": float(functional.cross_entropy(outputs, data.labels)),
        "accuracy": float(right),
    }


def run(network: str, seed: int) -> dict[str, Any]:
    """Every strategy on the first four and on all eight foundations of a seed."""
    glyphs = render()
    data = make_pretraining(glyphs, seed, Sizes())
    models = foundations(network, glyphs, seed, max(COUNTS))
    spec = nlm.trace(models[0], data.calibration[:32])
    found: dict[str, Any] = {
        "network": network,
        "seed": seed,
        "members": [score(models[0], [model.state_dict()], data.test) for model in models],
        "counts": {},
    }
    for count in COUNTS:
        states = [model.state_dict() for model in models[:count]]
        rows = {"as they are": score(models[0], states, data.test)}
        for strategy in STRATEGIES:
            joint = nlm.align_many(states, spec, strategy=strategy, seed=seed)
            moved = [
                spec.apply(permutation, state)
                for permutation, state in zip(joint.permutations, states, strict=True)
            ]
            rows[strategy] = {
                **score(models[0], moved, data.test),
                "objective": joint.report.objective,
                "relaxed": joint.report.relaxed,
                "seconds": joint.report.seconds,
            }
            print(f"{network} seed {seed}, {count} models, {strategy}: "
                  f"accuracy {rows[strategy]['accuracy']:.3f}, objective "
                  f"{joint.report.objective[-1]:.1f}, {joint.report.seconds:.1f} s")  # fmt: skip
        found["counts"][str(count)] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--network", choices=list(NETWORKS), default="cnn64")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    path = settings.json or RESULTS / f"many_models_{settings.network}.json"
    results = [run(settings.network, seed) for seed in settings.seeds]
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
