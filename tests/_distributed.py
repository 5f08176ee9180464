"""What the processes of a distributed test run: in a file that a new process can import."""

import os

import torch
import torch.distributed as distributed
from _networks import convnet, mlp
from torch import Tensor, nn

from nlm import Repair, Tact, align, merge, refit, trace
from nlm.correct import LeastSquares
from nlm.merge import gram_matrices
from nlm.statistics import Moments

Corrections = dict[tuple[str, str, str], tuple[Tensor, Tensor]]


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


def measure_together(rank: int, port: int, folder: str, parts: list[list[Tensor]]) -> None:
    """Saves the Gram matrices that processes measure, of a layer that runs in one of them too."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=len(parts))
    grams = gram_matrices(Forked(), parts[rank], process_group=distributed.group.WORLD)
    torch.save(grams, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


class Forked(nn.Module):
    """A layer that runs for inputs of a positive sum alone, beside one that always does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.seldom = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.always(x)
        return self.seldom(hidden) if x.sum() > 0 else hidden


def corrections(data: dict[str, list[Tensor]], process_group: object = None) -> Corrections:
    """(class, point, task) -> scale and shift of what is fitted to two networks' average."""
    experts: dict[str, nn.Module] = {"a": mlp(1).double(), "b": mlp(2).double()}
    model = mlp(0).double()
    model.load_state_dict(merge(experts, method="linear"))
    found = {}
    for kind in (Tact, Repair, LeastSquares):
        fitted = kind.fit(model, experts, data, max_samples=None, process_group=process_group)
        for point in fitted.points:
            for task, row in fitted.rows.items():
                scale, shift = (table[row] for table in fitted.correction(point))
                found[kind.__name__, point, task] = scale, shift
    return found


def correct_together(
    rank: int, port: int, folder: str, parts: list[dict[str, list[Tensor]]]
) -> None:
    """Saves the corrections that processes fit, each on its own part of the data."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=len(parts))
    torch.save(corrections(parts[rank], distributed.group.WORLD), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def refitted(data: dict[str, list[Tensor]], process_group: object = None) -> dict[str, Tensor]:
    """The weights of two networks' average, refitted; batch norms among them."""
    experts: dict[str, nn.Module] = {"a": convnet(1).double(), "b": convnet(2).double()}
    model = convnet(0).double()
    model.load_state_dict(merge(experts, method="linear"))
    fitted = refit(model, experts, data, ridge=0.1, max_samples=None, process_group=process_group)
    return dict(fitted.state_dict())


def refit_together(rank: int, port: int, folder: str, parts: list[dict[str, list[Tensor]]]) -> None:
    """Saves what processes refit, each on its own part of the data."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=len(parts))
    torch.save(refitted(parts[rank], distributed.group.WORLD), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
