"""A checkpoint with its units in another order, written tensor by tensor.

The only part of streaming that imports torch: what a permutation does to a tensor is said by
:mod:`nlm.symmetry`. At most one tensor, or one stack of sibling modules, is held, twice.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nlm.checkpoint.entries import TORCH_TYPES, TensorEntry
from nlm.checkpoint.headers import Checkpoint, open_checkpoint
from nlm.checkpoint.mapping import MappedFiles
from nlm.checkpoint.shards import ShardFile, lay_out
from nlm.symmetry import PermutationSpec, gather, stacks
from nlm.symmetry import permutation as permutations


def write_permuted(
    checkpoint: Checkpoint,
    spec: PermutationSpec,
    permutation: Mapping[str, Tensor],
    file: Path,
    progress: Callable[[str], None] | None = None,
    names: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Applies a permutation to a checkpoint; what comes out computes the same.

    Parameters
    ----------
    permutation : group id -> int64 ``[*parent sizes, size]``.
    file : a new ".safetensors" file.
    names : name in the checkpoint -> the specification's, where they are others.

    Raises
    ------
    ValueError
        The checkpoint is not one of the specification's models, but for tied entries that it leaves
        out, or the permutation is not one of its groups.
    """
    entries = checkpoint.tensors
    check_fits(spec, checkpoint, names)
    called = dict(names or {name: name for name in entries})
    in_file = {own: name for name, own in called.items()}
    plans = gather.Gathers(spec.groups, permutations.check(spec.groups, permutation))
    stack_of = stacks.stack_of(spec.stacks)
    parameter = {name: stack_of.get(called[name], called[name]) for name in entries}
    # Members of a stack follow one another: it is moved once.
    place = {of: at for at, of in reversed(list(enumerate(parameter.values())))}
    ordered = sorted(entries.values(), key=lambda entry: place[parameter[entry.name]])
    shard = lay_out(
        file.name, [(each.name, each.dtype, each.shape) for each in ordered], checkpoint.metadata
    )
    moved: dict[str, Tensor] = {}
    target = ShardFile(file, shard, digest=False)
    try:
        with MappedFiles([checkpoint]) as files:
            for entry in shard.tensors:
                if progress is not None:
                    progress(entry.name)
                if called[entry.name] not in moved:
                    name = parameter[entry.name]
                    members = spec.stacks.get(name, (name,))
                    own = {each: _tensor(files, entries[in_file[each]]) for each in members}
                    (whole,) = stacks.joined(spec.stacks, own).values()
                    (whole,) = gather.apply([whole], [plans.of(spec.params.get(name, ()))])
                    moved = stacks.separated(spec.stacks, {name: whole})
                target.write(moved.pop(called[entry.name]).reshape(-1).view(torch.uint8).numpy())
        target.close(sync=False)
    except BaseException:
        target.abandon()
        raise
    return open_checkpoint(file)


def read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint, in memory."""
    with MappedFiles([checkpoint]) as files:
        return {name: _tensor(files, entry) for name, entry in checkpoint.tensors.items()}


def _tensor(files: MappedFiles, entry: TensorEntry) -> Tensor:
    """A copy of a tensor of a file."""
    own = torch.from_numpy(files.bytes(entry).copy())
    files.done_with(entry)
    return own.view(getattr(torch, TORCH_TYPES[entry.dtype])).reshape(entry.shape)


def check_fits(
    spec: PermutationSpec, checkpoint: Checkpoint, names: Mapping[str, str] | None = None
) -> None:
    """Raises ValueError where a checkpoint is not one of a specification's models, but for tied
    entries that it leaves out."""
    called = names or {}
    shapes = {called.get(name, name): list(e.shape) for name, e in checkpoint.tensors.items()}
    spec.check_state_dict(_shapes(spec, shapes))


def _shapes(spec: PermutationSpec, known: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Empty tensors of a checkpoint's shapes. Of tied entries a file may hold one: what is not
    there is as the specification has it."""
    layouts = {name: spec.params.get(of, ()) for name, of in _parameters(spec).items()}
    sizes = {
        name: [each.size for each in (own[1:] if name not in spec.params else own)]
        for name, own in layouts.items()
    }
    sizes |= known
    return {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}


def _parameters(spec: PermutationSpec) -> dict[str, str]:
    """Entry -> its parameter, or the stack that it is a member of."""
    members = stacks.stack_of(spec.stacks)
    return {**{name: name for name in spec.params if name not in spec.stacks}, **members}
