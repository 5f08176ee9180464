"""Refit: layerwise least squares, the correction that leaves nothing but weights behind.

A merged network is walked in forward order. Each linear or convolution layer is solved anew by
ridge least squares, so that from the merged network's *own* inputs, all earlier layers refitted, it
gives what the aligned experts have there:

    min_W,b  sum_t sum_i |W x_i + b - y_i^t|^2 + lambda |W - W_0|^2,     x_i ~ task t,

W_0 the merged weights. It needs unlabelled samples, and no task id at run time. What a layer is
fitted to, see :mod:`nlm.correct.walk`; how it is solved, :mod:`nlm.correct.normal_equations`. Batch
norms get the statistics of the merged network's own inputs on the way; other norms are recomputed.

Much of what it gives it also gives without alignment: look at the refit of unaligned experts too.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nlm._modules import evaluation, is_transformers_conv1d, output_hooks, submodule
from nlm._multitask import MultiTaskModel, network_of
from nlm._state_dict import place_of, state_of
from nlm.correct.batch_norm import reset_next
from nlm.correct.correction import exclusive
from nlm.correct.fitting import check_tasks, run_task
from nlm.correct.normal_equations import NormalEquations, as_linear
from nlm.correct.walk import CONVOLUTIONS, Step, find_steps, inputs_of, outputs_of
from nlm.statistics import Data, Forward, Mask, run
from nlm.statistics.data import first, micro_batches
from nlm.statistics.observe import check_activation, check_reached
from nlm.statistics.positions import Positions

_Model = TypeVar("_Model", bound=nn.Module)
_CALLER = "nlm.refit"
_DEAD = 1e-6  # of a batch norm's largest scale: what is below tells nothing of its input


def refit(
    model: _Model,
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Data] | Data,
    *,
    ridge: float | None = None,
    points: str | Sequence[str] | None = None,
    outputs: bool = False,
    max_samples: int | None = 512,
    micro_batch: int | None = None,
    forward: Forward | None = None,
    mask: Mask | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> _Model:
    """A copy of a merged model with each layer solved anew from its own inputs.

    Parameters
    ----------
    model : the merged model, which stays as it is: any module, or a :class:`MultiTaskModel`, whose
        heads are kept.
    experts : task -> its expert, *aligned* as it was merged, with modules of the same names.
    data : task -> a re-iterable of batches of that task's inputs; labels are not used. Or batches
        for all experts of a plain model: the target is the mean of their outputs.
    ridge : the pull towards the merged weights, in units of the inputs' mean variance. By default a
        fifth of a layer's inputs per position, between 0.001 and 1; validation data choose better
        (:func:`nlm.pipeline.choose`).
    points : patterns of the names of the layers to refit. By default all linear and convolution
        layers but heads. Left alone are transposed convolutions, layers that run several times in a
        forward pass, that share a weight or bias or compute it, that are called by a keyword, and
        functions such as the packed attention of :class:`torch.nn.MultiheadAttention`.
    outputs : whether heads that all tasks share are refitted too. Not for heavy-tailed outputs, as
        the logits of confident predictions are.
    max_samples : per task.
    micro_batch : samples per forward pass; by default all that fit into one tensor go together. The
        result does not depend on it. Memory is that of one micro-batch: each step runs the model
        and the experts anew up to its place, half a forward pass of each on average.
    forward, mask, device : see :mod:`nlm.statistics.data`.
    progress : called with (layers, steps done, steps); what it raises cancels.

    Returns
    -------
    nn.Module
        Of the model's kind, its weights in their dtypes; they are solved in float64.

    Raises
    ------
    TypeError
        A task that is not named by a string; data that cannot be iterated again and again, or
        batches of no known form.
    ValueError
        No data, tasks that differ between experts and data, a ridge that is negative, or too small
        for inputs that depend on one another, no layer to refit, an expert that lacks one or has
        other channels there, NaN or inf in an activation, a model that is corrected already.

    References
    ----------
    Jin et al.: Dataless Knowledge Fusion by Merging Weights of Language Models (RegMean),
    arXiv:2212.09849. Nasery et al.: PLeaS, Merging Models with Permutations and Least Squares,
    arXiv:2407.02447.
    """
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise ValueError(f"{_CALLER}: the ridge is finite and at least 0, got {ridge}")
    named = data if isinstance(data, Mapping) else dict.fromkeys(experts, data)
    check_tasks(_CALLER, model, experts, named)
    parts = [(task, named[task], [expert]) for task, expert in experts.items()]
    if named is not data:
        if isinstance(model, MultiTaskModel):
            raise ValueError(f"{_CALLER}: a multi-task model takes data per task, got data for all")
        parts = [("", data, list(experts.values()))]
    streams = [
        _Stream(task, batch, own)
        for task, samples, own in parts
        for batch in micro_batches(samples, micro_batch, max_samples, device, _CALLER)
    ]
    with ExitStack() as stack:
        # in inference mode tensors do not count how often they are written to
        stack.enter_context(torch.inference_mode(False))
        with exclusive(model):
            fitted = copy.deepcopy(model)
        networks = network_of(fitted), *experts.values()
        stack.enter_context(evaluation(*networks))
        for network in networks:  # an nn.TransformerEncoder runs layer by layer
            stack.enter_context(output_hooks(network, {}))
        walk = _Walk(fitted, streams, ridge, forward, mask)
        steps = walk.steps(points, outputs)
        for number, step in enumerate(steps):
            walk.take(step)
            if progress is not None:
                progress(", ".join(step.layers or step.ends), number + 1, len(steps))
    return fitted


@dataclass
class _Stream:
    """Samples of a task, and the experts whose mean output is the target on them."""

    task: str
    batch: Any
    experts: Sequence[nn.Module]


class _Walk:
    """A model whose layers are refitted in place, step by step."""

    def __init__(
        self,
        model: nn.Module,
        streams: Sequence[_Stream],
        ridge: float | None,
        forward: Forward | None,
        mask: Mask | None,
    ) -> None:
        self.model = model
        self.network = network_of(model)
        self.streams = streams
        self.calls = [partial(run_task, model, s.task, s.batch, forward) for s in streams]
        self.ridge = ridge
        self.forward = forward
        self.positions = Positions(mask, caller=_CALLER)
        self.reset: set[str] = set()
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

    def steps(self, points: str | Sequence[str] | None, outputs: bool) -> list[Step]:
        """The steps of the network, found on two samples."""
        task, few = self.streams[0].task, first(self.streams[0].batch, 2, _CALLER)
        call = partial(run_task, self.model, task, few, self.forward)
        return find_steps(self.network, call, self._is_shared, points, outputs, _CALLER)

    def take(self, step: Step) -> None:
        """Gives a step's batch norm the statistics of its inputs, then solves its layers."""
        while step.norm is not None and step.norm not in self.reset:
            found = reset_next(self.network, self.calls, self.reset)
            check_reached(_CALLER, [step.norm], [] if found is None else [step.norm])
            self.reset.add(found or "")
        if step.layers:
            self._solve(step, self._equations(step))

    def _is_shared(self, name: str) -> bool:
        """Whether all tasks have in common what a layer or a batch norm holds."""
        return f"{name}.weight" in self.weights or f"{name}.running_mean" in self.weights

    def _equations(self, step: Step) -> list[NormalEquations]:
        """The normal equations of a step over all samples, one for each group of channels."""
        found: list[NormalEquations] = []
        layer = submodule(self.network, step.layers[0])
        dim = 1 if isinstance(layer, CONVOLUTIONS) else -1
        rows = sum(len(self._matrix(name)) for name in step.layers)
        for stream, call in zip(self.streams, self.calls, strict=True):
            x, held = inputs_of(self.network, step, call, _CALLER)
            y = self._target(step, stream)
            if y.shape[dim] != rows:
                raise ValueError(
                    f"{_CALLER}: the experts have the merged model's channels, got {y.shape[dim]} "
                    f"and {rows} at {step.ends[0]!r}"
                )
            if held is not None:
                y = y - held
            if step.norm is not None:
                along = (-1, *[1] * (y.dim() - 2))
                scale, shift, _ = (part.reshape(along).to(y) for part in self._affine(step.norm))
                y = (y - shift) / scale
            x = x if x.itemsize >= 4 else x.float()
            self.positions.begin(stream.batch)
            mask = self.positions.of(y, dim)
            for group, ins, outs, on, counted in as_linear(layer, x, y.to(x.dtype), mask):
                if group == len(found):
                    found.append(NormalEquations(ins.shape[on], outs.shape[on], x.device))
                found[group].update(ins, outs, on, counted)
            if not all(equations.finite for equations in found):
                check_activation(_CALLER, step.layers[0], x)
                check_activation(_CALLER, step.ends[0], y, dim, mask)
        return found

    def _target(self, step: Step, stream: _Stream) -> Tensor:
        """The mean of what the experts of some samples have where a step ends."""
        total: Tensor | None = None
        for expert in stream.experts:
            call = partial(run, expert, stream.batch, self.forward)
            found = outputs_of(expert, step, call, _CALLER)
            total = found if total is None else total + found
        assert total is not None  # there is at least one expert
        return total / len(stream.experts)

    def _solve(self, step: Step, equations: list[NormalEquations]) -> None:
        """Solves the layers of a step and writes their weights."""
        weights = [self.weights[f"{name}.weight"] for name in step.layers]
        biases = [self.weights.get(f"{name}.bias") for name in step.layers]
        start = torch.cat([self._matrix(name) for name in step.layers])
        biased = biases[0] is not None or step.norm is not None
        parts = zip(equations, start.chunk(len(equations)), strict=True)
        solved = [own.solve(part, self.ridge, biased, step.layers[0]) for own, part in parts]
        weight, bias = (torch.cat(each) for each in zip(*solved, strict=True))
        if step.norm is not None:
            *_, alive = self._affine(step.norm)
            before = torch.zeros_like(bias) if biases[0] is None else biases[0].double()
            weight = torch.where(alive[:, None], weight, start.double())
            bias = torch.where(alive, bias, before)
            if biases[0] is None:  # the norm takes it
                self.weights[f"{step.norm}.running_mean"].sub_(bias)
        at = 0
        for name, old, old_bias in zip(step.layers, weights, biases, strict=True):
            rows = slice(at, at := at + len(self._matrix(name)))
            columns = is_transformers_conv1d(submodule(self.network, name))
            old.copy_(weight[rows].T if columns else weight[rows].reshape(old.shape))
            if old_bias is not None:
                old_bias.copy_(bias[rows])

    def _matrix(self, name: str) -> Tensor:
        """The weight of a layer as [outputs, inputs]."""
        weight = self.weights[f"{name}.weight"]
        return (
            weight.T if is_transformers_conv1d(submodule(self.network, name)) else weight.flatten(1)
        )

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
