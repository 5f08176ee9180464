"""The host's methods with nlm's operations inside; names, parameters and contracts are the host's.

A method is given one tensor of each model, all of one type. With the host's parameters weight w_k,
lambda, density and normalize, and the difference d_k of model k from the base, it returns

    linear        sum_k w_k x_k   (normalize: over sum_k w_k)
    slerp         the spherical interpolation of two models
    the others    base + lambda m,   where m is, of what is kept of the d_k,
                      sum_k w_k d_k   (normalize: over sum_k w_k), or in ties and *_ties
                      `nlm.ops.sign_merge` in the dialect "mergekit" or "mergekit_sum"

Kept are all entries (task_arithmetic), the largest (ties; these differences are never stored), all
but the largest and the smallest (breadcrumbs), or a random part, alike (dare) or by rank (della).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from mergekit.merge_methods import GroupMergeMethod, MergeMethod, TensorGroup, registry
from mergekit.merge_methods.dtype import align_dtype
from mergekit.sparsify import SparsificationMethod as Sparse
from torch import Tensor

from nlm._coefficients import slerp as slerp_weights
from nlm._methods import tensor_seed
from nlm.integrations import _host
from nlm.merge.breadcrumbs import is_middle
from nlm.merge.ties import threshold
from nlm.ops import dare, inner_products, magprune, sign_merge, weighted_sum

Parameters = Mapping[str, Any]
Kernel = Callable[[Any, TensorGroup, Parameters], Tensor]
Kept = Callable[[slice], Tensor]  # a part of a flat tensor, not computed before it is asked for

_SMALL = 1e-8  # a sum of weights below it counts as 1
_NOTHING = 1e-7  # a norm below it is none to be rescaled to
_ROW = 4096  # entries that are summed in their own type
_PART = 1 << 19  # entries of tensors that are computed one part after the other, whole rows


class Method(GroupMergeMethod):
    """A method of the host, computed by nlm; by the host itself where gradients are asked for.

    Parameters
    ----------
    host : the method that it stands for.
    name : what it is registered as.
    kernel : computes it, from the host's method, the tensors and the parameters.
    """

    def __init__(self, host: MergeMethod, name: str, kernel: Kernel) -> None:
        self.spec = replace(host.spec, name=name)
        self._host, self._kernel = host, kernel

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        is_followed = torch.is_grad_enabled() and any(x.requires_grad for x in group.tensors)
        if is_followed or not all(x.is_floating_point() for x in group.tensors):
            [merged] = self._host((group,), parameters=parameters)
            return merged
        _check(parameters)
        dtype = group.tensors[0].dtype
        if dtype.itemsize == 1:
            group = align_dtype(group, torch.float32)
        return self._kernel(self._host, group, parameters).to(dtype)


def _check(parameters: Parameters) -> None:
    """Raises where a parameter is no finite number."""
    for name, given in parameters.items():
        for value in given.values() if isinstance(given, Mapping) else (given,):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"nlm.integrations.mergekit: a parameter is a finite number, got {name} = "
                    f"{value}"
                )


def linear(host: Any, group: TensorGroup, parameters: Parameters) -> Tensor:
    """By PyTorch's `addcmul`, and as fast as the host's: it rounds a product and its sum as one
    where the processor can, which no operation of nlm does.
    """
    first, weights = group.tensors[0], parameters["weight"].values_for(group.entries)
    numbers = torch.tensor(weights, dtype=_wide(first), device=first.device)
    if parameters["normalize"] and not numbers.sum():
        raise ValueError(
            f"nlm.integrations.mergekit: weights that are normalized do not sum to 0, got {weights}"
        )
    total = torch.zeros(first.shape, dtype=numbers.dtype, device=first.device)
    for x, weight in zip(group.tensors, numbers, strict=True):
        total.addcmul_(x, weight)
    return total.div_(numbers.sum()) if parameters["normalize"] else total


def slerp(host: Any, group: TensorGroup, parameters: Parameters) -> Tensor:
    pair = [group.base.tensor, group.non_base[0].tensor]
    products = inner_products(pair)
    if not bool(products.isfinite().all()):  # as in the host, where there is no angle
        return torch.full_like(pair[0], torch.nan, dtype=_wide(pair[0]))
    return weighted_sum(pair, slerp_weights(products.tolist(), parameters["t"]))


def task_arithmetic(host: Any, group: TensorGroup, parameters: Parameters) -> Tensor:
    """All methods on differences: the host's object says what is kept, and whether signs elect."""
    base, entries = group.base.tensor, group.non_base
    if not entries:
        return base
    models = [entry.tensor for entry in entries]
    weights, densities = (parameters[name].values_for(entries) for name in ("weight", "density"))
    scale, sparse, elects = parameters["lambda"], host.sparsification_method, host.consensus_method
    dialect = "mergekit" if parameters["normalize"] else "mergekit_sum"
    if elects and sparse == Sparse.magnitude and not parameters["rescale"]:
        limits = [
            _limit(model, base, density) for model, density in zip(models, densities, strict=True)
        ]
        experts = [[model] for model in models]
        return sign_merge([base], experts, torch.stack(limits), weights, scale, dialect)[0]
    total = _total(weights, base) if parameters["normalize"] else 1.0
    divisor = total if abs(total) >= _SMALL else 1.0
    if sparse is None:
        return weighted_sum(models, weights, base, divisor, scale)
    parts = list(_parts(base)) if sparse == Sparse.random else [slice(0, base.numel())]
    flat = base.reshape(-1)
    zero = torch.zeros(len(flat[parts[0]]), dtype=_wide(base), device=base.device)
    kept = [_kept(sparse, group, place, zero, parameters) for place in range(len(models))]
    none = torch.zeros(len(models), device=base.device)
    merged = torch.empty(base.numel(), dtype=_wide(base), device=base.device)
    for part in parts:
        vectors = [each(part) for each in kept]
        if elects:
            start = zero[: len(vectors[0])]
            [moved] = sign_merge([start], [[x] for x in vectors], none, weights, scale, dialect)
        else:
            moved = weighted_sum(vectors, weights, divisor=divisor, scale=scale)
        torch.add(moved, flat[part], out=merged[part])
    return merged.view(base.shape)


def _at_once(like: Tensor) -> int:
    """Entries that are computed together: on a CPU as many as stay in its cache meanwhile."""
    return _PART if like.device.type == "cpu" else max(1, like.numel())


def _parts(like: Tensor) -> Iterator[slice]:
    for begin in range(0, max(1, like.numel()), _at_once(like)):
        yield slice(begin, begin + _at_once(like))


def _limit(model: Tensor, base: Tensor, density: float) -> Tensor:
    """The least difference that is kept."""
    if density <= 0:
        return torch.tensor(torch.inf, device=base.device)
    return threshold([model], [base], min(density, 1.0), "mergekit")


def _total(weights: list[float], like: Tensor) -> float:
    """The sum as the host's tensor of weights has it."""
    return float(torch.tensor(weights, dtype=_wide(like)).sum())


def _wide(like: Tensor) -> torch.dtype:
    """What is computed in: float32 at least."""
    return torch.promote_types(like.dtype, torch.float32)


def _difference(model: Tensor, base: Tensor) -> Tensor:
    """In float32 at least."""
    return model.to(_wide(base)) - base.to(_wide(base))


def _sums(x: Tensor) -> list[float]:
    """Magnitudes added up by few entries, in their own type where it holds them: the same for any
    number of threads.
    """
    flat = x.abs().reshape(-1)
    whole = len(flat) // _ROW * _ROW
    rows = flat[:whole].view(-1, _ROW)
    sums = torch.cat([rows.sum(1), flat[whole:].sum()[None]])
    if not sums.isfinite().all():
        sums = torch.cat([rows.double().sum(1), flat[whole:].double().sum()[None]])
    return sums.tolist()


def _factor(before: list[float], after: list[float]) -> float:
    """What gives a difference its norm back; 1 where there is next to nothing, as in the host."""
    norm, left = math.fsum(before), math.fsum(after)
    return norm / left if min(norm, left) >= _NOTHING else 1.0


def _kept(
    sparse: Sparse, group: TensorGroup, place: int, zero: Tensor, parameters: Parameters
) -> Kept:
    """What is kept of a model's difference from the base; ``zero`` is as long as a part."""
    entry, base = group.non_base[place], group.base.tensor
    density, size = parameters["density"][entry.id], base.numel()
    if sparse == Sparse.random and density < 0:
        raise ValueError(
            f"nlm.integrations.mergekit: the density of what is drawn is at least 0, got {density}"
        )
    if sparse == Sparse.random and 0 < density < 1:
        one, other = entry.tensor.reshape(-1), base.reshape(-1)
        drawn = partial(_drawn, one, other, zero, 1 - density, _key(group, place))
        return _times(_rescaling(drawn, one, other) if parameters["rescale"] else 1.0, drawn)
    vector = _difference(entry.tensor, base)
    if density >= 1 or size == 0:
        return vector.reshape(-1).__getitem__
    if density <= 0:
        return torch.zeros_like(vector).reshape(-1).__getitem__
    if sparse == Sparse.magnitude:
        kept = _between(vector, max(1, int(density * size)), 0)
    elif sparse == Sparse.magnitude_outliers:
        kept = _between(vector, int(density * size), _outliers(parameters["gamma"][entry.id], size))
    else:
        kept = _by_rank(vector, density, parameters["epsilon"][entry.id], _key(group, place))
    factor = _factor(_sums(vector), _sums(kept)) if parameters["rescale"] else 1.0
    return _times(factor, kept.reshape(-1).__getitem__)


def _times(factor: float, kept: Kept) -> Kept:
    return kept if factor == 1 else lambda part: kept(part).mul_(factor)


def _drawn(model: Tensor, base: Tensor, zero: Tensor, drop: float, key: int, part: slice) -> Tensor:
    """A random part of a difference; its entries are those of the whole, drawn by their places."""
    vector = _difference(model[part], base[part])
    return dare(vector, zero[: len(vector)], drop, key, part.start, rescale=False)


def _rescaling(drawn: Kept, model: Tensor, base: Tensor) -> float:
    """What gives a random part the L1 norm of the difference."""
    before: list[float] = []
    after: list[float] = []
    for part in _parts(base):
        before += _sums(_difference(model[part], base[part]))
        after += _sums(drawn(part))
    return _factor(before, after)


def _outliers(gamma: float, size: int) -> int:
    """How many of the largest entries breadcrumbs drops; below 0 the host keeps fewer than the
    density says, and does not say so.
    """
    if gamma < 0:
        raise ValueError(
            f"nlm.integrations.mergekit: gamma, the share that is too large, is at least 0, "
            f"got {gamma}"
        )
    return int(gamma * size)


def _between(vector: Tensor, count: int, largest: int) -> Tensor:
    """The ``count`` largest entries but for the ``largest``, as far as there are so many."""
    return vector * is_middle(vector, None, count, min(largest, vector.numel() - count))


def _by_rank(vector: Tensor, density: float, epsilon: float, key: int) -> Tensor:
    """A random part: with probability density - epsilon the smallest of each row, or of a vector,
    up to density + epsilon the largest. The rows run along the second dimension.
    """
    if density + epsilon >= 1 or density - epsilon <= 0 or epsilon < 0:
        raise ValueError(
            f"nlm.integrations.mergekit: density - epsilon and density + epsilon lie in (0, 1), "
            f"epsilon is at least 0, got density {density} and epsilon {epsilon}"
        )
    turned = vector.movedim(1, -1) if vector.dim() > 1 else vector[None]
    rows = turned.reshape(-1, turned.shape[-1])
    kept = magprune(rows, density, epsilon, key, rescale=False).view(turned.shape)
    return kept.movedim(-1, 1) if vector.dim() > 1 else kept[0]


def _key(group: TensorGroup, place: int) -> int:
    """What a model's entries are drawn with; for a tensor without a name the next one."""
    if group.metadata.name is None:
        return int(torch.randint(2**63 - 1, ()))
    return tensor_seed(torch.initial_seed(), str(place), group.metadata.name)


_ON_DIFFERENCES = (
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
    "della", "della_linear",
)  # fmt: skip
KERNELS = {"linear": linear, "slerp": slerp, **dict.fromkeys(_ON_DIFFERENCES, task_arithmetic)}


@cache
def stock() -> dict[str, MergeMethod]:
    """The host's own methods of these names."""
    return {name: registry.get(name) for name in KERNELS}


def register() -> None:
    """See :func:`nlm.integrations.mergekit.register`."""
    ours = {each.spec.name for each in registry.registered_methods() if isinstance(each, Method)}
    for name, host in stock().items():
        if f"nlm_{name}" not in ours:
            registry.register(Method(host, f"nlm_{name}", KERNELS[name]))


def _known() -> dict[str, MergeMethod]:
    """The host's methods by name, to be written to: it has no public way to replace one."""
    try:
        return registry._METHODS
    except AttributeError:
        raise ImportError(
            "nlm.integrations.mergekit: the host's names are replaced where 0.1.5 keeps its "
            "methods (registry._METHODS), got a mergekit without: register() and nlm_* still do"
        ) from None


def _replace() -> None:
    _known().update({name: Method(host, name, KERNELS[name]) for name, host in stock().items()})


def _restore() -> None:
    _known().update(stock())


_switch = _host.Switch(_replace, _restore)


@contextmanager
def use_as_default() -> Iterator[None]:
    """See :func:`nlm.integrations.mergekit.use_as_default`."""
    with _switch():
        yield
