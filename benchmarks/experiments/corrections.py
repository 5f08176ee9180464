"""Corrections beside one another: what each gains, needs, stores and costs.

    python benchmarks/experiments/corrections.py --seeds 0 1 2

merges the demo's experts by Task Arithmetic in three settings and writes one JSON per network and
seed beside this file; docs/corrections.md is made of them. The scale is chosen on validation data
for each correction; beside it stands what the correction gives at scale 0, without task vectors.
A run that was ended goes on where it was; ``--add`` measures the rows that results of the same
networks and number of threads lack, whatever revision those are of, and names its own. With
``--every-number`` the shared corrections and TACT alone are compared, on aligned experts, at every
number of tasks (every_number_*.json); with ``--without-data`` those that need none, TACT on white
noise among them (without_data_*.json).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import CHANGED, commit, networks, unfinished, write
from torch import nn

from nlm._modules import NORMS
from nlm.correct import Correction, random_fields
from nlm.demo import Settings
from nlm.demo.experiment import (
    CALIBRATION,
    PROBE_LABELS,
    SCALES_TIMES_TASKS,
    World,
    prepare,
    probed,
)
from nlm.pipeline import Aligned, Choice, choose, correct

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("permuted", "nonlocal", "local")
COUNTS = {"cnn64": (2, 4, 8), "cnn64_norm": (4,)}
EVERY = range(2, 9)
SHORT = ("none", "repair", "least_squares", "refit", "refit_fields", "tact")
FREE = ("none", "shared_free", "free", "noise", "tact")


@dataclass(frozen=True)
class Row:
    """A correction of the table.

    ``labels`` is the budget of a linear probe on the merged trunk. ``inputs`` are the tasks'
    images, white noise of its own for each task, or random fields, the same for all.
    """

    title: str
    needs: str
    correction: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: int = 0
    inputs: str = "images"


IMAGES = f"{CALIBRATION} images"
ROWS = {
    "none": Row("none", "nothing"),
    "batch_norm": Row("BatchNorm reset", IMAGES, "batch_norm"),
    "repair": Row("REPAIR", IMAGES, "repair"),
    "least_squares": Row("least squares, shared", IMAGES, "least_squares"),
    "refit": Row("refit, shared", IMAGES, "refit"),
    "refit_fields": Row(
        "refit on 1,024 random fields, shared", "nothing", "refit", inputs="fields"
    ),
    "shared_free": Row("row lengths, shared", "nothing", "data_free", {"shared": True}),
    "free": Row("row lengths", "a task id", "data_free"),
    "tact": Row("TACT", f"{IMAGES}, a task id", "tact"),
    "tact_once": Row("TACT, all at once", f"{IMAGES}, a task id", "tact_at_once"),
    "probe": Row("linear probe", f"{CALIBRATION} labels", labels=CALIBRATION),
    "probe_full": Row("linear probe", f"{PROBE_LABELS} labels", labels=PROBE_LABELS),
}

NOISE = {"noise": Row("TACT, white noise", "a task id", "tact", inputs="noise")}  # in no table


def result_path(network: str, seed: int) -> Path:
    return RESULTS / f"corrections_{network}_seed{seed}.json"


def run(
    world: World,
    counts: Sequence[int],
    settings: Sequence[str] = SETTINGS,
    progress: Callable[[str], None] = print,
    found: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], object] = lambda found: None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Setting -> number of tasks -> row -> its figures, and what the rows are.

    ``found`` is what an earlier run has done; ``save`` gets what there is after each row, and under
    "added" the ``revision`` of rows that are new, where it is told.
    """
    rows = {name: row for name, row in ROWS.items() if name != "batch_norm" or _has_norms(world)}
    found = {"settings": {}} if found is None else found
    found |= {"seed": world.demo.seed, "calibration": world.samples}
    found["rows"] = {name: {"title": row.title, "needs": row.needs} for name, row in rows.items()}

    for setting in settings:
        for count in counts:
            at = found["settings"].setdefault(setting, {}).setdefault(str(count), {})
            for name in fill(world, setting, count, rows, at):
                if revision is not None:
                    found["added"][name] = revision
                progress(f"{setting}, {count} tasks, {name}: {at[name]['average']:.3f}")
                save(found)
    return found


def committed(path: Path, start: Mapping[str, Any]) -> dict[str, Any]:
    """A result to which rows may be added: of the same networks and threads, at any revision.

    Raises
    ------
    SystemExit
        There is none, it is of others, or sources differ from the revision that would be named.
    """
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in ("network", "seed", "networks", "threads"):
        if found.get(name) != start[name]:
            raise SystemExit(
                f"corrections: rows are added to a result of the same {name}, got "
                f"{found.get(name)!r} in {path} and {start[name]!r} here"
            )
    if start["commit"].endswith(CHANGED):
        raise SystemExit(f"corrections: rows are added by a revision, got {start['commit']}")
    known = found["settings"].values()
    measured = {row for setting in known for at in setting.values() for row in at}
    added = {name: at for name, at in found.get("added", {}).items() if name in measured}
    return found | {"added": added}


def fill(
    world: World, setting: str, count: int, names: Iterable[str], at: dict[str, Any]
) -> Iterator[str]:
    """Measures the rows that a table lacks, and yields their names."""
    aligned = world.aligned(setting, count)
    for name in names:
        if name not in at:
            at[name] = asdict(measure(world, setting, aligned, (ROWS | NOISE)[name]))
            yield name


def every_number(
    world: World,
    counts: Iterable[int],
    found: dict[str, Any],
    save: Callable[[dict[str, Any]], object] = lambda found: None,
    progress: Callable[[str], None] = print,
    names: Iterable[str] = SHORT,
) -> dict[str, Any]:
    """Number of tasks -> the figures of a few corrections of aligned experts."""
    for count in counts:
        at = found["counts"].setdefault(str(count), {})
        for name in fill(world, "permuted", count, names, at):
            progress(f"{count} tasks, {name}: {at[name]['average']:.3f}")
            save(found)
    return found


@dataclass
class Figures:
    """Average and worst normalised test accuracy, the same at scale 0, and the price.

    ``bytes`` are those of each task's own parameters beside its head: shared corrections can be
    folded into the weights. ``seconds`` are those of one fit, with all that it has to run.
    """

    average: float
    worst: float
    scale: float
    average_at_zero: float
    worst_at_zero: float
    seconds: float
    bytes: int


def measure(world: World, setting: str, aligned: Aligned, row: Row) -> Figures:
    names = list(aligned.experts)
    calibration = {name: world.calibration[name] for name in names}
    shape = next(iter(calibration[names[0]])).shape
    if row.inputs == "fields":
        calibration = dict.fromkeys(names, random_fields(shape[1:]))
    elif row.inputs == "noise":
        random = torch.Generator().manual_seed(world.demo.seed)
        calibration = {name: [torch.randn(shape, generator=random)] for name in names}

    def chosen(scales: Sequence[float]) -> Choice:
        return choose(
            aligned, calibration, world.validation, correction=row.correction, scales=scales,
            max_samples=None, correct_options=row.options,
            expert_scores=world.expert_accuracy(setting, names, "validation"),
        )  # fmt: skip

    def scored(model: nn.Module) -> dict[str, float]:
        return world.score(setting, model, names)

    choice = chosen([round(multiple / len(names), 4) for multiple in SCALES_TIMES_TASKS])
    nothing = chosen((0.0,))
    start = time.perf_counter()
    if row.labels:
        model = probed(world, choice, row.labels)
        seconds = time.perf_counter() - start
        own, zero = scored(model), scored(probed(world, nothing, row.labels))
    else:
        budget = {} if row.correction == "data_free" else {"max_samples": None}
        merged = choice.merged.model(aligned.experts[names[0]])
        correct(merged, aligned.experts, calibration, row.correction, **budget, **row.options)
        seconds = time.perf_counter() - start
        own, zero = scored(choice.model), scored(nothing.model)
    stored = 0
    if isinstance(choice.model, Correction) and len(set(choice.model.rows.values())) > 1:
        stored = choice.model.parameter_bytes // len(names)
    return Figures(
        own["average"], own["worst"], choice.scale, zero["average"], zero["worst"], seconds, stored
    )


def _has_norms(world: World) -> bool:
    return any(isinstance(module, NORMS) for module in world.demo.foundations[0].modules())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", default=list(COUNTS), choices=list(COUNTS))
    parser.add_argument("--every-number", action="store_true")
    parser.add_argument("--add", action="store_true", help="the rows that results lack")
    parser.add_argument("--without-data", action="store_true")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.add and (arguments.every_number or arguments.without_data):
        parser.error("--add goes with neither --every-number nor --without-data")
    facts = {"threads": torch.get_num_threads(), "commit": commit()}
    for network in arguments.networks:
        for seed in arguments.seeds:
            told = partial(print, network, seed, flush=True)
            counts = EVERY if arguments.every_number else COUNTS[network]
            world = prepare(seed, max(counts), settings=Settings(network))
            path = arguments.folder / result_path(network, seed).name
            start = {"network": network, "seed": seed, "networks": networks(world.demo), **facts}
            if arguments.every_number:
                path = path.with_name(path.name.replace("corrections", "every_number"))
                found = unfinished(path, {**start, "counts": {}})
                every_number(world, counts, found, partial(write, path), told)
            elif arguments.without_data:
                path = path.with_name(path.name.replace("corrections", "without_data"))
                found = unfinished(path, {**start, "counts": {}})
                every_number(world, counts, found, partial(write, path), told, FREE)
            else:
                if arguments.add:
                    found, revision = committed(path, start), facts["commit"]
                else:
                    found, revision = unfinished(path, {**start, "settings": {}}), None
                save = partial(write, path)
                save(run(world, counts, SETTINGS, told, found, save, revision))


if __name__ == "__main__":
    main()
