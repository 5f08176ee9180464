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
from nlm.demo import Demo, cache, experiment
from nlm.demo.experiment import World, compare, prepare
from nlm.pipeline import choose

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SOURCES = (
    ":(top)nlm", ":(top)csrc", ":(top)kernels", ":(top)benchmarks",
    ":(top,exclude)benchmarks/results", ":(top,exclude)benchmarks/experiments/results",
)  # fmt: skip
CHANGED = "-changed"
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
    results |= {"commit": commit(), "networks": networks(world.demo)}
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
    """The revision that was measured, marked where sources differ from it."""
    head = _git("rev-parse", "HEAD")
    changed = CHANGED if head and _git("status", "--porcelain", "--", *SOURCES) else ""
    return head + changed if head else f"nlm {nlm.__version__}"


def _git(*command: str) -> str:
    asked = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def networks(demo: Demo) -> str:
    """A digest of the trained networks.

    The cache names them by their settings; another number of threads, processor or PyTorch trains
    others, which score otherwise.
    """
    trained = {f"foundation {n}": each for n, each in enumerate(demo.foundations)}
    for name, experts in demo.experts.items():
        trained |= {f"{name} {number}": expert for number, expert in experts.items()}
    return cache.digest(
        {f"{of} {k}": t for of, each in trained.items() for k, t in each.state_dict().items()}
    )[:16]


def unfinished(path: Path, start: dict[str, Any]) -> dict[str, Any]:
    """What a run that was ended has written, or else ``start``.

    It goes on where all that ``start`` says, but for what is empty there, is as it was, the
    revision among it; and never where sources had been changed.
    """
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        said = json.loads(json.dumps(start))
        alike = all(found.get(name) == value for name, value in said.items() if value != {})
        if alike and not start["commit"].endswith(CHANGED):
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
