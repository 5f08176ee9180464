"""Partial merging: aligned models in one wider model, of which they share some units.

Models whose units differ lose by being averaged. Here only those units are that were found to
belong together, in each layer; every model keeps its others (Stoica et al., ZipIt!,
arXiv:2305.03053; Nasery et al., PLeaS, arXiv:2407.02447). Which unit becomes which is data: shared
by two models, by none, or by units of one model, which makes its layer narrower. The weights follow
by :mod:`nlm.symmetry.widening`. What is shared ends where the models' heads begin: each has its own
and reads of the wide features those that are its own; without heads the outputs are the models'
mean.

Running statistics of a merged unit are means of the models', to be re-estimated. The whole way:

    found = nlm.align(a, b, spec, "activations", data=[images])
    aligned_b.load_state_dict(spec.apply(found.permutation, b.state_dict()))
    widening = nlm.symmetry.Widening.find(a, spec, images)
    units = nlm.align.partial_matching(found, widening, budget=1.5)
    model = nlm.merge.merge_partial({"a": a, "b": aligned_b}, widening, units, heads="head")
"""

from collections.abc import Mapping, Sequence

from torch import nn

from nlm._multitask import MultiTaskModel
from nlm.merge.result import Merged
from nlm.symmetry.widening import Units, Widening


def merge_partial(
    models: Mapping[str, nn.Module],
    widening: Widening,
    units: Units,
    *,
    heads: str | Sequence[str] = (),
) -> MultiTaskModel:
    """One wider model that runs several, with the units merged that share a wide unit.

    Parameters
    ----------
    models : task -> model; all of one architecture and, with ``spec.apply``, in one order of units.
    widening : which groups can be widened (:meth:`nlm.symmetry.Widening.find`).
    units : group -> int64 ``[models, n]``, the wide unit of each unit of each model
        (:func:`nlm.align.partial_matching`). A group that is left out is merged as it stands.
    heads : patterns of entries that every task keeps for itself; see :func:`nlm.merge`.

    Returns
    -------
    MultiTaskModel
        ``model(x, task=...)``; ``model.for_task(task)`` is a plain module, ``model.states`` the
        :class:`Merged` weights. Where each model shares units with none it computes what it did, to
        rounding; where all units are shared one to one, this is ``nlm.merge(models,
        method="linear")``.

    Raises
    ------
    ValueError, TypeError
        What :func:`nlm.merge` raises; a group that cannot be widened, units that are no map.
    """
    from nlm.merge import merge

    states = {task: model.state_dict() for task, model in models.items()}
    for state in states.values():
        widening.spec.check_state_dict(state)
    units = widening.check(units, len(models))
    merged = merge(states, method="linear", heads=heads)
    shared, own = dict(merged), dict(merged.heads)
    if units:
        parts = [{name: state[name] for name in merged} for state in states.values()]
        shared |= widening.apply(dict(enumerate(parts)), units)
        for number, task in enumerate(states):
            if own[task]:
                own[task] = own[task] | widening.apply({number: own[task]}, units)
    result = Merged(shared, own, {}, {})
    first, network = next(iter(models.items()))
    return result.model(widening.resize(network, result.for_task(first), units))
