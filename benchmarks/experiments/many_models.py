"""Four and eight foundations brought into one order: the mean of them all, method by method.

    python benchmarks/experiments/many_models.py --seeds 0 1 2

trains foundations of the demo (other weights, images and batches each; kept in the cache), aligns
them with ``nlm.align_many`` by every method and strategy, and writes for each the objective (the
sum over all pairs), the processor's seconds, and loss and accuracy of the mean of all models on
held-out images: a JSON for each seed. "mean" is Git Re-Basin's way to merge many models; "universe"
by weights is C2M3's Frank-Wolfe matching, refined: peers that stand in nlm itself.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _above  # noqa: F401  (before _bench)
import torch
from _bench import facts
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
METHODS = ("weights", "activations", "dual")
IMAGES = 24_000
TOLERANCE = 1e-3  # a sweep or a round that gains less is the last


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


def states_of(models: Sequence[nn.Module]) -> list[Mapping[str, Tensor]]:
    return [model.state_dict() for model in models]


def run(network: str, seed: int, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every method and strategy on the first foundations of a seed, so many at a time.

    What is known so far, after each method.
    """
    glyphs = render()
    data = make_pretraining(glyphs, seed, Sizes())
    models = foundations(network, glyphs, seed, max(counts))
    spec = nlm.trace(models[0], data.calibration[:32])
    found: dict[str, Any] = {
        "network": network,
        "seed": seed,
        "tolerance": TOLERANCE,
        "threads": torch.get_num_threads(),
        **facts(),
        "members": [score(models[0], [state], data.test) for state in states_of(models)],
        "counts": {},
    }
    for count in counts:
        chosen = models[:count]
        rows: dict[str, Any] = {"as they are": score(models[0], states_of(chosen), data.test)}
        found["counts"][str(count)] = rows
        for method in METHODS:
            given = None if method == "weights" else [data.calibration]
            rows[method] = {}
            for strategy in STRATEGIES:
                begin = time.process_time()
                joint = nlm.align_many(
                    chosen, spec, method, strategy, data=given, seed=seed, tolerance=TOLERANCE,
                    layerwise=False,
                )  # fmt: skip
                seconds = time.process_time() - begin
                moved = [
                    spec.apply(permutation, state)
                    for permutation, state in zip(
                        joint.permutations, states_of(chosen), strict=True
                    )
                ]
                report = joint.report
                rows[method][strategy] = {
                    **score(models[0], moved, data.test),
                    "objective": report.objective,
                    "relaxed": report.relaxed,
                    "seconds": seconds,
                }
                print(
                    f"{network} seed {seed}, {count} models, {method}, {strategy}: accuracy "
                    f"{rows[method][strategy]['accuracy']:.3f}, objective "
                    f"{report.objective[-1]:.1f}, {len(report.objective)} values, "
                    f"{seconds:.1f} s",
                    flush=True,
                )
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--network", choices=list(NETWORKS), default="cnn64")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the files")
    settings = parser.parse_args()
    for seed in settings.seeds:
        path = settings.results / f"many_models_{settings.network}_seed{seed}.json"
        for found in run(settings.network, seed, settings.counts):
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
