"""The proof of a specification: its permutations do not change the function of a model.

Everything is computed on a float64 copy of the model whose norms, biases, running statistics and
zero parameters are perturbed: an untrained LayerScale of zero or a dead layer would hide a mistake.
Where the model cannot compute in float64 it is proven in its own dtype, with the tolerance that the
dtype allows.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nlm.symmetry.spec import PermutationSpec, SymmetryError, Verification

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_CONTROL_RATIO = 1e-3  # the error of a true symmetry against the effect of a broken one


def verify(
    spec: PermutationSpec,
    model: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    seeds: int,
) -> Verification:
    """Proves ``spec`` on ``model``; see :meth:`PermutationSpec.verify`."""
    spec.check_state_dict(model.state_dict())
    subject = _Subject(model, example_inputs, kwargs)
    all_groups = list(spec.groups)
    worst = 0.0
    for seed in range(seeds):
        worst = max(worst, subject.change(spec, spec.random(seed), all_groups))
    control = min((_control(spec, subject, group) for group in all_groups), default=float("inf"))
    for number, group in enumerate(all_groups):
        error = subject.change(spec, _only(spec, spec.random(seeds + number), group), [group])
        worst = max(worst, error)
        if error > subject.tolerance or error > _CONTROL_RATIO * control:
            raise SymmetryError(
                f"nlm.symmetry: a permutation of group {group!r} ({spec.groups[group].origin}) "
                f"must not change the outputs, got a relative change of {error:.1e}"
            )
    if worst > subject.tolerance or worst > _CONTROL_RATIO * control:
        raise SymmetryError(
            f"nlm.symmetry: permuting all groups ({', '.join(all_groups)}) at once must not change "
            f"the outputs, got a relative change of {worst:.1e}"
        )
    return Verification(str(subject.dtype).removeprefix("torch."), seeds, worst, control)


def _control(spec: PermutationSpec, subject: "_Subject", group: str) -> float:
    """The largest effect of permuting a group everywhere except in one of its parameters."""
    carriers = dict.fromkeys(name for name, _ in spec.carriers(group))
    permutation = _only(spec, spec.random(0), group)
    effect = 0.0
    for left_out in sorted(carriers, key=lambda name: -len(spec.params[name])):
        effect = max(effect, subject.change(spec, permutation, [group], left_out))
        if effect > 1e-3:
            break
    if effect * _CONTROL_RATIO < subject.tolerance * 1e-3:
        raise SymmetryError(
            f"nlm.symmetry: a group can be proven only where its units matter, got no effect on "
            f"the outputs ({effect:.1e}) when {group!r} ({spec.groups[group].origin}) is permuted "
            f"everywhere but in one parameter"
        )
    return effect


def _only(spec: PermutationSpec, permutation: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    return {group: permutation[group]}


class _Subject:
    """A model prepared for the proof, and what it computes for the example."""

    def __init__(self, model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any]) -> None:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        self.dtype = torch.float64
        self.model = copy.deepcopy(model).eval().double()
        self.state = _perturbed(self.model.state_dict())
        self.args, self.kwargs = tree_map_only(Tensor, _double, (args, dict(kwargs)))
        try:
            self.outputs = self.run(self.state)
        except (RuntimeError, TypeError):
            self.dtype = next(
                (p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32
            )
            self.model = copy.deepcopy(model).eval()
            self.state = _perturbed(self.model.state_dict())
            self.args, self.kwargs = args, dict(kwargs)
            self.outputs = self.run(self.state)
        self.tolerance = _TOLERANCE[self.dtype]
        self.scale = max((float(out.abs().max()) for out in self.outputs if out.numel()), default=0)
        if not 0 < self.scale < float("inf"):
            raise SymmetryError(
                f"nlm.symmetry: a specification is proven on finite outputs that are not all zero, "
                f"got a largest output of {self.scale}"
            )

    def run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            outputs = torch.func.functional_call(
                self.model, dict(state), self.args, self.kwargs, strict=True
            )
        return [leaf for leaf in tree_leaves(outputs) if _is_float(leaf)]

    def change(
        self,
        spec: PermutationSpec,
        permutation: dict[str, Tensor],
        groups: list[str],
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
    """The state with vectors and zero tensors moved by a tenth to a third of their scale."""
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, tensor in state.items():
        if _is_float(tensor) and (tensor.dim() == 1 or not tensor.any()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            noise = noise.to(tensor.device, tensor.dtype)
            moved[name] = tensor + 0.3 * noise.abs() if "var" in name else tensor + 0.3 * noise
        else:
            moved[name] = tensor.detach()
    return moved
