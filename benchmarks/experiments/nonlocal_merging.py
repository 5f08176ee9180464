"""Non-local merging on real data: the demo's comparison, with more mergers, on several seeds.

    python benchmarks/experiments/nonlocal_merging.py --seeds 0 1 2

writes one JSON per seed beside this file. README's table is made from them, and
tests/experiments/test_bands.py holds them to what was found before the library existed.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import nlm
from nlm.demo import experiment
from nlm.demo.experiment import World, compare, prepare
from nlm.pipeline import choose

RESULTS = Path(__file__).parent / "results"
CALIBRATION_SIZES = (8, 32, 64, 128, 512)


def result_path(seed: int) -> Path:
    return RESULTS / f"nonlocal_merging_seed{seed}.json"


def run(seed: int) -> dict[str, Any]:
    """The demo's results for all eight tasks, and what the demo leaves out."""
    results = experiment.run(seed, thorough=True)
    world = prepare(seed)
    results["activation_matching"] = {
        str(count): compare(world, "permuted by activations", count, controls=())[0]
        for count in (4, 8)
    }
    results["mergers"] = {
        method: {
            str(count): compare(
                world, "permuted", count, method, corrections=("plain", "tact"), controls=()
            )[0]
            for count in (4, 8)
        }
        for method in ("ties", "tall_mask")
    }
    results["calibration_sizes"] = calibration_sizes(world)
    results["permuted_logits"] = permuted_logits(world)
    results["machine"] = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    results["commit"] = commit()
    return results


def calibration_sizes(world: World) -> dict[str, float]:
    """Unlabelled images per task -> average normalised accuracy of TACT at four tasks."""
    found = {}
    for samples in CALIBRATION_SIZES:
        sized = dataclasses.replace(world, samples=samples)
        aligned = sized.aligned("permuted", 4)
        choice = choose(
            aligned, sized.calibration, sized.validation, scales=(0.3, 0.5, 0.7), max_samples=None
        )
        score = sized.score("permuted", choice.model, list(aligned.experts))
        found[str(samples)] = score["average"]
    return found


def permuted_logits(world: World) -> float:
    """The largest change of a logit when the second foundation is permuted."""
    images = world.demo.pretraining.test.inputs
    second = world.demo.foundations[1]
    moved = world.aligned("permuted", 1).foundations[1]
    with torch.no_grad():
        change = torch.func.functional_call(second, moved, (images,)) - second(images)
    return float(change.abs().max())


def commit() -> str:
    """The revision that was measured."""
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or f"nlm {nlm.__version__}"


def unfinished(path: Path, start: dict[str, Any]) -> dict[str, Any]:
    """What a run of the same revision has written before it ended, or else ``start``."""
    if path.exists():
        found = json.loads(path.read_text())
        if found.get("commit") == start["commit"]:
            return found
    return start


def write(path: Path, found: dict[str, Any]) -> None:
    """Writes a JSON whole or not at all."""
    new = path.with_suffix(".part")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    RESULTS.mkdir(exist_ok=True)
    for seed in seeds:
        result_path(seed).write_text(json.dumps(run(seed), indent=1) + "\n")


if __name__ == "__main__":
    main()
