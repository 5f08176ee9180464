"""The walk of a refit: the layers of one step after the other are solved and written.

What they read and what they are fitted to comes from passes (:mod:`nlm.correct.passes`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import is_transformers_conv1d, submodule
from nlm._multitask import MultiTaskModel, network_of
from nlm._state_dict import place_of, state_of
from nlm.correct.batch_norm import write_statistics
from nlm.correct.normal_equations import NormalEquations, as_linear
from nlm.correct.passes import ExpertPass, MergedPass
from nlm.correct.walk import CONVOLUTIONS, Step, weight_of
from nlm.statistics import Mask
from nlm.statistics.observe import check_activation
from nlm.statistics.positions import Positions

CALLER = "nlm.refit"
_ENTRIES = ("weight", "bias", "running_mean", "running_var")
_DEAD = 1e-6  # of a batch norm's largest scale: what is below tells nothing of its input


@dataclass
class Stream:
    """A batch, passes of the merged model over it, and those of the experts that are the target."""

    batch: Any
    merged: list[MergedPass]
    experts: list[ExpertPass]


class Walk:
    """A model whose layers are refitted in place, step by step.

    Attributes
    ----------
    weights : the entries of the model's state dict that all tasks share.
    streams : the samples.
    passes : of the merged model over each batch.
    caller : the function that messages name.
    group : of torch.distributed, whose processes have samples of their own; or None.
    """

    passes = 1
    caller = CALLER

    def __init__(
        self, model: nn.Module, ridge: float | None, mask: Mask | None, group: Any = None
    ) -> None:
        self.network = network_of(model)
        self.ridge = ridge
        self.group = group
        self.streams: list[Stream] = []
        self._positions = Positions(mask, caller=self.caller)
        if isinstance(model, MultiTaskModel):
            states = [model.states.for_task(task) for task in model.tasks]
        else:
            states = [state_of(model)]
        self.weights = {
            name: tensor
            for name, tensor in states[0].items()
            if isinstance(tensor, Tensor)
            and all(name in own and place_of(own[name]) == place_of(tensor) for own in states)
        }

    def is_shared(self, name: str) -> bool:
        """Whether all tasks have in common what a layer or a batch norm holds."""
        module = submodule(self.network, name)
        held = [each for each in _ENTRIES if weight_of(module, each) is not None]
        return bool(held) and all(f"{name}.{each}" in self.weights for each in held)

    def take(self, step: Step) -> None:
        """Gives a step's batch norm the statistics of its inputs, then solves its layers."""
        if step.norm is not None:
            norms = (stream.merged[0].at(step, self.caller).norm for stream in self.streams)
            found = [norm for norm in norms if norm is not None]
            write_statistics(found, self.caller, self.group)
        if step.layers:
            self.write(step, *self.solved(step, self.equations(step), [self.weights]))

    def inputs(self, step: Step, stream: Stream) -> tuple[list[Tensor], Tensor | None]:
        """What the layers of a step read, and what the stream holds that they write to.

        Each of several inputs has equations of its own.
        """
        found = stream.merged[0].at(step, self.caller)
        return [found.x], found.held

    def targets(self, step: Step, stream: Stream) -> list[Tensor]:
        """What the experts have where a step ends, and last the mean of it."""
        dim, rows = self.dim(step), sum(len(self.matrix(name)) for name in step.layers)
        outputs = [each.at(step, self.caller) for each in stream.experts]
        for output in outputs:
            if output.shape[dim] != rows:
                raise ValueError(
                    f"{self.caller}: the experts have the merged model's channels, got "
                    f"{output.shape[dim]} and {rows} at {step.ends[0]!r}"
                )
        return [*outputs, reduce(torch.add, outputs) / len(outputs)]

    def target(self, step: Step, stream: Stream) -> Tensor:
        """What the layers of a step are fitted to."""
        return self.targets(step, stream)[-1]

    def equations(self, step: Step) -> list[NormalEquations]:
        """The normal equations of a step over all samples, one for each group of channels.

        Those of one input stand beside those of the next one.
        """
        found: list[NormalEquations] = []
        layer, dim = submodule(self.network, step.layers[0]), self.dim(step)
        for stream in self.streams:
            read, held = self.inputs(step, stream)
            y = self.target(step, stream)
            if held is not None:
                y = y - held
            if step.norm is not None:
                along = (-1, *[1] * (y.dim() - 2))
                scale, shift, _ = (part.reshape(along).to(y) for part in self._affine(step.norm))
                y = (y - shift) / scale
            self._positions.begin(stream.batch)
            mask = self._positions.of(y, dim)
            first = 0
            for x in read:
                x = x if x.itemsize >= 4 else x.float()
                group = 0
                for group, ins, outs, on, counted in as_linear(layer, x, y.to(x.dtype), mask):
                    if first + group == len(found):
                        found.append(NormalEquations(ins.shape[on], outs.shape[on], x.device))
                    found[first + group].update(ins, outs, on, counted)
                first += group + 1
            if self.group is None and not all(equations.finite for equations in found):
                for x in read:
                    check_activation(self.caller, step.layers[0], x)
                check_activation(self.caller, step.ends[0], y, dim, mask)
        return self._pooled_over_processes(step, found)

    def _pooled_over_processes(
        self, step: Step, found: list[NormalEquations]
    ) -> list[NormalEquations]:
        """The equations of all processes; whoever has NaN, all of them raise."""
        if self.group is None:
            return found
        found = [each.all_reduce(self.group) for each in found]
        if not all(each.finite for each in found):
            raise ValueError(
                f"{self.caller}: activations are finite, got NaN or inf at {step.layers[0]!r} in a "
                f"process of the group"
            )
        return found

    def solved(
        self, step: Step, equations: list[NormalEquations], starts: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The weights and biases of a step's layers, float64, in each of some networks in turn.

        ``starts`` are the networks' state dicts, whose weights the ridge pulls towards.
        """
        weight = torch.cat([self.matrix(name, own) for own in starts for name in step.layers])
        before = self.biases(step)
        biased = step.norm is not None or self.is_biased(step)
        parts = zip(equations, weight.chunk(len(equations)), strict=True)
        solved = [own.solve(part, self.ridge, biased, step.layers[0]) for own, part in parts]
        found, bias = (torch.cat(each) for each in zip(*solved, strict=True))
        if step.norm is None:
            return found, bias
        *_, alive = self._affine(step.norm)
        found = torch.where(alive[:, None], found, weight.double())
        return found, torch.where(alive, bias, before)

    def write(self, step: Step, weight: Tensor, bias: Tensor) -> None:
        """Gives the layers of a step their weights, and a bias that a layer lacks to its norm."""
        for name, entry in self.entries(step, weight, bias).items():
            self.weights[name].copy_(entry)
        if step.norm is not None and not self.is_biased(step):
            self.weights[f"{step.norm}.running_mean"].sub_(bias)

    def entries(self, step: Step, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """What weights [outputs, inputs] and biases of a step's layers are in the state dict."""
        found: dict[str, Tensor] = {}
        sizes = [len(self.matrix(name)) for name in step.layers]
        for name, own, shift in zip(
            step.layers, weight.split(sizes), bias.split(sizes), strict=True
        ):
            old = self.weights[f"{name}.weight"]
            found[f"{name}.weight"] = (
                own.T if self._has_columns(name) else own.reshape(old.shape)
            ).to(old.dtype)
            if self.is_biased(step):
                found[f"{name}.bias"] = shift.to(old.dtype)
        return found

    def matrix(self, name: str, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The weight of a layer as [outputs, inputs], the model's or in another state dict."""
        weight = (self.weights if weights is None else weights)[f"{name}.weight"]
        return weight.T if self._has_columns(name) else weight.flatten(1)

    def biases(self, step: Step) -> Tensor:
        """The biases of a step's layers, float64; zeros where they have none."""
        found = [
            self.weights.get(f"{name}.bias", self.matrix(name).new_zeros(len(self.matrix(name))))
            for name in step.layers
        ]
        return torch.cat(found).double()

    def is_biased(self, step: Step) -> bool:
        """Whether the layers of a step have a bias, all or none of them."""
        return f"{step.layers[0]}.bias" in self.weights

    def dim(self, step: Step) -> int:
        """Where the channels stand of what a step's layers read and give."""
        return 1 if isinstance(submodule(self.network, step.layers[0]), CONVOLUTIONS) else -1

    def _has_columns(self, name: str) -> bool:
        return is_transformers_conv1d(submodule(self.network, name))

    def _affine(self, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and shift of a batch norm, float64 [channels], and where the scale is not zero."""
        module = submodule(self.network, norm)
        mean, variance = (
            self.weights[f"{norm}.{which}"].double() for which in ("running_mean", "running_var")
        )
        scale = (variance + float(module.eps)).rsqrt()  # type: ignore[arg-type]
        shift = -mean * scale
        if module.affine:
            scale = scale * self.weights[f"{norm}.weight"]
            shift = shift * self.weights[f"{norm}.weight"] + self.weights[f"{norm}.bias"]
        alive = scale.abs() > _DEAD * scale.abs().max()
        return torch.where(alive, scale, 1.0), shift, alive
