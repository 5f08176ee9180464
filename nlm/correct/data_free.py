"""A correction from weights alone: every row as long as the expert's.

Averaging two rows that correlate by rho leaves (1 + rho) / 2 of their squared length, and of the
variance of what they compute on inputs that do not prefer a direction. So for each task t and each
row w_c, b_c of a linear or convolution layer,

    scale = |w_c^t| / |w_c^merged|,     shift = b_c^t - scale * b_c^merged,

or one set for all tasks, from the means of the scales and of the experts' biases. What this and
:func:`nlm.correct.random_fields` recover of TACT's gain: docs/corrections.md.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nlm._modules import channel_dim, submodule
from nlm._multitask import MultiTaskModel, network_of
from nlm._names import as_patterns
from nlm.correct.correction import Correction, exclusive
from nlm.correct.fitting import check_modules
from nlm.correct.sequential import Fitted

_Self = TypeVar("_Self", bound="DataFree")
_ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class DataFree(Correction):
    """A merged model whose layers have rows as long as the experts', found without data.

    Only for merges whose rows are averages of the experts' rows. After RegMean, whose rows are long
    in directions that its data hardly have, it destroys the model (.97 to .08 of the experts'
    accuracy, docs/every_merge.md), and after DARE at few tasks, which scales up what it keeps, it
    harms it: take :class:`Tact` there.
    """

    _kind = "DataFree"

    @classmethod
    def fit(
        cls: type[_Self],
        model: nn.Module,
        experts: Mapping[str, nn.Module],
        *,
        points: str | Sequence[str] | None = None,
        shared: bool = False,
    ) -> _Self:
        """Fits the corrections of every task.

        Parameters
        ----------
        model : the merged model: any module, or a :class:`MultiTaskModel`.
        experts : task -> its expert, aligned as it was merged, with modules of the same names.
        points : names of linear and convolution modules; by default all of them, but those that
            each task of a multi-task model has for itself.
        shared : one set of corrections for all tasks, without a task id at run time.

        Returns
        -------
        DataFree
            With one row of float32 corrections per task, or one for all. A batch of several tasks
            takes a pass for each of them.

        Raises
        ------
        TypeError
            A model or an expert that is no module.
        ValueError
            No expert, no point, a point of another kind or with other channels in an expert, a
            model that is corrected already.
        """
        check_modules("nlm.DataFree", model, experts)
        with exclusive(model):
            network = network_of(model)
            points = _rows_of(network, model) if points is None else as_patterns(points)
            if not experts or not points:
                raise ValueError(
                    f"nlm.DataFree: there is at least one expert and one point, got "
                    f"{len(experts)} and {len(points)}"
                )
            fitted: list[Fitted] = []
            for task, expert in experts.items():
                own = model.for_task(task) if isinstance(model, MultiTaskModel) else network
                fitted.append({point: _matched(point, own, expert) for point in points})
            if shared:
                fitted = [{point: _mean(point, fitted) for point in points}]
            dims = {point: channel_dim(point, submodule(network, point)) for point in points}
        rows = {task: 0 if shared else row for row, task in enumerate(experts)}
        # where samples stand is not known without data: tasks of a batch run one after the other
        return cls(model, dims, rows, fitted, apart=not shared)


def _rows_of(network: nn.Module, model: nn.Module) -> list[str]:
    """The linear and convolution modules that all tasks share."""
    own = getattr(model.states, "heads", {}) if isinstance(model, MultiTaskModel) else {}
    heads = {name.rpartition(".")[0] for entries in own.values() for name in entries}
    heads |= {  # it never runs as a module
        f"{name}.out_proj" if name else "out_proj"
        for name, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    found = [name for name, module in network.named_modules() if isinstance(module, _ROWS)]
    return [name for name in found if name not in heads]


def _matched(point: str, merged: nn.Module, expert: nn.Module) -> tuple[Tensor, Tensor]:
    layers = [submodule(network, point) for network in (merged, expert)]
    if not all(isinstance(layer, _ROWS) for layer in layers):
        raise ValueError(
            f"nlm.DataFree: a point is a linear or convolution module, got "
            f"{' and '.join(type(layer).__name__ for layer in layers)} at {point!r}"
        )
    lengths, biases = [], []
    for layer in layers:
        weight = layer.weight.detach().double()  # type: ignore[operator]
        lengths.append(weight.flatten(1).norm(dim=1))
        bias = layer.bias
        biases.append(torch.zeros_like(lengths[-1]) if bias is None else bias.detach().double())  # type: ignore[operator]
    if lengths[0].shape != lengths[1].shape:
        raise ValueError(
            f"nlm.DataFree: the experts have the merged model's channels, got {len(lengths[1])} "
            f"and {len(lengths[0])} at {point!r}"
        )
    dead = lengths[0] == 0
    scale = torch.where(dead, 1.0, lengths[1] / torch.where(dead, 1.0, lengths[0]))
    return scale.float(), (biases[1] - scale * biases[0]).float()


def _mean(point: str, fitted: list[Fitted]) -> tuple[Tensor, Tensor]:
    """The means over the tasks."""
    scale, shift = (torch.stack([own[point][part] for own in fitted]).mean(0) for part in (0, 1))
    return scale, shift
