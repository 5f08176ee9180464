"""Refit beside TACT on the demo's networks, and on pairs of small GPTs, aligned and not.

    python benchmarks/experiments/refit.py demo gpt --seeds 0 1 2

writes one JSON per seed of the demo and one for all pairs of GPTs beside this file;
tests/experiments/test_refit_bands.py holds them to what was found before the library existed. Every
refit has its unaligned control: much of a barrier goes away without any alignment.
"""

import argparse
import copy
import itertools
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit
from torch import Tensor, nn
from transformer_barriers import SETTINGS, loss, quick, task_of, trained

import nlm
from nlm.align import orthogonal_matching
from nlm.demo.experiment import World, prepare
from nlm.gauge import find
from nlm.pipeline import choose

RESULTS = Path(__file__).parent / "results"
IMAGES = 512  # a task, to fit on
SCALE = 0.3
RIDGES = (0.03, 0.1, 0.3, 1.0)
ROWS = (
    (4, "permuted"), (4, "permuted by activations"), (4, "nonlocal"), (4, "local"),
    (8, "permuted"), (8, "permuted by activations"), (8, "local"),
)  # fmt: skip
CORRECTIONS = {"plain": "none", "tact": "tact", "refit": "refit", "refit_tact": "refit+tact"}


def demo(seed: int, images: int = IMAGES) -> dict[str, Any]:
    """Normalised test accuracies of Task Arithmetic; validation data choose the ridge."""
    world = replace(prepare(seed), samples=images)
    settings: dict[str, dict[str, Any]] = {}
    for count, setting in ROWS:
        settings.setdefault(setting, {})[str(count)] = rows(world, setting, count)
        for name, row in settings[setting][str(count)].items():
            numbers = f"{row['average']:.3f} {row['worst']:.3f}  ridge {row['ridge']}"
            print(f"{seed} {count} {setting:24} {name:14} {numbers}  {row['seconds']:.1f} s", flush=True)
    return {"seed": seed, "images": images, "scale": SCALE, "ridges": RIDGES, "settings": settings}


def rows(world: World, setting: str, count: int) -> dict[str, dict[str, Any]]:
    """Correction -> its scores; ``refit_default`` is refit at the ridge that it takes by itself."""
    aligned = world.aligned(setting, count)
    names = list(aligned.experts)
    known = world.expert_accuracy(setting, names, "validation")
    found = {}
    for name, correction in {**CORRECTIONS, "refit_default": "refit"}.items():
        ridges = RIDGES if name.startswith("refit") and name in CORRECTIONS else (None,)
        start = time.perf_counter()
        choice = choose(
            aligned, world.calibration, world.validation, correction=correction, scales=(SCALE,),
            ridges=ridges, max_samples=None, expert_scores=known,
        )  # fmt: skip
        seconds = (time.perf_counter() - start) / len(ridges)
        scores = world.score(setting, choice.model, names)
        found[name] = {
            "average": scores["average"], "worst": scores["worst"], "ridge": choice.ridge,
            "seconds": seconds,
        }  # fmt: skip
    return found


def gpt(seeds: Sequence[int], small: bool) -> dict[str, Any]:
    """The loss barriers halfway between two GPTs, averaged and refitted, aligned and not."""
    settings = quick(SETTINGS["gpt"]) if small else SETTINGS["gpt"]
    task = task_of("gpt", settings)
    networks = {seed: trained("gpt", seed, settings, task) for seed in seeds}
    generator = torch.Generator().manual_seed(7)
    calibration, _ = task.draw(settings.calibration, generator, False)
    test = task.draw(settings.evaluation, generator, True)
    spec = nlm.trace(networks[seeds[0]], calibration[:4])
    gauge = find(networks[seeds[0]], calibration[:4], spec)

    def filled(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        network = copy.deepcopy(network)
        network.load_state_dict(state)
        return network

    pairs = []
    for one, two in itertools.combinations(seeds, 2):
        raw = {str(seed): networks[seed] for seed in (one, two)}
        first, second = (filled(each, gauge.fold(each.state_dict())) for each in raw.values())
        matched = orthogonal_matching(first, second, gauge, list(calibration.split(100)))
        turned = filled(second, matched.apply(second.state_dict()))
        losses = {}
        for name, members in (("unaligned", raw), ("aligned", {"first": first, "second": turned})):
            members = dict(zip("ab", members.values(), strict=True))
            losses |= {f"{name} {kind}": value for kind, value in ladder(members, calibration, test)}
        ends = [measured(each, test) for each in raw.values()]
        mean = sum(ends) / 2
        barriers = {name: value - mean for name, value in losses.items()}
        pairs.append({"seeds": [one, two], "losses": ends, "barriers": barriers})
        for name, value in barriers.items():
            print(f"gpt {one} {two}  {name:24} {value:+.4f}", flush=True)
    return {"settings": asdict(settings), "pairs": pairs}


def ladder(
    members: dict[str, nn.Module], calibration: Tensor, test: tuple[Tensor, Tensor]
) -> list[tuple[str, float]]:
    """What is done to the average of two members, and the loss that it then has."""
    average = copy.deepcopy(members["a"])
    average.load_state_dict(nlm.merge(members, method="linear"))
    repaired = nlm.Repair.fit(average, members, {task: [calibration] for task in members}, max_samples=None)
    steps: dict[str, nn.Module] = {"average": average, "repair": repaired}
    for name, outputs in (("refit", False), ("refit with head", True)):
        steps[name] = nlm.refit(average, members, [calibration], outputs=outputs, max_samples=None)
    return [(name, measured(model, test)) for name, model in steps.items()]


@torch.no_grad()
def measured(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    inputs, targets = test
    return float(loss(model(inputs), targets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=["demo", "gpt"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="the folder of the JSON files")
    parser.add_argument("--quick", action="store_true", help="GPTs with next to no training")
    chosen = parser.parse_args()
    folder = chosen.results or RESULTS
    versions = {
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"nlm": nlm.__version__, "torch": torch.__version__}, "commit": commit(),
    }  # fmt: skip
    if "demo" in chosen.kinds:
        for seed in chosen.seeds:
            path = folder / f"refit_seed{seed}.json"
            path.write_text(json.dumps(demo(seed) | versions, indent=1) + "\n")
    if "gpt" in chosen.kinds:
        found = gpt(chosen.seeds, chosen.quick) | versions
        (folder / "refit_gpt.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
