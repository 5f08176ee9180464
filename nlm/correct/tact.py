"""TACT: task-specific activation correction.

A merged model's activations have collapsed variances: averaging two units whose activations
correlate by rho leaves (1 + rho) / 2 of their variance, and the loss compounds with depth. For each
task t and each channel of each point k, TACT restores the expert's statistics,

    E[A_k^merged(X)] = E[A_k^t(X)],     Var[A_k^merged(X)] = Var[A_k^t(X)],     X ~ task t,

by a scale and a shift per (task, channel), fitted in forward order on a few unlabelled samples.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from nlm.correct.correction import Correction, exclusive
from nlm.correct.fitting import ExpertMoments, prepare
from nlm.correct.matching import Matching
from nlm.correct.points import Points
from nlm.correct.sequential import fit_at_once, fit_sequential
from nlm.statistics import Data, Forward, Mask

_Self = TypeVar("_Self", bound="Tact")
MODES = ("sequential", "at_once")


class Tact(Correction):
    """A merged model whose activations match each task's expert: ``tact(x, task="digits")``.

    References
    ----------
    Sharma, Roy, Dziugaite: The Non-Local Model Merging Problem, arXiv:2410.12766, section 4.
    """

    _kind = "Tact"

    @classmethod
    def fit(
        cls: type[_Self],
        model: nn.Module,
        experts: Mapping[str, nn.Module],
        data: Mapping[str, Data],
        *,
        points: Points = None,
        max_samples: int | None = 128,
        micro_batch: int | None = None,
        recompute: bool = False,
        mode: str = "sequential",
        forward: Forward | None = None,
        mask: Mask | None = None,
        device: torch.device | str | None = None,
        moments: ExpertMoments | None = None,
        process_group: Any = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> _Self:
        """Fits the corrections of every task.

        Parameters
        ----------
        model : the merged model: any module, or a :class:`MultiTaskModel`.
        experts : task -> its expert, *aligned* as it was merged, with modules of the same names.
        data : task -> a re-iterable of batches of that task's inputs; labels are not used.
        points : where it is corrected (:mod:`nlm.correct.points`): "before_activation" (the
            default), "after_activation", "residual", "norm"; names or patterns of modules and
            function calls; or name -> channel dimension. Heads are no points by default.
        max_samples : per task; 32 to 64 suffice in our experiments.
        micro_batch : samples per forward pass; by default all that fit into one tensor go together.
            The result does not depend on it. Several go side by side, each in a thread and on a
            copy of the modules that shares the weights; the activations of all stand in memory.
        recompute : several micro-batches run one after the other instead, from the input for each
            point: the memory of one, as many passes as there are points.
        mode : "sequential", or "at_once" for the control that the paper's text leaves open.
        forward, mask, device : see :mod:`nlm.statistics.data`.
        moments : the experts' moments, where :func:`nlm.correct.expert_moments` has found them
            before; the experts are not run then.
        process_group : of torch.distributed: each of its processes has samples of its own of every
            task, as many as ``max_samples`` each, and all get the corrections of all samples
            together. One that fails must end, so that the others see its connection close.
        progress : called with (task, tasks done, tasks); what it raises cancels.

        Returns
        -------
        Tact
            With one row of corrections per task, in the order of ``experts``: for a point of C
            channels, scale and shift of shape [tasks, C], float64 where the point's activations
            are, else float32 (also for float16 and bfloat16).

        Raises
        ------
        TypeError
            A model or an expert that is no module, experts or data that are not given by task, a
            task that is not named by a string, points of no known form; data that cannot be
            iterated again and again, or batches of no known form.
        ValueError
            No data, one value per channel, NaN or inf in an activation, tasks that differ between
            experts and data, a point that does not run exactly once or whose channel dimension is
            neither known nor given, a correction that overflows, a model that is corrected already.
        """
        if mode not in MODES:
            raise ValueError(f"nlm.Tact: the mode is one of {', '.join(MODES)}, got {mode!r}")
        fitted = []
        with exclusive(model):
            setup = prepare(
                "nlm.Tact", model, experts, data, points, max_samples, micro_batch, forward, mask,
                device, moments, process_group,
            )  # fmt: skip
            for number, task in enumerate(setup.tasks):
                targets = {
                    point: (moments.mean, moments.variance)
                    for point, moments in setup.expert_moments(task).items()
                }
                fit, streams = setup.fit(Matching(targets)), [setup.stream(task)]
                if mode == "sequential":
                    fitted.append(fit_sequential(fit, streams, recompute=recompute))
                else:
                    fitted.append(fit_at_once(fit, streams))
                if progress is not None:
                    progress(task, number + 1, len(setup.tasks))
        rows = {task: row for row, task in enumerate(setup.tasks)}
        return cls(model, setup.points, rows, fitted, setup.found.readers, setup.apart)
