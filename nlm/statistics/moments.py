"""Running moments that can be added: over batches, over workers, over machines.

Two sets of n_a and n_b samples with means m_a, m_b and sums of squared deviations M_a, M_b have
together (Chan, Golub and LeVeque 1979), with d = m_b - m_a and n = n_a + n_b,

    m = m_a + d n_b / n,        M = M_a + M_b + d d^T n_a n_b / n.

Everything is kept in float64 and centred, so that a large mean does not eat the variance.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from nlm import ops

_Self = TypeVar("_Self", bound="_Summable")


class _Summable:
    """What both kinds of moments share: a file, and the sum over processes."""

    def tensors(self) -> dict[str, Tensor]:
        """Attribute name -> tensor."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in named.items() if value is not None}

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes the moments as safetensors."""
        from nlm.checkpoint import write_tensors

        write_tensors(path, self.tensors(), {"nlm": type(self).__name__}, force)

    @classmethod
    def load(cls: type[_Self], path: str | os.PathLike[str]) -> _Self:
        """Reads what :meth:`save` wrote.

        Raises
        ------
        ValueError
            The file holds something else, or is damaged.
        """
        from nlm.checkpoint import read_kind
        from nlm.checkpoint.texts import whole

        with whole(path, cls.__name__, "nlm.statistics"):
            found = cls(**read_kind(path, cls.__name__, "nlm.statistics")[0])
            found.check()
        return found

    def check(self) -> None:
        """Raises ValueError where the tensors are not those of one set of moments."""
        raise NotImplementedError

    def all_reduce(self: _Self, process_group: Any = None) -> _Self:
        """The moments of all processes of a torch.distributed group, the same on each of them."""
        import torch.distributed as distributed

        gathered: dict[str, list[Tensor]] = {}
        for name, tensor in self.tensors().items():
            parts = [
                torch.empty_like(tensor) for _ in range(distributed.get_world_size(process_group))
            ]
            distributed.all_gather(parts, tensor.contiguous(), group=process_group)
            gathered[name] = parts
        total, *others = (
            type(self)(**dict(zip(gathered, values, strict=True)))
            for values in zip(*gathered.values(), strict=True)
        )
        for other in others:
            total = total + other  # type: ignore[operator]
        return total


@dataclass
class Moments(_Summable):
    """Count, mean and sum of squared deviations of every channel.

    Attributes
    ----------
    count : int64 [], positions seen per channel.
    mean, m2 : float64 [channels].
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def check(self) -> None:
        _check(self.tensors(), {"mean": self.mean.shape[:1], "m2": self.mean.shape[:1]})

    @classmethod
    def of(cls, x: Tensor, dim: int = 1, mask: Tensor | None = None) -> Moments:
        """The moments of one batch ``x``; ``dim`` is its channel dimension, and only positions
        that are true in ``mask`` count, as for :func:`nlm.ops.channel_moments`.
        """
        return cls(*ops.channel_moments(x, dim, mask))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = other.count.double() / count.clamp(min=1).double()
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta.square() * self.count.double() * share,
        )

    @property
    def variance(self) -> Tensor:
        """The population variance, float64 [channels]."""
        return self.m2 / self.count.clamp(min=1).double()


@dataclass
class CrossMoments(_Summable):
    """The moments of two streams of channels and their co-moment matrix.

    Attributes
    ----------
    count : int64 [], positions seen.
    mean_x, m2_x : float64 [Cx].
    mean_y, m2_y : float64 [Cy]; None where the stream stands against itself.
    comoment : float64 [Cx, Cy], the sum of (x - mean_x) (y - mean_y)^T.
    """

    count: Tensor
    mean_x: Tensor
    m2_x: Tensor
    comoment: Tensor
    mean_y: Tensor | None = None
    m2_y: Tensor | None = None

    def check(self) -> None:
        x, y = self.mean_x.shape[:1], self.y.mean.shape[:1]
        own = {"mean_x": x, "m2_x": x, "mean_y": y, "m2_y": y, "comoment": (*x, *y)}
        if (self.mean_y is None) != (self.m2_y is None):
            raise ValueError("mean_y and m2_y stand together, got one of them")
        _check(self.tensors(), own)

    @classmethod
    def zeros(
        cls, x: int, y: int | None = None, device: torch.device | str | None = None
    ) -> CrossMoments:
        """No samples yet of ``x`` and ``y`` channels, or of ``x`` channels against themselves, kept
        on ``device``.
        """

        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        count = torch.zeros((), dtype=torch.int64, device=device)
        if y is None:
            return cls(count, zero(x), zero(x), zero(x, x))
        return cls(count, zero(x), zero(x), zero(x, y), zero(y), zero(y))

    def update(
        self,
        x: Tensor,
        y: Tensor | None = None,
        dim: int = 1,
        mask: Tensor | None = None,
        precision: str = "float32",
    ) -> None:
        """Adds a batch of both streams, in place.

        ``dim`` is their channel dimension, ``mask`` says which positions count and ``precision``
        is that of the products; see :func:`nlm.ops.cross_moments_`.
        """
        ops.cross_moments_(
            self.count, self.mean_x, self.m2_x, self.mean_y, self.m2_y, self.comoment,
            x, y, dim, mask, precision,
        )  # fmt: skip

    def __add__(self, other: CrossMoments) -> CrossMoments:
        if (self.mean_y is None) != (other.mean_y is None):
            raise ValueError(
                "nlm.statistics: cross-moments of two streams and of a stream against itself have "
                "no sum, got one of each"
            )
        x, y = self.x + other.x, self.y + other.y
        weight = self.count.double() * other.count.double() / x.count.clamp(min=1).double()
        delta = torch.outer(other.mean_x - self.mean_x, other.y.mean - self.y.mean)
        comoment = self.comoment + other.comoment + delta * weight
        if self.mean_y is None:
            return CrossMoments(x.count, x.mean, x.m2, comoment)
        return CrossMoments(x.count, x.mean, x.m2, comoment, y.mean, y.m2)

    @property
    def x(self) -> Moments:
        """The first stream alone."""
        return Moments(self.count, self.mean_x, self.m2_x)

    @property
    def y(self) -> Moments:
        """The second stream alone."""
        if self.mean_y is None or self.m2_y is None:
            return self.x
        return Moments(self.count, self.mean_y, self.m2_y)

    def correlation(self, eps: float = torch.finfo(torch.float32).eps) -> Tensor:
        """Pearson's correlation, signed, float64 [Cx, Cy]; a dead channel correlates with nothing.

        A channel is dead where its standard deviation is at most ``eps`` times its mean.
        """
        live_x, live_y = (
            stream.variance > (eps * stream.mean).square() for stream in (self.x, self.y)
        )
        found = self.comoment * self.x.m2.rsqrt()[:, None]
        found.mul_(self.y.m2.rsqrt()).clamp_(-1, 1)
        found[~live_x] = 0.0
        found[:, ~live_y] = 0.0
        return found


def _check(tensors: dict[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError where tensors are no count beside float64 sums of these shapes."""
    for name, tensor in tensors.items():
        dtype = torch.int64 if name == "count" else torch.float64
        shape = list(shapes.get(name, ()))
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {dtype} of shape {shape}, got {tensor.dtype} of {list(tensor.shape)}"
            )
    if tensors["count"] < 0:
        raise ValueError(f"a count is 0 or more, got {int(tensors['count'])}")
