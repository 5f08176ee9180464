"""Refit with a part of low rank for each task, beside refit and TACT, on the demo's networks.

    python benchmarks/experiments/low_rank.py --seeds 0 1 2

writes one JSON per seed beside this file, after each setting; a run that was ended goes on. What
is refitted is what ``refit.py`` refits, at its default ridge; each task's part weighs at most
``SHARE`` of the layers, and validation data choose its ridge. What full rank would give (a network
for each task) stands beside it. With ``--zero`` the same without task vectors, at a scale of 0 and
the first ridge (low_rank_zero_*.json).
"""

import argparse
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit, networks, unfinished, write
from refit import IMAGES, SCALE
from torch import nn

import nlm
from nlm.correct import LowRank
from nlm.demo.experiment import World, prepare
from nlm.evaluate import accuracy, normalized_accuracy
from nlm.pipeline import Aligned, choose

RESULTS = Path(__file__).parent / "results"
SHARE = 0.05
FULL = 100.0  # a share with which no rank is limited
RIDGES = (0.1, 0.3, 1.0)
ROWS = (
    (4, "permuted by activations"), (4, "nonlocal"), (4, "local"),
    (8, "permuted by activations"), (8, "local"),
)  # fmt: skip


def demo(
    world: World,
    found: dict[str, Any],
    save: Callable[[dict[str, Any]], object],
    scale: float = SCALE,
) -> None:
    """Normalised test accuracies of Task Arithmetic; ``save`` gets what there is so far."""
    for count, setting in ROWS:
        at = found["settings"].setdefault(setting, {})
        if str(count) in at:
            continue
        rows = at[str(count)] = measure(world, setting, count, scale)
        for name, row in rows.items():
            print(f"{world.demo.seed} {count} {setting:24} {name:14} {row}", flush=True)
        save(found)


def measure(
    world: World, setting: str, count: int, scale: float = SCALE
) -> dict[str, dict[str, Any]]:
    """Correction -> its scores, seconds and bytes a task."""
    aligned = world.aligned(setting, count)
    names = list(aligned.experts)
    data = {name: world.calibration[name] for name in names}
    own = world.expert_accuracy(setting, names, "validation")
    plain = choose(
        aligned, data, world.validation, correction="none", scales=(scale,), expert_scores=own
    ).model
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, model: nn.Module, seconds: float, size: int = 0, **more: Any) -> None:
        scores = world.score(setting, model, names)
        kept = {"average": scores["average"], "worst": scores["worst"]}
        found[name] = {**kept, "seconds": seconds, "bytes": size // count, **more}

    def tact(model: nn.Module) -> nlm.Tact:
        return nlm.Tact.fit(model, aligned.experts, data, max_samples=None)

    fitted, seconds = timed(lambda: tact(plain))
    note("tact", fitted, seconds, fitted.parameter_bytes)
    solved, seconds = timed(lambda: nlm.refit(plain, aligned.experts, data, max_samples=None))
    note("refit", solved, seconds)
    fitted, more = timed(lambda: tact(solved))
    note("refit_tact", fitted, seconds + more, fitted.parameter_bytes)
    parts = (("low_rank", SHARE, RIDGES), ("full_rank", FULL, RIDGES[1:2]))
    for name, share, ridges in parts if scale else (("low_rank", SHARE, RIDGES[:1]),):
        best, ridge, more = chosen(world, aligned, solved, data, own, share, ridges)
        note(name, best, seconds + more, best.parameter_bytes, ridge=ridge)
        if name == "low_rank":
            fitted, last = timed(lambda best=best: tact(best))
            size = best.parameter_bytes + fitted.parameter_bytes
            note("low_rank_tact", fitted, seconds + more + last, size, ridge=ridge)
    trunk = sum(
        tensor.nbytes for name, tensor in aligned.experts[names[0]].state_dict().items()
        if name.startswith("trunk.")
    )  # fmt: skip
    return {name: {**row, "share": row["bytes"] / trunk} for name, row in found.items()}


def chosen(
    world: World,
    aligned: Aligned,
    model: nn.Module,
    data: Mapping[str, Any],
    own: Mapping[str, float],
    share: float,
    ridges: tuple[float, ...],
) -> tuple[LowRank, float, float]:
    """The parts at the ridge that is best on validation data, the ridge, and seconds of a fit."""
    tried = []
    for ridge in ridges:
        fitted, seconds = timed(
            lambda ridge=ridge: LowRank.fit(
                model, aligned.experts, data, share=share, ridge=ridge, max_samples=None
            )
        )
        right = {name: accuracy(fitted, world.validation[name], task=name) for name in own}
        tried.append((normalized_accuracy(right, own)["average"], fitted, ridge, seconds))
    _, fitted, ridge, seconds = max(tried, key=lambda each: each[0])
    return fitted, ridge, seconds


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the folder of the JSON files"
    )
    parser.add_argument("--zero", action="store_true", help="without task vectors")
    given = parser.parse_args()
    scale = 0.0 if given.zero else SCALE
    facts = {
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"nlm": nlm.__version__, "torch": torch.__version__}, "commit": commit(),
        "images": IMAGES, "scale": scale, "share": SHARE, "ridges": RIDGES,
    }  # fmt: skip
    for seed in given.seeds:
        world = replace(prepare(seed), samples=IMAGES)
        start = {**facts, "seed": seed, "networks": networks(world.demo), "settings": {}}
        path = given.results / f"low_rank{'_zero' if given.zero else ''}_seed{seed}.json"
        demo(world, unfinished(path, start), partial(write, path), scale)


if __name__ == "__main__":
    main()
