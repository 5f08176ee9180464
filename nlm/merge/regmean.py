"""RegMean (Jin et al., arXiv:2212.09849): linear layers that give what the experts' give, in sum.

With G_t the mean of x x^T over what a linear layer reads in expert t, its off-diagonal entries
times alpha, the merged weight [outputs, inputs] is the least squares over all experts' inputs,

    W = (sum_t W_t G_t) (sum_t G_t)^-1 ,

solved in float64. Biases and all that is no linear layer are averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nlm._least_squares import LeastSquares
from nlm._methods import check_alpha
from nlm._modules import evaluation, is_transformers_conv1d
from nlm._names import as_patterns, matches
from nlm._state_dict import place_of
from nlm.merge.result import Merged
from nlm.statistics import CrossMoments, Data, Forward, Mask, batches, run
from nlm.statistics.observe import check_activation
from nlm.statistics.positions import Positions

_CALLER = "nlm.merge.regmean"


def gram_matrices(
    model: nn.Module,
    data: Data,
    *,
    heads: str | Sequence[str] = (),
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
) -> dict[str, Tensor]:
    """The Gram matrices of what the linear layers of a model read: all that RegMean needs of data.

    Parameters
    ----------
    data, forward, mask, max_samples, device : see :mod:`nlm.statistics.data`; labels are not used.
    heads : patterns of layers that are left out.
    process_group : of torch.distributed: each of its processes walks data of its own, and all get
        the matrices of all data.

    Returns
    -------
    dict
        name of the weight -> the mean of x x^T, float64 [inputs, inputs]. Layers that did not run,
        and those that share their weight with another entry, are not there.

    Raises
    ------
    ValueError
        No sample, no linear layer, or NaN or inf in what one reads.
    """
    found: dict[str, CrossMoments] = {}
    positions = Positions(mask, caller=_CALLER)

    def collector(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def collect(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            x = x if x.itemsize >= 4 else x.float()
            counted = positions.of(x, -1)
            moments = found.setdefault(name, CrossMoments.zeros(x.shape[-1], device=x.device))
            moments.update(x, None, -1, counted)
            if not bool(moments.m2_x.isfinite().all()):
                check_activation(_CALLER, name, x, x.dim() - 1, counted)

        return collect

    layers = _layers(model, heads)
    handles = [layers[name].register_forward_pre_hook(collector(name)) for name in layers]
    try:
        with evaluation(model):
            for batch in batches(data, max_samples, device, _CALLER):
                positions.begin(batch)
                run(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    if process_group is not None:
        found = _of_all(found, layers, process_group)
    return {
        name: own.comoment / own.count + torch.outer(own.mean_x, own.mean_x)
        for name, own in found.items()
    }


def _of_all(
    found: dict[str, CrossMoments], layers: dict[str, nn.Module], process_group: Any
) -> dict[str, CrossMoments]:
    """The moments of all processes, of the layers that ran in any of them."""
    import torch.distributed as distributed

    ran = [set(found) for _ in range(distributed.get_world_size(process_group))]
    distributed.all_gather_object(ran, set(found), group=process_group)
    joined = {}
    for name, layer in layers.items():
        if any(name in each for each in ran):
            weight: Any = layer.weight
            inputs = weight.shape[0 if is_transformers_conv1d(layer) else 1]
            own = found.pop(name, None) or CrossMoments.zeros(inputs, device=weight.device)
            joined[name] = own.all_reduce(process_group)
    return joined


def regmean(
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Data] | None = None,
    *,
    grams: Mapping[str, Mapping[str, Tensor]] | None = None,
    alpha: float = 0.9,
    heads: str | Sequence[str] = (),
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
) -> Merged:
    """Merges experts so that their linear layers give, in sum, what they gave.

    Parameters
    ----------
    experts : task -> model, all of one architecture.
    data : task -> a re-iterable of batches of its inputs. Every expert counts alike, whatever the
        number of its samples.
    grams : task -> what :func:`gram_matrices` gave, instead of data: experts whose data must stay
        where they are send these.
    alpha : the factor on the off-diagonal entries, in [0, 1]; 1 fits the inputs that were seen
        best, a smaller one those that were not.
    heads : patterns of entries that are never merged, see :func:`nlm.merge`.
    forward, mask, max_samples, device : see :func:`gram_matrices`.

    Returns
    -------
    Merged
        As :func:`nlm.merge` returns it. Inputs that are 0 in all data have the mean's weights.

    Raises
    ------
    ValueError
        Neither data nor Gram matrices, or both, or not of every expert; an alpha outside [0, 1];
        Gram matrices of other shapes or not positive definite in sum; and what :func:`nlm.merge`
        and :func:`gram_matrices` raise.
    """
    from nlm.merge import merge

    check_alpha(alpha)
    if (data is None) == (grams is None):
        given = "none" if data is None else "both"
        raise ValueError(f"{_CALLER}: there are data or Gram matrices, got {given}")
    merged = merge(experts, method="linear", heads=heads)
    of_data = data if grams is None else grams
    assert of_data is not None
    if set(of_data) != set(experts):
        raise ValueError(
            f"{_CALLER}: there are data or Gram matrices of every expert "
            f"({', '.join(experts)}), got {', '.join(map(str, of_data)) or 'none'}"
        )
    if data is not None:
        grams = {
            task: gram_matrices(
                expert, data[task], heads=heads, forward=forward, mask=mask,
                max_samples=max_samples, device=device,
            )
            for task, expert in experts.items()
        }  # fmt: skip
    assert grams is not None
    states = {task: expert.state_dict() for task, expert in experts.items()}
    for name, layer in _layers(next(iter(experts.values())), heads).items():
        if any(name not in own for own in grams.values()):
            continue
        has_columns = is_transformers_conv1d(layer)
        pairs = [
            (state[name].T if has_columns else state[name], grams[task][name])
            for task, state in states.items()
        ]
        solved = _solved(name, alpha, pairs)
        merged[name] = (solved.T.contiguous() if has_columns else solved).to(merged[name].dtype)
    return merged


def _layers(model: nn.Module, heads: str | Sequence[str]) -> dict[str, nn.Module]:
    """Name of the weight -> linear layer, of those whose weight is an entry of its own."""
    state = model.state_dict(keep_vars=True)
    places = [place_of(entry) for entry in state.values()]
    found = {}
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        is_linear = isinstance(module, nn.Linear) or is_transformers_conv1d(module)
        if (
            is_linear
            and weight in state
            and not matches(weight, as_patterns(heads))
            and places.count(place_of(state[weight])) == 1
        ):
            found[weight] = module
    if not found:
        raise ValueError(f"{_CALLER}: a model has linear layers beside its heads, got none")
    return found


def _solved(name: str, alpha: float, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """W for (W_t [outputs, inputs], G_t) of all experts, float64."""
    for weight, gram in pairs:
        if gram.shape != (weight.shape[1], weight.shape[1]):
            raise ValueError(
                f"{_CALLER}: a Gram matrix is [inputs, inputs], got {list(gram.shape)} for "
                f"{name!r} with {weight.shape[1]} inputs"
            )
    weights = [weight.detach().cpu().double().numpy() for weight, _ in pairs]
    grams = [gram.cpu().double().numpy() for _, gram in pairs]
    return torch.from_numpy(LeastSquares(name, grams, alpha).rows(weights)).to(pairs[0][0].device)
