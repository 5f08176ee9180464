"""The one place for tolerances and for what a conformance case is.

An operation joins the conformance suite by a file ``tests/ops/samples_<stem>.py`` with a dictionary
``CASES`` of one :class:`Case` for each operator of its stem.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Roundings of its type by which a result may miss the float64 truth, should PyTorch be luckier.
#: Results up to float32 are float64 sums rounded once; float64 results are sums of up to 1e6 terms.
ROUNDINGS = {torch.float64: 16}
ROUNDINGS_NARROW = 1
#: The same for a sum of products: both factors, the product and the sum are rounded.
ROUNDINGS_PRODUCTS = 4


@dataclass(frozen=True)
class Sample:
    """Arguments of one operator call, in the order of its schema."""

    name: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Mistake:
    """Arguments that raise ``error`` with the sentence ``message``.

    ``call`` is the public function. ``reads_values`` marks a mistake that meta tensors cannot show.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    error: type[Exception]
    message: str
    reads_values: bool = False


@dataclass(frozen=True)
class Case:
    """What the conformance suite needs to know about an operator.

    Attributes
    ----------
    samples, mistakes : callable
        Fresh samples and mistakes. The samples must include each of: a non-contiguous tensor, an
        empty one, one with a dimension of size 1, one with an odd size, and one of 1e5 elements or
        more (which several threads share).
    plain : callable, optional
        The natural PyTorch expression in the type of the arguments, to whose error the kernel's is
        held. None: the kernel must equal the reference in every bit.
    products : callable, optional
        Given the arguments, the type in which the operator multiplies what it then sums in float64.
    judged : callable, optional
        Given arguments and results, what is compared of them: for results that are not unique.
    gradients : callable, optional
        Samples in float64 for gradcheck.
    poison : bool
        Whether NaN and infinity are tried in each floating argument.
    """

    samples: Callable[[], Iterable[Sample]]
    mistakes: Callable[[], Iterable[Mistake]]
    plain: Callable[..., Any] | None = None
    products: Callable[..., torch.dtype] | None = None
    judged: Callable[[tuple[Any, ...], list[Tensor]], list[Tensor]] | None = None
    gradients: Callable[[], Iterable[Sample]] | None = None
    poison: bool = True


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to every tensor in it, lists and tuples kept."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, each) for each in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found


def to_float64(value: Any) -> Any:
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, value)


def relative_error(result: Tensor, truth: Tensor, terms: int = 1) -> float:
    """max |result - truth| / max |truth|; infinite where they are not finite in the same places.

    Below the least normal number of the result's type a rounding is one of that number's: its
    spacing is that of all smaller ones, for each of so many ``terms`` of a sum.
    """
    if result.shape != truth.shape or not same_specials(result, truth):
        return float("inf")
    if not result.is_floating_point():
        return 0.0 if torch.equal(result, truth) else float("inf")
    finite = truth.isfinite()
    wide = truth[finite].double()
    if wide.numel() == 0:
        return 0.0
    difference = (result[finite].double() - wide).abs().max().item()
    largest = wide.abs().max().item()
    least = terms * torch.finfo(result.dtype).tiny
    return difference / (max(largest, least) if largest else 1.0)


def same_specials(a: Tensor, b: Tensor) -> bool:
    """NaN, infinity and minus infinity are in the same places."""
    if not a.is_floating_point():
        return True
    return all(
        torch.equal(test(a), test(b)) for test in (torch.isnan, torch.isposinf, torch.isneginf)
    )


def allowed_error(
    plain_error: float, dtype: torch.dtype, products: torch.dtype | None = None
) -> float:
    """No worse than plain PyTorch, or a few roundings of the result's type or of the products'."""
    if not dtype.is_floating_point:
        return 0.0
    rounding = ROUNDINGS.get(dtype, ROUNDINGS_NARROW) * torch.finfo(dtype).eps
    if products is not None:
        rounding = max(rounding, ROUNDINGS_PRODUCTS * torch.finfo(products).eps)
    return max(plain_error, rounding)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    flat = [torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)) for t in (a, b)]
    return torch.equal(*(each.view(torch.uint8) for each in flat))
