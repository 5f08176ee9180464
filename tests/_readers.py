"""Everything in nlm that reads a file: how a good one is made, how it is read and then used.

:func:`examine` holds a reader to its rule on any bytes: what it was asked for, or an error of its
own in one sentence; no other error, no hang, no large allocation.
"""

import json
import os
import resource
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _networks import mlp, vectors
from _tool_files import WIDTH, Labelled, adapter, head, lines, score
from safetensors.torch import save_file

import nlm
from nlm.align import AlignmentResult, JointAlignment, OrthogonalAlignment, align_many
from nlm.checkpoint import open_checkpoint, read_tensors
from nlm.checkpoint.mapping import MappedFiles
from nlm.checkpoint.tensors import read_shapes
from nlm.cli import bench_compare, spec_commands
from nlm.cli import report as report_command
from nlm.correct.by_name import load_correction
from nlm.integrations.peft import align_adapter
from nlm.loading import _head
from nlm.recipe import RecipeError, read_recipe
from nlm.recipe.data import _lines, open_data
from nlm.recipe.measuring import check_score
from nlm.statistics import CrossMoments, Moments

MEMORY = 1 << 30  # bytes that reading a file of a few thousand may take beyond what is there
SECONDS = 20.0


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes
    ----------
    name : of the file that is changed, in a folder that ``make`` fills.
    form : see :func:`_mutations.mutated`.
    make : puts a good file, and what belongs to it, into a folder.
    read : reads it and uses what was read.
    """

    name: str
    form: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]


def small() -> torch.nn.Sequential:
    return mlp(0, WIDTH, 3, 4)


@cache
def spec() -> nlm.PermutationSpec:
    return nlm.trace(small(), vectors(4, features=4))


@cache
def tact() -> nlm.Tact:
    experts = {task: mlp(seed, WIDTH, 3, 4) for seed, task in enumerate("ab", 1)}
    data = {task: [vectors(16, seed, 4)] for seed, task in enumerate("ab")}
    return nlm.Tact.fit(small(), experts, data)


def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2).bfloat16()}


def checkpoint_file(folder: Path) -> None:
    save_file(tensors(), folder / "t.safetensors", {"format": "pt"})


def read_checkpoint(file: Path) -> None:
    with MappedFiles([found := open_checkpoint(file)]) as files:
        for entry in found.tensors.values():
            files.bytes(entry).tobytes()


def sharded(folder: Path) -> None:
    weights = {}
    for number, (name, tensor) in enumerate(tensors().items()):
        weights[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / weights[name])
    write(folder / "model.safetensors.index.json", {"weight_map": weights, "metadata": {}})
    write(folder / "config.json", {"hidden_size": 2})


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


def pickled(folder: Path) -> None:
    torch.save({"model": {**tensors(), "tied": torch.ones(2)}, "epoch": 3}, folder / "w.pt")


def shapes_and_tensors(file: Path) -> None:
    read_shapes(file)
    read_tensors(file)


RECIPES = {
    "recipe.yaml": """
foundations: {one: models/one, two: models/two}
base: one
align: {method: activations, spec: spec.json, data: c.safetensors, samples: 256}
experts: &e
  digits: {path: experts/digits, foundation: one}
  greek:
    path: experts/greek
    foundation: two
    weight: [0.2, 1.0]
    density: [{filter: mlp, value: 0.3}, {value: 0.2}]
method: ties
parameters: {scale: 0.4, density: 0.2, dialect: mergekit}
correct: {method: tact, samples: 128, data: {digits: d.txt, greek: m:f}}
heads: [classifier]
output: {path: merged, dtype: bfloat16, shard: 5GB, per_task: folded}
""",
    "mergekit.yaml": """
merge_method: ties
base_model: base
slices:
- sources:
  - {model: base, layer_range: [0, 4]}
  - model: one
    layer_range: [0, 4]
    parameters: {weight: [0.2, 1e-1], density: [{filter: mlp, value: 0.3}, {value: 1}]}
parameters: {normalize: true, int8_mask: true, lambda: 0.5}
dtype: bfloat16
tokenizer: {source: base}
""",
}


def recipe(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(RECIPES[name]) and None


def use_spec(found: nlm.PermutationSpec) -> None:
    found.show()
    found.digest()
    state = small().state_dict()
    found.apply({}, state)
    found.inverse(found.random(0))


def read_table(file: Path) -> None:
    table = spec_commands._read_table(file)
    use_spec(nlm.PermutationSpec.from_axes_to_perm(table, small().state_dict()))


def table(folder: Path) -> None:
    write(folder / "table.yaml", {k: list(v) for k, v in spec().to_axes_to_perm().items()})


def alignment(folder: Path) -> None:
    nlm.align(small(), mlp(1, WIDTH, 3, 4), spec()).save(folder / "a.safetensors")


def use_alignment(file: Path) -> None:
    found = AlignmentResult.load(file)
    spec().apply(found.permutation, small().state_dict())


def joint(folder: Path) -> None:
    models = [mlp(seed, WIDTH, 3, 4) for seed in range(3)]
    align_many(models, spec()).save(folder / "j.safetensors")


def orthogonal(folder: Path) -> None:
    from gauge._transformers import PRE_NORM, made

    network, inputs = made(PRE_NORM["gpt2"])
    other = made(PRE_NORM["gpt2"])[0]
    found = nlm.align(network, other, nlm.trace(network, inputs), "orthogonal", data=[inputs])
    found.save(folder / "o.safetensors")


def moments(folder: Path) -> None:
    Moments.of(vectors(5)).save(folder / "m.safetensors")


def cross_moments(folder: Path) -> None:
    found = CrossMoments.zeros(4)
    found.update(vectors(5, features=4))
    found.save(folder / "c.safetensors")


def use_moments(file: Path) -> None:
    found = Moments.load(file)
    (found + found).variance.sum()


def use_cross_moments(file: Path) -> None:
    found = CrossMoments.load(file)
    (found + found).correlation()


def use_correction(file: Path) -> None:
    found = load_correction(file, small())
    for task in found.tasks:
        found(vectors(2, features=4), task=task)


def merged(folder: Path) -> None:
    experts = {task: mlp(seed, WIDTH, 3, 4) for seed, task in enumerate("ab", 1)}
    made = nlm.merge(experts, base=small(), method="tall_mask", heads=["4"])
    made.save(folder / "m.safetensors")


def use_merged(file: Path) -> None:
    found = nlm.Merged.load(file)
    found.replaced(found.tensors())
    model = found.model(small())
    for task in found.tasks:
        model(vectors(2, features=4), task=task)


def results(folder: Path) -> None:
    per = {"average": 0.5, "worst": 0.25}
    layer = {"plain": [1.0, 0.5], "tact": [0.9, 0.4]}
    groups = {"g0": {"units": "4 units", "origin": "0"}}
    found = {"correlation": {"g0": 0.5}, "seconds": 1.0, "groups": groups}
    write(
        folder / "r.json",
        {"seconds": 3.0, "title": "t", "settings": {"local": {"2": {"plain": per, "tact": per}}},
         "barrier": {"lambda": [0.0, 0.5, 1.0], "loss": {"plain": [1.0, 2.0, 1.0]},
                     "barrier": {"plain": 1.0}}, "alignment": {"weights": found},
         "layers": {"points": ["0", "2"], "variance_ratio": layer, "relative_distance": layer},
         "projections": {"p": {"a": [[0.0, 1.0], [2.0, 3.0]]}}, "run": {"seed": 0},
         "landscapes": {"l": {"x": [0.0, 1.0], "y": [0.0, 1.0], "values": {"m": [[1.0, 2.0]] * 2},
                              "models": {"a": [0.0, 0.0, 1.0]}}},
         "foundations": {"one": 0.5}, "experts": {"a": 0.9}, "tasks": ["a"], "notes": ["n"],
         "timings": {"t": 1.0}, "versions": {"torch": "2"}, "lead": "l", "seed": 0},
    )  # fmt: skip


def use_results(file: Path) -> None:
    """Pictures take a tenth of a second: drawn by night."""
    found = report_command.read(file)
    if os.environ.get("HYPOTHESIS_PROFILE") == "nightly":
        report_command.render(found)


def benchmarks(folder: Path) -> None:
    row = {"op": "dare", "workload": "w", "dtype": "f", "threads": 1, "provider": "nlm"}
    write(folder / "b.json", {"machine": "m", "rows": [{**row, "median_s": 1.0}]})


def use_benchmarks(file: Path) -> None:
    report = bench_compare._load(file)
    bench_compare._rows(report)


def npz(folder: Path) -> None:
    np.savez(folder / "d.npz", input=vectors(5, features=4).numpy())


def inputs(folder: Path) -> None:
    save_file({"input": vectors(5, features=4)}, folder / "d.safetensors")


def use_data(file: Path) -> None:
    for batch in open_data(str(file), small(), None, "nlm.test"):
        small()(**batch)


def use_adapter(file: Path) -> None:
    align_adapter(file.parent, spec().random(1), spec())


def shared_spec(name: str) -> Callable[[Path], None]:
    return lambda folder: spec().save(folder / name)


KINDS = {
    "checkpoint": Kind("t.safetensors", "safetensors", checkpoint_file, read_checkpoint),
    "index": Kind(
        "model.safetensors.index.json", "json", sharded, lambda file: read_checkpoint(file.parent)
    ),
    "config": Kind("config.json", "json", sharded, lambda file: open_checkpoint(file.parent)),
    "pickle": Kind("w.pt", "zip", pickled, read_checkpoint),
    "tensors": Kind("t.safetensors", "safetensors", checkpoint_file, shapes_and_tensors),
    "recipe": Kind("recipe.yaml", "text", recipe("recipe.yaml"), read_recipe),
    "recipe of mergekit": Kind("mergekit.yaml", "text", recipe("mergekit.yaml"), read_recipe),
    "specification": Kind(
        "s.json", "json", shared_spec("s.json"), lambda f: use_spec(nlm.PermutationSpec.load(f))
    ),
    "specification in YAML": Kind(
        "s.yaml", "text", shared_spec("s.yaml"), lambda f: use_spec(nlm.PermutationSpec.load(f))
    ),
    "table": Kind("table.yaml", "json", table, read_table),
    "alignment": Kind("a.safetensors", "safetensors", alignment, use_alignment),
    "joint alignment": Kind(
        "j.safetensors", "safetensors", joint, lambda file: JointAlignment.load(file).between(0, 1)
    ),
    "orthogonal alignment": Kind(
        "o.safetensors", "safetensors", orthogonal, OrthogonalAlignment.load
    ),
    "moments": Kind("m.safetensors", "safetensors", moments, use_moments),
    "cross-moments": Kind("c.safetensors", "safetensors", cross_moments, use_cross_moments),
    "corrections": Kind(
        "t.safetensors", "safetensors", lambda f: tact().save(f / "t.safetensors"), use_correction
    ),
    "merged": Kind("m.safetensors", "safetensors", merged, use_merged),
    "results": Kind("r.json", "json", results, use_results),
    "benchmarks": Kind("b.json", "json", benchmarks, use_benchmarks),
    "data": Kind("d.safetensors", "safetensors", inputs, use_data),
    "data of NumPy": Kind("d.npz", "zip", npz, use_data),
    "score": Kind("s.npz", "zip", score, lambda f: check_score(str(f), Labelled(), f.parent)),
    "lines": Kind("d.jsonl", "lines", lines, lambda file: _lines(file, "nlm.test", None)),
    "adapter": Kind("adapter_config.json", "json", adapter, use_adapter),
    "weights of an adapter": Kind("adapter_model.safetensors", "safetensors", adapter, use_adapter),
    "head": Kind("h.safetensors", "safetensors", head, lambda file: _head(file, small())),
}


class Foreign(AssertionError):
    """A reader broke its rule."""


class Examiner:
    """A kind's reader in a folder of its own."""

    def __init__(self, name: str) -> None:
        self.kind = KINDS[name]
        self._folder = tempfile.TemporaryDirectory()
        self.file = Path(self._folder.name) / self.kind.name
        self.kind.make(self.file.parent)
        self.good = self.file.read_bytes()
        self.counts = {"read": 0, "refused": 0}
        self.kind.read(self.file)

    def examine(self, content: bytes) -> None:
        """Raises :class:`Foreign` where the reader does with these bytes what it may not."""
        self.file.write_bytes(content)
        try:
            with bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.kind.read(self.file)
        except (ValueError, FileNotFoundError) as error:
            if not _is_own(error, self.file):
                raise Foreign(f"{type(error).__name__}: {error}") from error
            self.counts["refused"] += 1
        except Exception as error:
            raise Foreign(f"{type(error).__name__}: {error}") from error
        else:
            self.counts["read"] += 1

    def close(self) -> None:
        self._folder.cleanup()


def _is_own(error: Exception, file: Path) -> bool:
    """Whether an error is nlm's: its sentences begin so, and each is one line."""
    if isinstance(error, RecipeError):
        return all(each.startswith(str(file)) and "\n" not in each for each in error.problems)
    return str(error).startswith("nlm") and "\n" not in str(error)


@contextmanager
def bounded() -> Iterator[None]:
    """Within, memory beyond :data:`MEMORY` is refused and :data:`SECONDS` end in an error."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    handler = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: a machine may be busy
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
