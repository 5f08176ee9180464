"""The permutation symmetries of sequential networks.

Walks nested ``nn.Sequential`` containers with an example input, module by module, and carries
along how the axis groups make up each dimension of the activations. A linear or convolution layer
reads the groups of its input and begins a new one on its output; normalisation and element-wise
layers keep them; ``Flatten`` multiplies them into blocks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nlm.symmetry.layout import Fixed, Layout, Ref, pin, product, references
from nlm.symmetry.permutation import AxisGroup
from nlm.symmetry.spec import PermutationSpec, Site

_ELEMENTWISE = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink,
    nn.Tanhshrink, nn.Threshold, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
)  # fmt: skip
_POOLING = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.LPPool1d, nn.LPPool2d,
)  # fmt: skip
Shape = tuple[int, ...]

BY_HAND = (
    "for other networks, write the specification (nlm.PermutationSpec, or its from_axes_to_perm) "
    "and prove it with its verify"
)


def discover(model: nn.Module, example: Tensor) -> PermutationSpec:
    """The specification of a network made of nested ``nn.Sequential`` containers; not verified.

    Raises
    ------
    ValueError
        A module that is not known here, used twice, or whose groups cannot be followed.
    """
    walk = _Walk([Fixed(size) for size in example.shape])
    activation = example.clone()  # the first module may write into it
    seen: dict[int, str] = {}
    for name, module in _leaves(model, ""):
        if id(module) in seen:
            raise ValueError(
                f"nlm.trace: a module stands once in a sequential network, got {name!r} and "
                f"{seen[id(module)]!r} for the same one; {BY_HAND}"
            )
        seen[id(module)] = name
        rule = _rule(name, module)
        with torch.no_grad():
            activation = module(activation)
        walk.step(name, module, rule, tuple(activation.shape))
    return walk.finish(list(model.state_dict()))


def _leaves(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside nested containers, in the order in which they run."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for name, child in module._modules.items():
            if child is not None:
                yield from _leaves(child, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, module


def _rule(name: str, module: nn.Module) -> "_Rule":
    for kinds, rule in _RULES:
        if isinstance(module, kinds):
            return rule
    raise ValueError(
        f"nlm.trace: a sequential network is made of linear, convolution, normalisation, pooling, "
        f"flatten and element-wise modules in nn.Sequential containers, got "
        f"{type(module).__name__} at {name!r}; {BY_HAND}"
    )


class _Walk:
    """The layouts of the current activation and what was found on the way to it."""

    def __init__(self, layouts: list[Layout]) -> None:
        self.layouts = layouts
        self.groups: dict[str, AxisGroup] = {}
        self.params: dict[str, tuple[Layout, ...]] = {}
        self.sites: dict[str, Site] = {}

    def step(self, name: str, module: nn.Module, rule: "_Rule", shape: Shape) -> None:
        """Passes one module, whose output has the given shape."""
        self.layouts = rule(self, name, module, shape)
        for key in module.state_dict():
            if (f"{name}.{key}" if name else key) not in self.params:
                raise ValueError(
                    f"nlm.trace: the entries of a {type(module).__name__} are known by name, got "
                    f"{key!r} at {name!r}; {BY_HAND}"
                )
        if (expected := tuple(layout.size for layout in self.layouts)) != shape:
            raise ValueError(
                f"nlm.trace: the output of {name!r} has the shape {list(expected)} that follows "
                f"from its input, got {list(shape)}"
            )
        for dim, layout in enumerate(self.layouts):
            if any(references(layout)):
                self.sites[name] = Site(dim, layout)
                break

    def finish(self, order: list[str]) -> PermutationSpec:
        """The specification, with the groups of the network's output pinned."""
        final = {ref.group for layout in self.layouts for ref in references(layout)}
        pinned = {
            f"{name}:{dim}": "output"
            for name in order
            for dim, layout in enumerate(self.params[name])
            if any(ref.group in final for ref in references(layout))
        }
        return PermutationSpec(
            groups={name: group for name, group in self.groups.items() if name not in final},
            params={
                name: tuple(pin(layout, final) for layout in self.params[name]) for name in order
            },
            sites={
                module: site
                for module, site in self.sites.items()
                if all(ref.group not in final for ref in references(site.layout))
            },
            outputs=("output",),
            pinned=pinned,
        )

    def add(self, module: str, name: str, *layouts: Layout) -> None:
        """Records the layouts of one parameter or buffer."""
        self.params[f"{module}.{name}" if module else name] = layouts

    def new_group(self, module: str, size: int) -> Ref:
        """Begins a group on a layer's output units."""
        name = f"g{len(self.groups)}"
        self.groups[name] = AxisGroup(name, size, origin=module)
        return Ref(name, size)

    def spatial(self, name: str, shape: Shape) -> list[Layout]:
        """The fixed dimensions behind the channels; no group may stand on them."""
        if any(any(references(layout)) for layout in self.layouts[2:]) or len(shape) < 3:
            raise ValueError(
                f"nlm.trace: {name!r} needs [batch, channels, ...] with units on the channels "
                f"only, got [{', '.join(map(str, self.layouts))}]"
            )
        return [Fixed(size) for size in shape[2:]]


def _linear(walk: _Walk, name: str, module: Any, shape: Shape) -> list[Layout]:
    units = walk.new_group(name, module.out_features)
    walk.add(name, "weight", units, walk.layouts[-1])
    if module.bias is not None:
        walk.add(name, "bias", units)
    return [*walk.layouts[:-1], units]


def _convolution(walk: _Walk, name: str, module: Any, shape: Shape) -> list[Layout]:
    spatial = walk.spatial(name, shape)
    source = walk.layouts[1]
    units: Layout
    if module.groups == 1:
        units = walk.new_group(name, module.out_channels)
    elif module.groups == module.in_channels == module.out_channels:
        units, source = source, Fixed(1)
    else:
        raise ValueError(
            f"nlm.trace: a convolution in a sequential network has one group or one per channel, "
            f"got {module.groups} groups of {module.in_channels} channels at {name!r}"
        )
    walk.add(name, "weight", units, source, *(Fixed(size) for size in module.kernel_size))
    if module.bias is not None:
        walk.add(name, "bias", units)
    return [walk.layouts[0], units, *spatial]


def _pooling(walk: _Walk, name: str, module: Any, shape: Shape) -> list[Layout]:
    return [*walk.layouts[:2], *walk.spatial(name, shape)]


def _batch_norm(walk: _Walk, name: str, module: Any, shape: Shape) -> list[Layout]:
    for key, tensor in module.state_dict().items():
        walk.add(name, key, *(walk.layouts[1:2] if tensor.dim() else ()))
    return walk.layouts


def _layer_norm(walk: _Walk, name: str, module: Any, shape: Shape) -> list[Layout]:
    for key in module.state_dict():
        walk.add(name, key, *walk.layouts[-len(module.normalized_shape) :])
    return walk.layouts


def _prelu(walk: _Walk, name: str, module: Any, shape: Shape) -> list[Layout]:
    walk.add(name, "weight", walk.layouts[1] if module.num_parameters > 1 else Fixed(1))
    return walk.layouts


def _flatten(walk: _Walk, name: str, module: Any, shape: Shape) -> list[Layout]:
    start, end = (dim % len(walk.layouts) for dim in (module.start_dim, module.end_dim))
    block = product(*walk.layouts[start : end + 1])
    return [*walk.layouts[:start], block, *walk.layouts[end + 1 :]]


def _keep(walk: _Walk, name: str, module: Any, shape: Shape) -> list[Layout]:
    return walk.layouts


_Rule = Callable[[_Walk, str, Any, Shape], list[Layout]]
_RULES: tuple[tuple[Any, _Rule], ...] = (
    (nn.Linear, _linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.PReLU, _prelu),
    (nn.Flatten, _flatten),
    (_POOLING, _pooling),
    (_ELEMENTWISE, _keep),
)
