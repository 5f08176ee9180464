"""The interface of the package rebasin on nlm: two modules and an input, one changed import.

::

    from nlm.integrations.rebasin import MergeMany, PermutationCoordinateDescent

    PermutationCoordinateDescent(model_a, model_b, x).rebasin()      # changes model_b in place

What may be permuted is found and proven by :func:`nlm.trace` on ``model_b`` and its input, with
attention heads, grouped convolutions and residual streams; what is maximised counts biases and norm
parameters, in whose case rebasin's cost does not depend on the permutation. rebasin itself is not
needed. Other classes of it (its interpolations) are not here.

References: Ainsworth, Hayase and Srinivasa, Git Re-Basin, arXiv:2209.04836, algorithms 1 and 3.
"""

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nlm import align, symmetry
from nlm.align import AlignmentReport, JointReport
from nlm.checkpoint import atomic_path
from nlm.merge import merge
from nlm.symmetry import PermutationSpec

__all__ = ["MergeMany", "PermutationCoordinateDescent"]

_log = logging.getLogger(__name__)
_WHERE = "nlm.integrations.rebasin"

Device = torch.device | str | None


class PermutationCoordinateDescent:
    """Brings a model's units into the order in which its weights are closest to another's.

    Parameters
    ----------
    model_a : the target; it is not changed.
    model_b : the model whose units are permuted, of the same architecture.
    input_data_b : an input of ``model_b`` on its device: a tensor, a sequence of arguments, or a
        dict of keyword arguments. Two or more samples of real data prove more than one of noise.
    input_data_a : not read: one trace is enough.
    device_a, device_b : where the models are; not read, for matching takes place on the CPU, and
        each model stays where it is.
    logging_level : a number or a name; at "INFO" and below each sweep is logged, by default none.
    frank_wolfe : whether the descent starts from where steps of all groups together lead
        (:mod:`nlm.align.frank_wolfe`): mostly a higher objective, in several times the time.

    Attributes
    ----------
    spec : what may be permuted.
    permutation : group -> indices; once it is calculated, else the identity.
    report : how it was found; None before.

    Raises
    ------
    ValueError
        ``model_b`` cannot be traced, ``model_a`` has other entries or shapes, or there is no such
        level.
    SymmetryError
        See :func:`nlm.trace`.
    """

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        input_data_b: Any,
        input_data_a: Any | None = None,
        device_a: Device = None,
        device_b: Device = None,
        logging_level: int | str = logging.ERROR,
        *,
        frank_wolfe: bool = False,
    ) -> None:
        self.model_a, self.model_b = model_a, model_b
        self.frank_wolfe = frank_wolfe
        self._report = _reporter(logging_level, "sweep")
        self.spec = _traced(model_b, input_data_b)
        self.spec.check_state_dict(model_a.state_dict())
        self.permutation: dict[str, Tensor] = self.spec.identity()
        self.report: AlignmentReport | None = None

    def rebasin(self, max_iterations: int = 100) -> None:
        """Finds the permutation and applies it to ``model_b``, whose function stays as it is."""
        self.calculate_permutations(max_iterations)
        self.apply_permutations()

    def calculate_permutations(self, max_iterations: int = 100) -> None:
        """Finds the permutation, in at most so many visits to every group; changes no model.

        Of two descents (:mod:`nlm.align.layerwise`) the better one is kept.

        Raises
        ------
        ValueError, TypeError
            See :func:`nlm.align`.
        """
        found = align.weight_matching(
            self.model_a.state_dict(), self.model_b.state_dict(), self.spec,
            seed=int(torch.randint(2**31, ())), max_sweeps=max_iterations,
            frank_wolfe=self.frank_wolfe, layerwise=True, progress=self._report,
        )  # fmt: skip
        self.permutation, self.report = found.permutation, found.report

    def apply_permutations(self) -> None:
        """Applies what was found to ``model_b`` in place, once: then it is the identity again."""
        state = self.model_b.state_dict()
        self.model_b.load_state_dict(self.spec.apply(self.permutation, state))
        self.permutation = self.spec.identity()


class MergeMany:
    """Brings several models into the order of the first one's units, and averages them.

    Parameters
    ----------
    models : modules, or paths of state dicts that ``torch.save`` wrote. **All but the first are
        changed**: a module in place; a file is written again, whole or not at all.
    working_model : a module of their architecture; its weights are those of the merged model
        afterwards.
    input_data : an input of ``working_model``, as for :class:`PermutationCoordinateDescent`.
    device : not read; each model stays where it is.
    logging_level : as for :class:`PermutationCoordinateDescent`.

    Attributes
    ----------
    report : how the permutations were found; None before :meth:`run`.

    Raises
    ------
    ValueError
        Fewer than two models, and what :class:`PermutationCoordinateDescent` raises.
    """

    def __init__(
        self,
        models: Sequence[nn.Module | str | Path],
        working_model: nn.Module,
        input_data: Any,
        device: Device = None,
        logging_level: int | str = logging.ERROR,
    ) -> None:
        if len(models) < 2:
            raise ValueError(f"{_WHERE}: there are at least two models, got {len(models)}")
        self.models = models
        self.working_model = working_model
        self._report = _reporter(logging_level, "step")
        self.spec = _traced(working_model, input_data)
        self.report: JointReport | None = None
        self._merged: nn.Module | None = None

    @property
    def merged_model(self) -> nn.Module:
        """The merged model.

        Raises
        ------
        AttributeError
            :meth:`run` was not called.
        """
        if self._merged is None:
            raise AttributeError(f"{_WHERE}: there is a merged model after run(), got none yet")
        return self._merged

    def run(self, max_iterations: int = 100, max_iterations_pcd: int = 100) -> nn.Module:
        """Aligns every model with the mean of the others until nothing is gained, and averages.

        Parameters
        ----------
        max_iterations : at most so many alignments of every model.
        max_iterations_pcd : at most so many visits to every group in one of them.

        Returns
        -------
        A module of its own, in the mode of ``working_model``. BatchNorm's running statistics are
        the models' means: to be estimated anew on data (:func:`nlm.reset_batch_norm`).

        Raises
        ------
        ValueError, TypeError
            See :func:`nlm.align_many`; no model was changed.
        """
        states = [_read(each) for each in self.models]
        found = align.align_many(
            states, self.spec, strategy="mean", seed=int(torch.randint(2**31, ())),
            max_sweeps=max_iterations_pcd, max_rounds=max_iterations, progress=self._report,
        )  # fmt: skip
        moved = [
            self.spec.apply(permutation, state)
            for permutation, state in zip(found.permutations, states, strict=True)
        ]
        device = next(iter(self.working_model.state_dict().values())).device
        experts = {
            str(number): {name: tensor.to(device) for name, tensor in state.items()}
            for number, state in enumerate(moved)
        }
        mean = dict(merge(experts, method="linear"))
        for model, state in zip(self.models[1:], moved[1:], strict=True):
            if isinstance(model, nn.Module):
                model.load_state_dict(state)
            else:
                with atomic_path(model, force=True) as temporary:
                    torch.save(state, temporary)
        self.working_model.load_state_dict(mean)
        self._merged, self.report = copy.deepcopy(self.working_model), found.report
        return self._merged


def _traced(model: nn.Module, input_data: Any) -> PermutationSpec:
    example = tuple(input_data) if isinstance(input_data, list) else input_data
    return symmetry.trace(model, example)


def _read(model: nn.Module | str | os.PathLike[str]) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return dict(model.state_dict())
    return dict(torch.load(model, map_location="cpu", weights_only=True))


def _reporter(level: int | str, what: str) -> Any:
    """Logs progress where the level asks for information."""
    number = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int):
        raise ValueError(f"{_WHERE}: a logging level is one of Python's, got {level!r}")

    def report(step: int, objective: float) -> None:
        if number <= logging.INFO:
            _log.info("%s %d: %.9g", what, step, objective)

    return report
