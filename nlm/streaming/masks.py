"""TALL-masks beside a merged checkpoint, and a task's own checkpoint from them.

A folder merged by "tall_mask" holds theta = theta_0 + the sum of the task vectors, and for each
task ``masks/TASK.safetensors``: for each merged entry of n weights ceil(n / 8) uint8, a bit per
weight as :func:`nlm.ops.tall_mask` has them. The task's checkpoint is theta where a bit is set,
theta_0 elsewhere, and the task's heads.
"""

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nlm.checkpoint.headers import ITEM_BYTES, Checkpoint, TensorEntry, open_checkpoint
from nlm.checkpoint.mapping import MappedFiles
from nlm.checkpoint.names import file_name
from nlm.checkpoint.partial import PartialCheckpoint
from nlm.checkpoint.shards import ShardFile, lay_out, plan_shards
from nlm.streaming import kernels
from nlm.streaming.folder import copy_others
from nlm.streaming.kernels import Block
from nlm.streaming.methods.masks import mask_of, masked
from nlm.streaming.methods.method import Buffers, chunks
from nlm.streaming.plan import MEMORY, SHARD_BYTES, Plan

_CHUNK = 1 << 20  # entries
_BUFFERS = 8
_KIND = "TALL-masks"
_FIRST = 64  # a chunk begins at a multiple of it, so at a whole byte of a mask


def write_masks(folder: Path, plan: Plan) -> None:
    """Writes the masks of all tasks beside the merged weights in a folder."""
    assert plan.base is not None
    merged = open_checkpoint(folder)
    names = [name for name, entry in plan.entries().items() if plan.is_merged(entry)]
    buffers = Buffers(_elements(plan.memory))
    (folder / "masks").mkdir(exist_ok=True)
    with MappedFiles([plan.base, merged, *plan.experts.values()]) as files:
        squares = _squares([plan.base.tensors[name] for name in names], files)
        for task, expert in plan.experts.items():
            file = f"{file_name(task)}.safetensors"
            parts = [(name, "U8", [-(-merged.tensors[name].size // 8)]) for name in names]
            metadata = {"nlm": _KIND, "task": task, "base": squares.hex()}
            shard = lay_out(file, parts, metadata)
            target = ShardFile(folder / "masks" / file, shard, digest=False)
            try:
                for entry in shard.tensors:
                    own = [each.tensors[entry.name] for each in (expert, plan.base, merged)]
                    limit = plan.value("mask_threshold", task, entry.name)
                    with _blocks(files, *own) as blocks:
                        for begin, size in chunks(own[0], buffers):
                            x, start, whole = (block.at(begin) for block in blocks)
                            target.write(mask_of(x, start, whole, size, limit, buffers).data)
                target.close(sync=False)
            except BaseException:
                target.abandon()
                raise


def write_task(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str],
    task: str,
    output: str | os.PathLike[str],
    *,
    memory: int = MEMORY,
    force: bool = False,
    sync: bool = True,
) -> None:
    """Writes the checkpoint of one task of a merge by "tall_mask"; whole, or not at all.

    Parameters
    ----------
    folder : what the merge wrote.
    base : the checkpoint that it started from.
    output : a folder or a ".safetensors" file.
    memory : bytes that the buffers may take.
    force : replaces an output that is there.
    sync : flushes to the disk.

    Raises
    ------
    FileNotFoundError
        The folder has no masks of the task.
    ValueError
        The base is another one, or the masks are not of these weights.
    OSError
        The output is there, or a disk is full or fails.
    """
    kernels.check_core()
    file = Path(folder) / "masks" / f"{file_name(task)}.safetensors"
    if not file.is_file():
        found = sorted(each.stem for each in file.parent.glob("*.safetensors"))
        raise FileNotFoundError(
            f"nlm.streaming: a merge by 'tall_mask' has masks of the task, got "
            f"{', '.join(found) or 'none'} in {str(file.parent)!r} and no {task!r}"
        )
    merged, start, masks = open_checkpoint(folder), open_checkpoint(base), open_checkpoint(file)
    head = Path(folder) / "heads" / file.name
    heads = open_checkpoint(head) if head.is_file() else None
    sources = {**merged.tensors, **({} if heads is None else heads.tensors)}
    _check(masks, merged, start, file)
    parts = [(each.name, each.dtype, each.shape) for each in sources.values()]
    target = Path(output)
    shards = plan_shards(target, parts, SHARD_BYTES, {"format": "pt"})
    models = [merged, start, masks, *([] if heads is None else [heads])]
    stamps = {str(each): stamp for model in models for each, stamp in model.stamps.items()}
    buffers = Buffers(_elements(memory))
    with MappedFiles(models) as files:
        seen = _squares([start.tensors[name] for name in masks.tensors], files)
        if not math.isclose(seen, float.fromhex(masks.metadata["base"]), rel_tol=1e-9):
            raise ValueError(
                f"nlm.streaming: a task is restored from the base of its merge, got another one, "
                f"{os.fspath(base)!r}"
            )
        partial = PartialCheckpoint(target, shards, f"{task}\n{stamps}", force=force, sync=sync)
        try:
            for shard in shards:
                written = partial.open(shard)
                for entry in shard.tensors:
                    own = sources[entry.name]
                    mask = masks.tensors.get(entry.name)
                    if mask is None:
                        written.write(files.bytes(own).data)
                        continue
                    bits = files.bytes(mask)
                    with _blocks(files, start.tensors[entry.name], own) as blocks:
                        for begin, size in chunks(own, buffers):
                            part = bits[begin // 8 : -(-(begin + size) // 8)]
                            first, whole = (block.at(begin) for block in blocks)
                            written.write(masked(part, first, whole, size, buffers))
                partial.finish(written)
            partial.commit(lambda to: _copy_others(merged.folder, head, to))
        except BaseException:
            partial.discard()
            raise


def _copy_others(source: Path | None, head: Path, to: Path) -> None:
    """The files beside the weights, with the configuration of the task's own head."""
    copy_others(source, to)
    settings = head.with_suffix(".json")
    if settings.is_file():
        shutil.copyfile(settings, to / "config.json")


def _check(masks: Checkpoint, merged: Checkpoint, start: Checkpoint, file: Path) -> None:
    if masks.metadata.get("nlm") != _KIND or "base" not in masks.metadata:
        raise ValueError(f"nlm.streaming: a file of {_KIND} is read, got {str(file)!r}")
    for name, mask in masks.tensors.items():
        own, first = merged.tensors.get(name), start.tensors.get(name)
        is_whole = own is not None and mask.shape == (-(-own.size // 8),) and mask.dtype == "U8"
        if not is_whole or first is None or own is None or first.shape != own.shape:
            raise ValueError(
                f"nlm.streaming: masks, merged weights and base are of one model, got another "
                f"{name!r} in {str(file)!r}"
            )


def _elements(memory: int) -> int:
    return max(_FIRST, min(_CHUNK, memory // (8 * _BUFFERS)) // _FIRST * _FIRST)


@contextmanager
def _blocks(files: MappedFiles, *entries: TensorEntry) -> Iterator[list[Block]]:
    """Tensors in the address space; those that do not lie as their types want are copied."""
    copies = []
    found = []
    for entry in entries:
        address = files.address(entry)
        if entry.order is not None or address % ITEM_BYTES[entry.dtype]:
            copies.append(files.bytes(entry).copy())
            address = copies[-1].ctypes.data
        found.append(Block(address, entry.dtype))
    yield found
    for entry in entries:
        files.done_with(entry)


def _squares(entries: Iterable[TensorEntry], files: MappedFiles) -> float:
    """The sum of the squares of some tensors, by which a model is known again."""
    parts = []
    for entry in entries:
        with _blocks(files, entry) as (block,):
            parts.append(kernels.inner_products(None, [block], entry.size).item())
    return math.fsum(parts)
