"""permute and permute_add_ beside PyTorch. Bytes: one read and one write; one more read to add."""

from collections.abc import Callable, Iterator

import torch
from _bench import Workload, main
from _state_dicts import llama_1b, random_state, vit_base
from torch import Tensor

from nlm.ops import permute, permute_add_
from nlm.symmetry import PermutationSpec
from nlm.symmetry.gather import gathers

MAKE = torch.Generator().manual_seed(0)


def shuffled(*shape: int) -> Tensor:
    return torch.rand(shape, generator=MAKE).argsort(-1)


def select(x: Tensor, indices: list[Tensor], axes: list[int]) -> Tensor:
    """One axis after the other."""
    for index, axis in zip(indices, axes, strict=True):
        x = x.index_select(axis, index)
    return x


def index(x: Tensor, indices: list[Tensor], axes: list[int]) -> Tensor:
    """All axes at once, by one advanced index."""
    grid = []
    for axis, size in enumerate(x.shape):
        place = indices[axes.index(axis)] if axis in axes else torch.arange(size)
        grid.append(place.view([-1 if a == axis else 1 for a in range(x.dim())]))
    return x[tuple(grid)]


def residual_network() -> list[tuple[int, ...]]:
    """Shapes of the convolutions and norms of a ResNet-50's middle stages."""
    shapes: list[tuple[int, ...]] = []
    for width, blocks in ((64, 3), (128, 4), (256, 6)):
        for _ in range(blocks):
            shapes += [(width, 4 * width, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(width,)] * 8 + [(4 * width,)] * 4
    return shapes


def inputs() -> Iterator[tuple[str, list[tuple[int, ...]], list[int]]]:
    yield "rows [4096, 4096]", [(4096, 4096)], [0]
    yield "columns [4096, 4096]", [(4096, 4096)], [1]
    yield "both [4096, 4096]", [(4096, 4096)], [0, 1]
    yield "convolution [512, 512, 3, 3]", [(512, 512, 3, 3)], [0, 1]
    yield "residual network", residual_network(), [0, 1]


def per_tensor(
    function: Callable[..., Tensor], tensors: list[Tensor], indices: list, axes: list
) -> list[Tensor]:
    return [function(*each) for each in zip(tensors, indices, axes, strict=True)]


def workloads() -> Iterator[Workload]:
    for name, shapes, gathered in inputs():
        torch.compiler.reset()  # one graph per shape and type, below the limit of recompilations
        compiled = torch.compile(index, dynamic=False)
        axes = [[a for a in gathered if a < len(shape)] for shape in shapes]
        indices = [
            [shuffled(shape[a]) for a in own] for shape, own in zip(shapes, axes, strict=True)
        ]
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.randn(shape, generator=MAKE).to(dtype) for shape in shapes]
            call = (tensors, indices, axes)
            truth = tuple(each.double() for each in per_tensor(select, *call))
            size = sum(x.numel() * x.element_size() for x in tensors)
            providers = {
                "nlm": lambda call=call: permute(*call),
                "index_select per axis": lambda call=call: per_tensor(select, *call),
                "one advanced index": lambda call=call: per_tensor(index, *call),
            }
            if len(shapes) == 1:
                providers["torch.compile(index)"] = lambda call=call, compiled=compiled: per_tensor(
                    compiled, *call
                )
            yield Workload(name, dtype, providers, truth, 0.0, 2.0 * size, "copy")
            yield written(name, *call, truth, 2.0 * size)
        yield added(name, *call, truth, 3.0 * size)
    yield heads()
    yield from state_dict("ViT-B/16", vit_base(), torch.float32)
    yield from state_dict("Llama 1.1 B", llama_1b(), torch.bfloat16)


def select_into(
    out: list[Tensor], tensors: list[Tensor], indices: list, axes: list
) -> list[Tensor]:
    """One axis after the other, the last one into ``out``."""
    for target, x, own, own_axes in zip(out, tensors, indices, axes, strict=True):
        if own_axes:
            x = select(x, own[:-1], own_axes[:-1])
            torch.index_select(x, own_axes[-1], own[-1], out=target)
        else:
            target.copy_(x)
    return out


def written(
    name: str, tensors: list[Tensor], indices: list, axes: list, truth: tuple, size: float
) -> Workload:
    """Into memory that was written before, as the copy that it is held to."""
    out, stock_out = [torch.zeros_like(x) for x in tensors], [torch.zeros_like(x) for x in tensors]
    providers = {
        "nlm": lambda: permute(tensors, indices, axes, out=out),
        "index_select(out=)": lambda: select_into(stock_out, tensors, indices, axes),
    }
    return Workload(f"out=, {name}", tensors[0].dtype, providers, truth, 0.0, size, "copy")


def added(
    name: str, tensors: list[Tensor], indices: list, axes: list, truth: tuple, size: float
) -> Workload:
    """The first call adds to zero, and is the one that is checked; the timed ones add on."""
    out, stock_out = [torch.zeros_like(x) for x in tensors], [torch.zeros_like(x) for x in tensors]
    call = (tensors, indices, axes)

    def ours() -> list[Tensor]:
        permute_add_(out, *call)
        return out

    def stock() -> list[Tensor]:
        for target, x in zip(stock_out, per_tensor(select, *call), strict=True):
            target.add_(x)
        return stock_out

    providers = {"nlm": ours, "index_select, add_": stock}
    return Workload(f"add, {name}", tensors[0].dtype, providers, truth, 0.0, size, "copy")


def heads() -> Workload:
    """Input features of an output projection: 32 heads, each with its own inner permutation."""
    x, order, inner = torch.randn(4096, 32, 128, generator=MAKE), shuffled(32), shuffled(32, 128)
    providers = {
        "nlm": lambda: permute([x], [[order, inner]], [[1, 2]], [[(), (1,)]]),
        "one advanced index": lambda: [x[:, order[:, None], inner]],
        "gather": lambda: [x[:, order].gather(2, inner.expand(4096, 32, 128))],
    }
    truth = (x[:, order[:, None], inner].double(),)
    size = 2.0 * x.numel() * x.element_size()
    return Workload("heads [4096, 32 x 128]", x.dtype, providers, truth, 0.0, size, "copy")


def state_dict(name: str, spec: PermutationSpec, dtype: torch.dtype) -> Iterator[Workload]:
    """A permutation of all groups applied to a whole model, and the same model copied.

    Into new memory and into that of another model: the one is held to a copy into new memory
    ("copied"), the other to the limit.
    """
    state, p = random_state(spec, dtype, MAKE), spec.random(1)
    tensors = list(state.values())
    plans = [gathers(layouts, spec.groups, p) for layouts in spec.params.values()]
    indices = [[gather.index for gather in plan] for plan in plans]
    axes = [[gather.axis for gather in plan] for plan in plans]
    size = 2.0 * sum(x.numel() * x.element_size() for x in tensors)
    nothing: list = [[] for _ in tensors]
    other, stock_out = ([torch.zeros_like(x) for x in tensors] for _ in range(2))
    named = dict(zip(state, other, strict=True))
    into = {
        "nlm": lambda: list(spec.apply(p, state, out=named).values()),
        "index_select(out=)": lambda: select_into(stock_out, tensors, indices, axes),
    }
    moved = {
        "nlm": lambda: list(spec.apply(p, state).values()),
        "index_select per axis": lambda: per_tensor(select, tensors, indices, axes),
    }
    copied = {
        "nlm": lambda: permute(tensors, nothing, nothing),
        "clone": lambda: [x.clone() for x in tensors],
    }
    copied_into = {
        "nlm": lambda: permute(tensors, nothing, nothing, out=other),
        "copy_": lambda: [y.copy_(x) for y, x in zip(stock_out, tensors, strict=True)],
    }
    truth = tuple(per_tensor(select, tensors, indices, axes))
    for what, providers, expected in (
        (name, moved, truth),
        (f"{name}, copied", copied, tuple(tensors)),
        (f"{name}, out=", into, truth),
        (f"{name}, copied, out=", copied_into, tuple(tensors)),
    ):
        yield Workload(f"state dict, {what}", dtype, providers, expected, 0.0, size, "copy")


if __name__ == "__main__":
    main("permute", workloads)
