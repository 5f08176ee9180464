"""Files whose tensors do not lie in memory as their types want, written anew so that they do.

The format allows it: a header of any length, a byte before a float. Kernels read aligned memory.
"""

from pathlib import Path

from nlm.checkpoint.headers import ITEM_BYTES, Checkpoint, open_checkpoint
from nlm.checkpoint.mapping import MappedFiles
from nlm.checkpoint.shards import ShardFile, lay_out


def is_aligned(checkpoint: Checkpoint) -> bool:
    """Whether every weight begins at a multiple of its type's bytes, with its axes in order."""
    weights = [each for each in checkpoint.tensors.values() if each.is_float]
    return not any(each.begin % ITEM_BYTES[each.dtype] or each.order for each in weights)


def write_aligned(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """The same tensors in a new ".safetensors" file."""
    parts = [(each.name, each.dtype, each.shape) for each in checkpoint.tensors.values()]
    shard = lay_out(file.name, parts, checkpoint.metadata)
    target = ShardFile(file, shard, digest=False)
    try:
        with MappedFiles([checkpoint]) as files:
            for entry in shard.tensors:
                source = checkpoint.tensors[entry.name]
                target.write(files.bytes(source).data)
                files.done_with(source)
        target.close(sync=False)
    except BaseException:
        target.abandon()
        raise
    return open_checkpoint(file)
