"""group_similarity_ beside PyTorch: layers whose other axis follows a permuted neighbour.

The peers return a new float32 matrix; "nlm" adds to one in float64.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from _bench import Workload, main
from torch import Tensor

from nlm.ops import group_similarity_

MAKE = torch.Generator().manual_seed(0)

#: Name, shape of the weight, axes of the units, and the axes that follow a neighbour.
LAYERS: dict[str, list[tuple[str, tuple[int, ...], list[int], list[int]]]] = {
    "VGG16": [
        ("conv2 out", (64, 64, 3, 3), [0], [1]),
        ("conv8 out", (512, 256, 3, 3), [0], [1]),
        ("conv8 in", (512, 256, 3, 3), [1], [0]),
        ("conv13 out", (512, 512, 3, 3), [0], [1]),
        ("conv13 in", (512, 512, 3, 3), [1], [0]),
        ("fc1 in", (4096, 512, 7, 7), [1], [0]),
        ("fc2 out", (4096, 4096), [0], [1]),
    ],
    "ViT-B/16": [
        ("patches", (768, 3, 16, 16), [0], []),
        ("query heads", (12, 64, 768), [0, 1], [2]),
        ("one query head each", (12, 64, 768), [1], [0, 2]),
        ("projection, stream", (768, 768), [0], [1]),
        ("fc1 out", (3072, 768), [0], [1]),
        ("fc1 in", (3072, 768), [1], [0]),
        ("fc2 out", (768, 3072), [0], [1]),
        ("fc2 in", (768, 3072), [1], [0]),
    ],
    "BERT-base": [("words", (30522, 768), [1], []), ("bias", (3072,), [0], [])],
}
IN_BF16 = ("conv13 out", "fc2 out", "words")


def gathered(b: Tensor, indices: list[Tensor], axes: list[int]) -> Tensor:
    for index, axis in zip(indices, axes, strict=True):
        b = b.index_select(axis, index)
    return b


def product(a: Tensor, b: Tensor, units: Sequence[int], kept: Sequence[int]) -> Tensor:
    """By torch.mm or torch.bmm; [*kept, units of a, units of b], all units as one axis."""
    summed = [x for x in range(a.dim()) if x not in {*units, *kept}]
    in_a, in_b = (
        x.permute(*kept, *units, *summed).flatten(len(kept) + len(units)).flatten(len(kept), -2)
        if summed
        else x[:, None]
        for x in (a, b)
    )
    return in_a @ in_b.mT


def contraction(a: Tensor, b: Tensor, units: Sequence[int], kept: Sequence[int]) -> Tensor:
    count = a.dim()
    in_b = [count + x if x in units else x for x in range(count)]
    result = [*kept, *units, *(count + x for x in units)]
    return torch.einsum(a, list(range(count)), b, in_b, result)


def workloads() -> Iterator[Workload]:
    for model, layers in LAYERS.items():
        for name, shape, units, axes in layers:
            kept = [0] if "each" in name else []
            for dtype in (torch.float32, torch.bfloat16) if name in IN_BF16 else (torch.float32,):
                a, b = torch.randn(2, *shape, generator=MAKE).to(dtype)
                indices = [torch.randperm(shape[axis], generator=MAKE) for axis in axes]
                yield workload(f"{model}, {name} {list(shape)}", (a, b, units, kept, indices, axes))


def workload(name: str, problem: tuple) -> Workload:
    """The first call adds to zero, and is the one that is checked; the timed ones add on."""
    a, b, units, kept, indices, axes = problem
    sizes = [a.shape[x] for x in units]
    rows = torch.Size(sizes).numel()
    out = torch.zeros(*(a.shape[x] for x in kept), *sizes, *sizes, dtype=torch.float64)

    def ours() -> Tensor:
        group_similarity_(out, a, b, units, kept, indices, axes)
        return out.view(-1, rows, rows)

    def stock(by: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: by(a, gathered(b, indices, axes), units, kept).view(-1, rows, rows)

    providers = {"nlm": ours, "gather, torch.mm": stock(product), "einsum": stock(contraction)}
    exact = product(a.double(), gathered(b, indices, axes).double(), units, kept)
    return Workload(
        name,
        a.dtype,
        providers,
        (exact.view(-1, rows, rows),),
        2e-6,
        2.0 * a.numel() * rows,
        "gemm",
    )


if __name__ == "__main__":
    main("group_similarity", workloads)
