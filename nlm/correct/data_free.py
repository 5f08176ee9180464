"""Calibration inputs without data: noise in the colours of a network's first layer.

A layer that was trained with weight decay keeps weights only along the directions that its inputs
varied in. Noise z at the output of the first layer, sent back through it, x = J^T z with J the
layer's Jacobian, varies along these directions: its covariance is J^T J. A merged model and its
experts lose on it, layer by layer, much of what they lose on the data that they were trained on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nlm._modules import evaluation, output_hooks
from nlm.correct.sequential import Reached, advance


def synthetic_inputs(
    model: nn.Module, shape: Sequence[int], samples: int = 128, *, seed: int = 0
) -> list[Tensor]:
    """Inputs to fit a correction from where there are no data of a task.

    Parameters
    ----------
    model : the expert of the task. It reads one floating-point tensor, which its data were
        standardised to: the inputs' mean square is 1.
    shape : of one input, without the samples.
    samples, seed : how many, and of the noise.

    Returns
    -------
    list
        One batch [samples, *shape], in the dtype and on the device of the model's first parameter.

    Raises
    ------
    ValueError
        No linear or convolution layer reads the inputs.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> [inputs] = synthetic_inputs(model, (6,))
    >>> inputs.shape
    torch.Size([128, 6])
    """
    like = next(model.parameters())
    inputs = torch.zeros(samples, *shape, dtype=like.dtype, device=like.device, requires_grad=True)
    outputs: list[Tensor] = []

    def keep(output: Tensor) -> None:
        outputs.append(output)
        raise Reached

    layers = {name: keep for name, module in model.named_modules() if _has_matrix(module)}
    with evaluation(model), torch.enable_grad(), output_hooks(model, layers):
        advance(lambda: model(inputs))
    found: Tensor | None = None
    if outputs and outputs[0].requires_grad:
        noise = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(seed))
        [found] = torch.autograd.grad(outputs, inputs, noise.to(like), allow_unused=True)
    if found is None or not bool(found.any()):
        raise ValueError(
            f"nlm.synthetic_inputs: a linear or convolution layer reads the inputs, got "
            f"{'one that does not' if outputs else 'none'} in {type(model).__name__}"
        )
    return [found / found.square().mean().sqrt()]


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module has a weight that is more than a gain per channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1
