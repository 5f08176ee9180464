"""Partial merging on real data: accuracy against the parameters that are spent.

    python benchmarks/experiments/partial_matching.py --seeds 0 1 2

merges the demo's two foundations (outputs averaged), and an expert of each (a head per task), with
the best matched units merged within budgets from one model's parameters to all units kept apart,
and writes one JSON per seed beside this file. The controls spend the parameters evenly: the same
share of every layer, and ZipIt's clusters at the same width of every layer.
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nlm
from nlm.align import partial_matching, zip_matching
from nlm.demo.world import Demo, load
from nlm.evaluate import accuracy, ensemble_accuracy
from nlm.merge import merge_partial
from nlm.symmetry import PermutationSpec, Widening
from nlm.symmetry.permutation import Permutation
from nlm.symmetry.widening import Units

RESULTS = Path(__file__).parent / "results"
BUDGETS = (1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
SHARES = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)
WIDTHS = (1.0, 1.25, 1.5, 1.75, 2.0)


def moved(spec: PermutationSpec, permutation: Permutation, model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.load_state_dict(spec.apply(permutation, model.state_dict()))
    return copied


def run(seed: int) -> dict[str, Any]:
    """All curves of one seed."""
    demo = load(seed, 2)
    first, second = demo.foundations
    images = [demo.pretraining.calibration]
    spec = nlm.trace(first, images[0][:32])
    widening = Widening.find(first, spec, images[0][:32])
    found: dict[str, Any] = {"seed": seed, "alone": alone(demo), "refused": widening.refused}
    for method in ("weights", "activations"):
        result = nlm.align(first, second, spec, method, data=images, seed=seed, layerwise=False)
        inside = [first, moved(spec, result.permutation, second)]
        experts = {
            task: own[0] if number == 0 else moved(spec, result.permutation, own[1])
            for number, (task, own) in enumerate(demo.experts.items())
        }
        point = partial(score, demo, widening, foundations=inside, experts=experts)
        found[method] = {
            "budget": {b: point(partial_matching(result, widening, budget=b)) for b in BUDGETS},
            "share": {s: point(partial_matching(result, widening, share=s)) for s in SHARES},
        }
        if method == "activations":
            found[method]["zipped"] = {
                width: point(zip_matching(inside, widening, images, width=width))
                for width in WIDTHS
            }
    return found


def alone(demo: Demo) -> dict[str, Any]:
    """The accuracies of the models themselves, and of the foundations' ensemble."""
    data = demo.pretraining.test.batches()
    return {
        "foundations": [accuracy(model, data) for model in demo.foundations],
        "ensemble": ensemble_accuracy(demo.foundations, data),
        "experts": {
            task: accuracy(own[number], demo.tasks[task].test.batches())
            for number, (task, own) in enumerate(demo.experts.items())
        },
    }


def score(
    demo: Demo,
    widening: Widening,
    units: Units,
    foundations: list[nn.Module],
    experts: dict[str, nn.Module],
) -> dict[str, Any]:
    """The parameters, the widths and the test accuracies of one choice of units."""
    both = merge_partial(dict(zip("ab", foundations, strict=True)), widening, units)
    tasks = merge_partial(experts, widening, units, heads="head")
    return {
        "growth": widening.growth(units),
        "widths": {group: int(index.max()) + 1 for group, index in units.items()},
        "foundations": accuracy(both, demo.pretraining.test.batches(), task="a"),
        "experts": {
            task: accuracy(tasks, demo.tasks[task].test.batches(), task=task) for task in experts
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    settings = parser.parse_args()
    for seed in settings.seeds:
        found = run(seed)
        path = settings.folder / f"partial_matching_seed{seed}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        for method in ("weights", "activations"):
            for name, curve in found[method].items():
                for key, at in curve.items():
                    print(
                        f"seed {seed}  {method:12} {name:7} {key:<5} growth {at['growth']:.3f}  "
                        f"foundations {at['foundations']:.4f}  "
                        f"experts {' '.join(f'{value:.4f}' for value in at['experts'].values())}"
                    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
