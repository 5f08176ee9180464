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
from torch import nn

from nlm._modules import evaluation, output_hooks
from nlm._multitask import MultiTaskModel, network_of
from nlm.correct.correction import exclusive
from nlm.correct.fitting import check_modules, check_number, check_tasks, run_task
from nlm.correct.lockstep import standing
from nlm.correct.passes import ExpertPass, MergedPass
from nlm.correct.selection import SelectingWalk, Selection, Trial
from nlm.correct.solving import CALLER, Stream, Walk
from nlm.correct.walk import Step, find_steps
from nlm.statistics import Data, Forward, Mask, run
from nlm.statistics.data import first, micro_batches

_Model = TypeVar("_Model", bound=nn.Module)


def refit(
    model: _Model,
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Data] | Data,
    *,
    ridge: float | None = None,
    points: str | Sequence[str] | None = None,
    outputs: bool = False,
    select: bool | Selection = False,
    max_samples: int | None = 512,
    micro_batch: int | None = None,
    recompute: bool = False,
    forward: Forward | None = None,
    mask: Mask | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> _Model:
    """A copy of a merged model with each layer solved anew from its own inputs.

    Parameters
    ----------
    model : the merged model, which stays as it is: any module, or a :class:`MultiTaskModel`, whose
        heads are kept.
    experts : task -> its expert, *aligned* as it was merged, with modules of the same names.
    data : task -> a re-iterable of batches of that task's inputs; labels are not used. Or batches
        for all experts of a plain model: the target is the mean of their outputs. Where there is
        none, :func:`nlm.correct.random_fields`, the same for every task.
    ridge : the pull towards the merged weights, in units of the inputs' mean variance. By default a
        fifth of a layer's inputs per position, between 0.001 and 1; validation data choose better
        (:func:`nlm.pipeline.choose`).
    points : patterns of the names of the layers to refit. By default all linear and convolution
        layers but heads. Left alone are transposed convolutions, layers that run several times in a
        forward pass, that share a weight or bias or compute it, and functions such as the packed
        attention of :class:`torch.nn.MultiheadAttention`.
    outputs : whether heads that all tasks share are refitted too. Not for heavy-tailed outputs, as
        the logits of confident predictions are.
    select : whether hidden units and attention heads are chosen from those of all experts instead
        of averaged, see :mod:`nlm.correct.selection`; for data that all experts see. A
        :class:`nlm.correct.Selection` says which were.
    max_samples : per task.
    micro_batch : samples per forward pass; by default all that fit into one tensor go together. The
        result does not depend on it. All go side by side, the experts' too, as in
        :meth:`Tact.fit`: the activations of all stand in memory.
    recompute : they run one after the other instead, from the input for each step: the memory of
        one, half a forward pass of the model and of each expert for each step on average.
    forward, mask, device : see :mod:`nlm.statistics.data`.
    process_group : of torch.distributed: each of its processes has samples of its own of every
        task, at most ``max_samples``, and all get the layers that all samples together give. Not
        with ``select``.
    progress : called with (layers, steps done, steps); what it raises cancels.

    Returns
    -------
    nn.Module
        Of the model's kind, its weights in their dtypes; they are solved in float64.

    Raises
    ------
    TypeError
        A model or an expert that is no module, a ridge that is no number, a task that is not named
        by a string; data that cannot be iterated again and again, or batches of no known form.
    ValueError
        No data, tasks that differ between experts and data, a ridge that is negative, or too small
        for inputs that depend on one another, no layer to refit, an expert that lacks one or has
        other channels there, NaN or inf in an activation, a model that is corrected already; units
        to select on data per task, over processes, or without a specification where ``forward`` is
        given.

    References
    ----------
    Jin et al.: Dataless Knowledge Fusion by Merging Weights of Language Models (RegMean),
    arXiv:2212.09849. Nasery et al.: PLeaS, Merging Models with Permutations and Least Squares,
    arXiv:2407.02447.
    """
    if ridge is not None:
        check_number(CALLER, "ridge", ridge)
    if not isinstance(select, (bool, Selection)):
        raise TypeError(f"{CALLER}: select is True, False or a Selection, got {select!r}")
    check_modules(CALLER, model, experts)
    named = data if isinstance(data, Mapping) else dict.fromkeys(experts, data)
    check_tasks(CALLER, model, experts, named)
    parts = [(task, named[task], [expert]) for task, expert in experts.items()]
    if named is not data:
        if isinstance(model, MultiTaskModel):
            raise ValueError(f"{CALLER}: a multi-task model takes data per task, got data for all")
        parts = [("", data, list(experts.values()))]
    if select and named is data:
        raise ValueError(f"{CALLER}: units are selected on data for all experts, got data per task")
    if select and process_group is not None:
        raise ValueError(f"{CALLER}: units are selected in one process, got a process group")
    batches = [
        (task, batch, own)
        for task, samples, own in parts
        for batch in micro_batches(samples, micro_batch, max_samples, device, CALLER)
    ]

    def build(fitted: nn.Module, steps: Sequence[Step], few: Any, trial: Trial) -> Walk:
        if not select:
            return Walk(fitted, ridge, mask, process_group)
        chosen = select if isinstance(select, Selection) else Selection()
        spec = chosen.find_spec(network_of(fitted), few, forward)
        return SelectingWalk(fitted, ridge, mask, experts, chosen, spec, steps, trial)

    how = Route(CALLER, points, outputs, recompute, forward, progress)
    return walked(model, list(experts.values()), batches, build, how)


Batches = Sequence[tuple[str, Any, Sequence[nn.Module]]]  # task, inputs, the experts for them
Build = Callable[[nn.Module, Sequence[Step], Any, Trial], Walk]


@dataclass(frozen=True)
class Route:
    """Which layers a walk goes through and how; see :func:`refit`."""

    caller: str
    points: str | Sequence[str] | None = None
    outputs: bool = False
    recompute: bool = False
    forward: Forward | None = None
    progress: Callable[[str, int, int], None] | None = None


def walked(
    model: _Model, experts: Sequence[nn.Module], batches: Batches, build: Build, route: Route
) -> _Model:
    """A copy of a model through which a walk has gone.

    ``build`` makes the walk: of the copy, its steps, a few samples, and a pass over them.
    """
    with ExitStack() as stack:
        # in inference mode tensors do not count how often they are written to
        stack.enter_context(torch.inference_mode(False))
        with exclusive(model):
            fitted = copy.deepcopy(model)
        network = network_of(fitted)
        stack.enter_context(evaluation(network, *experts))
        stack.enter_context(output_hooks(network, {}))  # an nn.TransformerEncoder runs by layers
        task, batch, _ = batches[0]
        few = first(batch, 2, route.caller)
        call = partial(run_task, task=task, batch=few, forward=route.forward)
        steps = find_steps(
            network, partial(call, fitted), Walk(fitted, None, None).is_shared, route.points,
            route.outputs, route.caller,
        )  # fmt: skip
        merged = standing(fitted)
        walk = build(fitted, steps, few, partial(MergedPass, merged, call, steps))
        side_by_side = None if route.recompute else stack
        for task, batch, own in batches:
            call = partial(run_task, task=task, batch=batch, forward=route.forward)
            alone = partial(run, batch=batch, forward=route.forward)
            passes = [MergedPass(merged, call, steps, side_by_side) for _ in range(walk.passes)]
            targets = [ExpertPass(expert, alone, steps, side_by_side) for expert in own]
            walk.streams.append(Stream(batch, passes, targets))
        for number, step in enumerate(steps):
            walk.take(step)
            if route.progress is not None:
                route.progress(", ".join(step.layers or step.ends), number + 1, len(steps))
    return fitted
