"""What the processes of a distributed test run: in a file that a new process can import."""

import os

import torch.distributed as distributed
from _networks import mlp
from torch import Tensor

from nlm import align, trace
from nlm.statistics import Moments


def reduce_moments(rank: int, port: int, folder: str, parts: list[Tensor]) -> None:
    """Saves the moments of all parts as one process of the group sees them."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=len(parts))
    Moments.of(parts[rank]).all_reduce().save(f"{folder}/{rank}.safetensors")
    distributed.destroy_process_group()


def align_together(rank: int, port: int, folder: str, parts: list[Tensor]) -> None:
    """Saves how two networks are aligned, each process on its own part of the data."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=len(parts))
    first, second = mlp(0), mlp(1)
    spec = trace(first, parts[0])
    group = distributed.group.WORLD
    found = align(first, second, spec, "activations", data=[parts[rank]], process_group=group)
    found.save(f"{folder}/{rank}.safetensors")
    distributed.destroy_process_group()
