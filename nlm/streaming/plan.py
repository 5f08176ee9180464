"""A merge of checkpoints, complete: what goes in, what comes out, and what is wrong with it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlm._names import matches
from nlm.checkpoint.compare import differences, unmergeable
from nlm.checkpoint.headers import Checkpoint, Stamp, TensorEntry
from nlm.checkpoint.names import contains, wrong_name
from nlm.checkpoint.shards import Shard, plan_shards
from nlm.streaming.methods import Value

MEMORY = 512 << 20
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Plan:
    """A merge of checkpoints, complete.

    Attributes
    ----------
    output : a folder, or a ".safetensors" file.
    experts : task -> checkpoint. base : where the task vectors start.
    method, value, options : see :func:`nlm.streaming.methods.method_of`.
    heads : patterns of entries that are not merged.
    dtype : of the merged tensors: "F32", "BF16", "F16"; by default each base's.
    shard_bytes : the most bytes of one file of a folder.
    memory : bytes that the buffers may take.
    inputs : the files by which the merge is known again, as they were when they were read, where
        they are not the models' own: of those that a permuted copy was made of.
    curvatures : task -> the Fisher information of its expert's entries, for Fisher averaging, or
        the Gram matrices of what its linear layers read, for RegMean.
    """

    output: Path
    experts: Mapping[str, Checkpoint]
    base: Checkpoint | None
    method: str
    value: Value
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    memory: int = MEMORY
    inputs: Mapping[Path, Stamp] = field(default_factory=dict)
    curvatures: Mapping[str, Checkpoint] = field(default_factory=dict)

    def stamps(self) -> Mapping[Path, Stamp]:
        """The files by which the merge is known again."""
        models = [self.start, *self.experts.values(), *self.curvatures.values()]
        own = {file: stamp for model in models for file, stamp in model.stamps.items()}
        return self.inputs or own

    @property
    def start(self) -> Checkpoint:
        """The checkpoint whose names, shapes and types the result has."""
        return self.base or next(iter(self.experts.values()))

    def entries(self) -> dict[str, TensorEntry]:
        """The entries of the result, as the start has them."""
        found = self.start.tensors
        return {name: found[name] for name in found if not matches(name, self.heads)}

    def is_merged(self, entry: TensorEntry) -> bool:
        """Whether an entry is a weight, and no statistic and no integer."""
        return entry.is_weight

    def type_of(self, entry: TensorEntry) -> str:
        """The type of an entry in the result."""
        return entry.type_as(self.dtype)

    def shards(self) -> tuple[Shard, ...]:
        """The files of the result."""
        parts = [(each.name, self.type_of(each), each.shape) for each in self.entries().values()]
        return plan_shards(self.output, parts, self.shard_bytes, {"format": "pt"})


def problems(plan: Plan) -> Iterator[str]:
    """What the headers show to be wrong with a plan, a sentence each."""
    if not any(plan.is_merged(entry) for entry in plan.entries().values()):
        yield f"there is at least one weight to merge, got none in {str(plan.start.path)!r}"
    for name in unmergeable(plan.start, plan.heads):
        yield (
            f"weights are float16, bfloat16, float32 or float64, got "
            f"{plan.start.tensors[name].dtype} for {name!r}"
        )
    for file in plan.stamps():
        if contains(plan.output, file):
            yield (
                f"an output is not and does not hold an input, got {str(plan.output)!r} and "
                f"{str(file)!r}"
            )
    if plan.heads and plan.output.suffix == ".safetensors":
        yield f"heads are written to a folder, got the file {str(plan.output)!r}"
    if plan.method == "tall_mask" and plan.output.suffix == ".safetensors":
        yield f"masks are written to a folder, got the file {str(plan.output)!r}"
    for task, expert in plan.experts.items():
        if sentence := wrong_name(task):
            yield sentence
        yield from differences(plan.start, expert, f"expert {task!r}", plan.heads)
    if plan.method == "fisher":
        merged = [name for name, entry in plan.entries().items() if plan.is_merged(entry)]
        for task in plan.experts:
            yield from without_fisher(plan.start, merged, task, plan.curvatures.get(task))
    if plan.method == "regmean":
        for task in plan.experts:
            yield from without_gram(plan.start, task, plan.curvatures.get(task))


def without_fisher(
    start: Checkpoint, merged: Iterable[str], task: str, fisher: Checkpoint | None
) -> Iterator[str]:
    """What is wrong with the Fisher information of an expert, for the entries that are merged."""
    if fisher is None:
        yield f"Fisher averaging has the Fisher information of every expert, got none of {task!r}"
        return
    for name in merged:
        own, found = start.tensors[name], fisher.tensors.get(name)
        if found is None or found.shape != own.shape or not found.is_float:
            seen = "none" if found is None else f"{found.dtype} {list(found.shape)}"
            yield (
                f"the Fisher information of an entry is a number for each of its weights, got "
                f"{seen} for {name!r} {list(own.shape)} of {task!r} in {str(fisher.path)!r}"
            )
            return


def without_gram(start: Checkpoint, task: str, grams: Checkpoint | None) -> Iterator[str]:
    """What is wrong with the Gram matrices of an expert."""
    if grams is None:
        yield f"regmean has Gram matrices of every expert, got none of {task!r}"
        return
    for name, found in grams.tensors.items():
        own = start.tensors.get(name)
        shape = () if own is None else own.shape
        fits = len(shape) == 2 and len(found.shape) == 2 and found.is_float
        if not fits or len(set(found.shape)) != 1 or found.shape[0] not in shape:
            what = "no weight" if own is None else f"a weight {list(shape)}"
            yield (
                f"a Gram matrix is [inputs, inputs] of a linear layer's weight, got {found.dtype} "
                f"{list(found.shape)} for {name!r}, {what}, of {task!r} in {str(grams.path)!r}"
            )
            return
