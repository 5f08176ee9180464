"""Every merger under every correction, of experts aligned in every way, at 2 to 8 tasks.

    python benchmarks/experiments/every_merge.py --seeds 0 1 2

writes one JSON per seed to results/ beside this file; docs/every_merge.md is made of them by
``benchmarks/every_merge_page.py``. The networks and data are the demo's, which its cache names by a
hash of all that they depend on. Each merger stands at its default parameters. Factors on task
vectors and TALL-mask's thresholds are chosen on validation data under each correction, except for
refit and TACT on top of it, which take the factor that was best under TACT. TALL-mask makes a
network for each task, which leaves no layer that all share to be solved anew. A run that was ended
goes on where it was.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import RESULTS, commit, networks, unfinished, write

import nlm
from nlm.correct import correct, expert_moments
from nlm.demo.experiment import CALIBRATION, World, prepare
from nlm.merge import METHODS, fisher, regmean
from nlm.pipeline import Aligned, Choice, choose

SETTINGS = ("nonlocal", "permuted", "permuted by activations", "local")
COUNTS = (4, 8, 2, 6, 3, 5, 7)  # the order in which they are run
SAME = ("uniform_soup", "slerp")  # as linear, and for two experts alone
MERGERS = (*(name for name in METHODS if name not in SAME), "regmean")
UNSCALED = ("linear", "model_stock", "fisher", "regmean")
RANDOM = ("dare", "dare_ties", "della", "della_linear")
CHOSEN = ("none", "repair", "least_squares", "data_free", "tact")  # each at a scale of its own
APART = ("tall_mask",)  # nothing to refit
MULTIPLES = (1.0, 2.0)  # of 1 / tasks
THRESHOLDS = (0.3, 0.5)


def result_path(seed: int) -> Path:
    return RESULTS / f"every_merge_seed{seed}.json"


def run(
    world: World,
    counts: Sequence[int],
    found: dict[str, Any],
    mergers: Sequence[str] = MERGERS,
    settings: Sequence[str] = SETTINGS,
    save: Callable[[dict[str, Any]], object] = lambda found: None,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Number of tasks -> setting -> merger -> correction -> average, worst, scale and seconds."""
    fishers: dict[tuple[str, str], Any] = {}
    for count in counts:
        for setting in settings:
            at = found["counts"].setdefault(str(count), {}).setdefault(setting, {})
            if all(merger in at for merger in mergers):
                continue
            of_setting = Setting(world, setting, count, fishers)
            for merger in mergers:
                if merger not in at:
                    at[merger] = dict(of_setting.rows(merger))
                    told = ", ".join(f"{k} {row['average']:.3f}" for k, row in at[merger].items())
                    progress(f"{count} tasks, {setting}, {merger}: {told}")
                    save(found)
    return found


class Setting:
    """Some experts in one order, with all that every merger and correction asks for."""

    def __init__(
        self, world: World, setting: str, count: int, fishers: dict[tuple[str, str], Any]
    ) -> None:
        self.world, self.setting, self.fishers = world, setting, fishers
        self.aligned: Aligned = world.aligned(setting, count)
        self.names = list(self.aligned.experts)
        self.calibration = {name: world.calibration[name] for name in self.names}
        self.moments = expert_moments(self.aligned.experts, self.calibration, max_samples=None)

    def rows(self, merger: str) -> Iterator[tuple[str, dict[str, float]]]:
        """Each correction and what it leaves of the experts' accuracy."""
        choice: Choice | None = None
        for correction in CHOSEN:
            start = time.perf_counter()
            choice = self.chosen(merger, correction)
            yield correction, self.scored(choice.model, choice.scale, start)
        assert choice is not None
        if merger in APART:
            return
        experts, start = self.aligned.experts, time.perf_counter()
        merged = choice.merged.model(experts[self.names[0]])
        solved = nlm.refit(merged, experts, self.calibration, max_samples=None)
        yield "refit", self.scored(solved, choice.scale, start)
        start = time.perf_counter()
        options = {"max_samples": None, "moments": self.moments}
        both = nlm.Tact.fit(solved, experts, self.calibration, **options)
        yield "refit+tact", self.scored(both, choice.scale, start)

    def chosen(self, merger: str, correction: str) -> Choice:
        """The merger under a correction, at the scale that validation data choose."""
        if merger == "regmean":
            return self.by_regmean(correction)
        count = len(self.names)
        scales = [1.0] if merger in UNSCALED else [round(m / count, 4) for m in MULTIPLES]
        return choose(
            self.aligned, self.calibration, self.world.validation, method=merger,
            correction=correction, scales=scales, mask_thresholds=THRESHOLDS, max_samples=None,
            correct_options={} if correction == "data_free" else {"moments": self.moments},
            expert_scores=self.world.expert_accuracy(self.setting, self.names, "validation"),
            **self.of_merger(merger),
        )  # fmt: skip

    def by_regmean(self, correction: str) -> Choice:
        """Least squares on the experts' own inputs; there is nothing to choose."""
        experts, merged = self.aligned.experts, self.regmean
        model = merged.model(experts[self.names[0]])
        options = {} if correction == "data_free" else {"max_samples": None}
        if correction in ("tact", "repair"):
            options["moments"] = self.moments
        corrected = correct(model, experts, self.calibration, correction, **options)
        return Choice(corrected, merged, 1.0, {})

    @cached_property
    def regmean(self) -> nlm.Merged:
        return regmean(self.aligned.experts, self.calibration, heads=["head"])

    def of_merger(self, merger: str) -> dict[str, Any]:
        """What a merger needs besides the experts."""
        if merger in RANDOM:
            return {"seed": self.world.demo.seed}
        if merger == "fisher":
            for name, expert in self.aligned.experts.items():
                if (self.setting, name) not in self.fishers:
                    found = fisher(expert, self.calibration[name])
                    self.fishers[self.setting, name] = found
            return {"fishers": {name: self.fishers[self.setting, name] for name in self.names}}
        return {}

    def scored(self, model: torch.nn.Module, scale: float, start: float) -> dict[str, float]:
        """A row: seconds are those of choosing and fitting, before the test."""
        seconds = time.perf_counter() - start
        scores: Mapping[str, float] = self.world.score(self.setting, model, self.names)
        found = {name: scores[name] for name in ("average", "worst")}
        return {**found, "scale": scale, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    options = parser.parse_args()
    for seed in options.seeds:
        world = prepare(seed)
        path = result_path(seed)
        facts = {
            "seed": seed, "images": CALIBRATION, "multiples": MULTIPLES, "thresholds": THRESHOLDS,
            "networks": networks(world.demo), "threads": torch.get_num_threads(),
            "versions": {"nlm": nlm.__version__, "torch": torch.__version__}, "commit": commit(),
        }  # fmt: skip
        run(
            world, options.counts, unfinished(path, {**facts, "counts": {}}),
            save=lambda found, path=path: write(path, found),
        )  # fmt: skip


if __name__ == "__main__":
    main()
