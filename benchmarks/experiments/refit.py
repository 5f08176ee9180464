"""Refit beside TACT on the demo's networks.

    python benchmarks/experiments/refit.py --seeds 0 1 2

writes one JSON per seed beside this file. Every refit has its unaligned control: much comes back
without any alignment. What refit leaves between two transformers, transformer_barriers.py says.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit, networks

import nlm
from nlm.demo.experiment import World, prepare
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
DEFAULT = "refit_default"


def demo(seed: int, images: int = IMAGES) -> dict[str, Any]:
    """Normalised test accuracies of Task Arithmetic; validation data choose the ridge."""
    world = replace(prepare(seed), samples=images)
    settings: dict[str, dict[str, Any]] = {}
    for count, setting in ROWS:
        settings.setdefault(setting, {})[str(count)] = rows(world, setting, count)
        for name, row in settings[setting][str(count)].items():
            numbers = f"{row['average']:.3f} {row['worst']:.3f}  ridge {row['ridge']}"
            print(
                f"{seed} {count} {setting:24} {name:14} {numbers}  {row['seconds']:.1f} s",
                flush=True,
            )
    return {
        "seed": seed, "networks": networks(world.demo), "images": images, "scale": SCALE,
        "ridges": RIDGES, "settings": settings,
    }  # fmt: skip


def rows(
    world: World,
    setting: str,
    count: int,
    all_ridges: Sequence[float | None] = RIDGES,
    names: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Correction -> its scores; ``refit_default`` is refit at the ridge that it takes by itself."""
    aligned = world.aligned(setting, count)
    tasks = list(aligned.experts)
    known = world.expert_accuracy(setting, tasks, "validation")
    found = {}
    for name, correction in {**CORRECTIONS, DEFAULT: "refit"}.items():
        if names is not None and name not in names:
            continue
        ridges = all_ridges if name.startswith("refit") and name in CORRECTIONS else (None,)
        start = time.perf_counter()
        choice = choose(
            aligned, world.calibration, world.validation, correction=correction, scales=(SCALE,),
            ridges=ridges, max_samples=None, expert_scores=known,
        )  # fmt: skip
        seconds = (time.perf_counter() - start) / len(ridges)
        scores = world.score(setting, choice.model, tasks)
        found[name] = {
            "average": scores["average"], "worst": scores["worst"], "ridge": choice.ridge,
            "seconds": seconds,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the folder of the JSON files"
    )
    chosen = parser.parse_args()
    facts = {
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"nlm": nlm.__version__, "torch": torch.__version__}, "commit": commit(),
    }  # fmt: skip
    for seed in chosen.seeds:
        path = chosen.results / f"refit_seed{seed}.json"
        path.write_text(json.dumps(demo(seed) | facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
