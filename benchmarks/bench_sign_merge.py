"""sign_merge beside PyTorch. Bytes: one read of the base and of each expert, one write."""

from collections.abc import Callable, Iterator

import torch
from _bench import Workload, main
from torch import Tensor

from nlm._registry import operations
from nlm.ops import sign_merge

SIZES = {"3.7 M": 3_700_000, "100 M": 100_000_000}
EXPERTS = (2, 4, 8)
CHECKED = 1_000_000  # entries that are held to the reference
STACKED = 500_000_000  # entries of all experts above which an expression's temporaries fill 8 GB


def expression(
    base: Tensor, experts: list[Tensor], thresholds: Tensor, weights: Tensor, scale: float
) -> Tensor:
    """The formula as one writes it, on stacked task vectors."""
    start = base.float()
    vectors = torch.stack(experts).float() - start
    vectors = torch.where(vectors.abs() >= thresholds[:, None], vectors, 0.0) * weights[:, None]
    sign = vectors.sum(0).sign()
    agrees = vectors.sign() == torch.where(sign == 0, 1.0, sign)
    mean = (vectors * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return (start + scale * mean).to(base.dtype)


def fusible(
    base: Tensor, experts: list[Tensor], thresholds: Tensor, weights: Tensor, scale: float
) -> Tensor:
    """The same without a stack, for a compiler to make one loop of."""
    start = base.float()
    differences = [x.float() - start for x in experts]
    values = [
        torch.where(d.abs() >= thresholds[k], d, 0.0) * weights[k]
        for k, d in enumerate(differences)
    ]
    plus = sum(values[1:], values[0]) >= 0
    agrees = [torch.where(plus, value > 0, value < 0) for value in values]
    chosen = [torch.where(own, value, 0.0) for own, value in zip(agrees, values, strict=True)]
    counts = [own.float() for own in agrees]
    mean = sum(chosen[1:], chosen[0]) / sum(counts[1:], counts[0]).clamp(min=1)
    return (start + scale * mean).to(base.dtype)


def workloads() -> Iterator[Workload]:
    reference = operations()["sign_merge"].reference
    for name, size in SIZES.items():
        for count in EXPERTS:
            for dtype in (torch.float32, torch.bfloat16):
                torch.compiler.reset()
                compiled = torch.compile(fusible, dynamic=False)
                make = torch.Generator().manual_seed(0)
                base = torch.randn(size, generator=make).to(dtype)
                # The majority of all votes is +, which the expressions elect where a vote is 0.
                experts = [
                    torch.randn(size, generator=make).add_(0.1).to(dtype) for _ in range(count)
                ]
                thresholds, weights = torch.linspace(0.5, 1.0, count), torch.ones(count)
                args = (base, experts, thresholds, weights, 0.4)

                def call(function: Callable[..., Tensor], args: tuple = args) -> Callable:
                    return lambda: function(*args)[:CHECKED]

                def ours(args: tuple = args) -> Tensor:
                    base, experts, *rest = args
                    models = [[x] for x in experts]
                    return sign_merge([base], models, rest[0], scale=rest[2])[0][:CHECKED]

                providers = {"nlm": ours, "torch.compile": call(compiled)}
                if count * size <= STACKED:
                    providers["stacked expression"] = call(expression)
                first = base[:CHECKED], [x[:CHECKED] for x in experts]
                factors = weights.tolist()
                truth = reference(*first, thresholds, factors, 0.4, "global")[0].double()
                amount = float(count + 2) * size * dtype.itemsize
                title = f"{count} experts, {name}"
                yield Workload(title, dtype, providers, (truth,), 0.0, amount, "copy")


if __name__ == "__main__":
    main("sign_merge", workloads)
