"""The proof of a specification: its permutations do not change the function of a model.

Everything is computed on a float64 copy of the model whose norms, biases, running statistics and
zero parameters are perturbed by a third of their own size, or of the size of their module where
they are zero: an untrained LayerScale of zero or a dead layer would hide a mistake. Where the model
cannot compute in float64 it is proven in its own dtype, with the tolerance that the dtype allows.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nlm._state_dict import count_not_finite
from nlm.symmetry.spec import PermutationSpec, SymmetryError, Verification

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_CONTROL_RATIO = 1e-3  # the error of a true symmetry against the effect of a broken one
# The least effect that is told from rounding. With float64 it may be small: in a network of small
# weights the biases of the last layer outweigh what comes from the first.
_LEAST_EFFECT = {**_TOLERANCE, torch.float64: 1e-12}


def verify(
    spec: PermutationSpec,
    model: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    seeds: int,
    forward: Callable[..., Any] | None = None,
) -> Verification:
    """Proves ``spec`` on ``model``; see :meth:`PermutationSpec.verify`."""
    spec.check_state_dict(model.state_dict())
    _check_shared(spec, model)
    for leaf in tree_leaves((example_inputs, dict(kwargs))):
        if isinstance(leaf, Tensor) and (bad := count_not_finite(leaf)):
            raise ValueError(
                f"nlm.symmetry: a specification is proven on finite inputs, got {bad} NaN or inf "
                f"of {leaf.numel()}"
            )
    subject = _Subject(model, example_inputs, kwargs, forward)
    all_groups = list(spec.free)
    worst = 0.0
    for seed in range(seeds):
        worst = max(worst, subject.change(spec, spec.random(seed)))
    control = min((_control(spec, subject, group) for group in all_groups), default=None)
    allowed = subject.tolerance
    if control is not None:
        allowed = min(allowed, _CONTROL_RATIO * control)
    for number, group in enumerate(all_groups):
        error = subject.change(spec, _only(spec.random(seeds + number), group))
        worst = max(worst, error)
        if error > allowed:
            raise SymmetryError(
                f"nlm.symmetry: a permutation of group {group!r} ({spec.groups[group].origin}) "
                f"must not change the outputs, got a relative change of {error:.1e}"
            )
    if worst > allowed:
        raise SymmetryError(
            f"nlm.symmetry: permuting all groups ({', '.join(all_groups)}) at once must not change "
            f"the outputs, got a relative change of {worst:.1e}"
        )
    dtype = str(subject.dtype).removeprefix("torch.")
    return Verification(dtype, seeds, worst, control, spec.digest())


def _check_shared(spec: PermutationSpec, model: nn.Module) -> None:
    """Raises SymmetryError where a parameter under two names would be permuted in two ways."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        other = first.setdefault(id(tensor), name)
        if spec.params[name] != spec.params[other]:
            raise SymmetryError(
                f"nlm.symmetry: a parameter that is shared has one layout under all its names, got "
                f"[{', '.join(map(str, spec.params[other]))}] for {other!r} and "
                f"[{', '.join(map(str, spec.params[name]))}] for {name!r}"
            )


def _control(spec: PermutationSpec, subject: "_Subject", group: str) -> float:
    """The largest effect of permuting a group everywhere except in one of its parameters."""
    carriers = dict.fromkeys(name for name, _ in spec.carriers(group))
    permutation = _only(spec.random(0), group)
    effect = 0.0
    for left_out in sorted(carriers, key=lambda name: -len(spec.params[name])):
        effect = max(effect, subject.change(spec, permutation, left_out))
        if effect > 1e-3:
            break
    if effect < _LEAST_EFFECT[subject.dtype]:
        raise SymmetryError(
            f"nlm.symmetry: a group can be proven only where its units matter, got no effect on "
            f"the outputs ({effect:.1e}) when {group!r} ({spec.groups[group].origin}) is permuted "
            f"everywhere but in one parameter"
        )
    return effect


def _only(permutation: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    return {group: permutation[group]}


class _Subject:
    """A model prepared for the proof, and what it computes for the example."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        kwargs: Mapping[str, Any],
        forward: Callable[..., Any] | None,
    ) -> None:
        if forward is not None:
            self.call = forward
            example: Any = example_inputs
        else:
            self.call = lambda model, args, **kwargs: model(*args, **kwargs)
            example = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        self.dtype = torch.float64
        self.model = copy.deepcopy(model).eval().double()
        self.state = _perturbed(self.model.state_dict())
        self.example = tree_map_only(Tensor, _double, (example, dict(kwargs)))
        try:
            self.outputs = self.run(self.state)
        except (RuntimeError, TypeError):
            self.dtype = next(
                (p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32
            )
            self.model = copy.deepcopy(model).eval()
            self.state = _perturbed(self.model.state_dict())
            self.example = (example, dict(kwargs))
            self.outputs = self.run(self.state)
        self.tolerance = _TOLERANCE[self.dtype]
        self.scale = max((float(out.abs().max()) for out in self.outputs if out.numel()), default=0)
        if not 0 < self.scale < float("inf"):
            raise SymmetryError(
                f"nlm.symmetry: a specification is proven on finite outputs that are not all zero, "
                f"got a largest output of {self.scale}"
            )

    def run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The real outputs with some weights; the model may write into its input."""
        self.model.load_state_dict(state)
        example, kwargs = tree_map_only(Tensor, torch.clone, self.example)
        with torch.no_grad():
            outputs = self.call(self.model, example, **kwargs)
        return [leaf.clone() for leaf in tree_leaves(outputs) if _is_float(leaf)]

    def change(
        self,
        spec: PermutationSpec,
        permutation: dict[str, Tensor],
        left_out: str | None = None,
    ) -> float:
        """The relative change of the outputs under a permutation, one parameter left as it was."""
        state = spec.apply(permutation, self.state)
        if left_out is not None:
            state[left_out] = self.state[left_out]
        differences = [
            float((new - old).abs().max())
            for new, old in zip(self.run(state), self.outputs, strict=True)
            if old.numel()
        ]
        return max(differences) / self.scale


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _perturbed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with vectors and zero tensors moved by a third of their scale."""
    generator = torch.Generator().manual_seed(0)
    sizes = {
        name: float(tensor.detach().double().square().mean().sqrt())
        for name, tensor in state.items()
        if _is_float(tensor) and tensor.numel()
    }
    moved = {name: tensor.detach().clone() for name, tensor in state.items()}
    for name, size in sizes.items():
        tensor = moved[name]
        if tensor.dim() == 1 or size == 0:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            noise *= 0.3 * (size or _size_around(name, sizes))
            noise = noise.abs() if "var" in name else noise
            moved[name] = tensor + noise.to(tensor.device, tensor.dtype)
    return moved


def _size_around(name: str, sizes: Mapping[str, float]) -> float:
    """The mean size of what is not zero in an entry's module, or else in the model."""
    module = name.rpartition(".")[0]
    siblings = [size for other, size in sizes.items() if other.rpartition(".")[0] == module]
    for candidates in (siblings, list(sizes.values())):
        if found := [size for size in candidates if size > 0]:
            return sum(found) / len(found)
    return 1.0
