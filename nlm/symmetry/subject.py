"""A model prepared for the proof of a specification: copied, perturbed, in float64, with examples.

Nothing may be hidden. An untrained LayerScale of 1e-6 or a zero gamma hides what lies behind it,
small weights let a deep network's signal die below its biases, an even bias hides a forgotten one.
So weights are scaled up to where a layer keeps the size of its input, and vectors are moved by a
third of their size: a symmetry holds for any weights.

The error that is allowed follows from what the model computes in, which is watched, not guessed
from the error: the narrowest floating-point type of any result that depends on the weights.
"""

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nlm._state_dict import count_not_finite, place_of
from nlm.symmetry.outputs import named_tensors
from nlm.symmetry.proof import SymmetryError
from nlm.symmetry.stacks import Stacks, joined, separated

Example = tuple[Any, dict[str, Any]]

#: Relative error of outputs that rounding alone can make.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_OTHER_SHAPES = 2
_MOST_NOISE = 1e-4  # what float32 inside of a deep network may make of it


class Subject:
    """A copy of a model with perturbed weights, and what it computes for the examples.

    Attributes
    ----------
    model : the copy.
    state : name -> perturbed weights; the same tensor under all names of a shared parameter, the
        members of a stack as one.
    aliases : name -> all names of the same parameter.
    text : what it computes in: "float64", "float32 inside", ...
    tolerance : the largest error that is put down to rounding.
    shapes : the number of shapes of inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        others: Iterable[Example] = (),
        forward: Callable[..., Any] | None = None,
        outputs: Sequence[str] = (),
        stacks: Stacks | None = None,
    ) -> None:
        """``others`` are examples that the model need not take."""
        if any(tensor.is_meta for tensor in model.state_dict().values()):
            raise ValueError(
                "nlm.symmetry: a specification is proven on a model with weights, got one on the "
                "meta device"
            )
        for leaf in tree_leaves(list(examples)):
            if isinstance(leaf, Tensor) and (bad := count_not_finite(leaf)):
                raise ValueError(
                    f"nlm.symmetry: a specification is proven on finite inputs, got {bad} NaN or "
                    f"inf of {leaf.numel()}"
                )
        self._call = forward or call
        self._selected = tuple(outputs)
        self._stacks = stacks or {}
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        types = dict.fromkeys((torch.float64, torch.float32, own))
        for dtype in types:
            self.model = _copied(model, dtype).eval()
            self._examples = [_to(dtype, example) for example in examples]
            try:
                found, narrowest = self._watched(dtype)
                if _size(found) < math.inf or dtype == list(types)[-1]:
                    break
            except (RuntimeError, TypeError, ValueError):
                if dtype == list(types)[-1]:
                    raise
        self._prepare()
        for other in others:
            if len(self._examples) < len(examples) + _OTHER_SHAPES:
                self._add(_to(dtype, other))
        inside = " inside" if narrowest != dtype else ""
        self.text = f"{narrowest}{inside}".removeprefix("torch.")
        self.tolerance = TOLERANCE[narrowest]
        if self.text != "float64":
            self.tolerance = max(self.tolerance, min(8 * self._noise(), _MOST_NOISE))
        self.shapes = len({_shapes(example) for example in self._examples})

    def _watched(self, dtype: torch.dtype) -> tuple[list[Tensor], torch.dtype]:
        """What the first example gives, and the narrowest type of what depends on the weights."""
        precision = _Precision(self.model.state_dict().values(), dtype)
        try:
            with precision:
                return self._run(self._examples[0]), precision.narrowest
        except RuntimeError:  # torch.cond and its kind run under no watch, and then not without it
            torch._dynamo.reset()
        return self._run(self._examples[0]), precision.narrowest

    def _noise(self) -> float:
        """The relative change of the outputs when all weights are rounded to float32 otherwise."""
        generator = torch.Generator().manual_seed(1)
        eps = torch.finfo(torch.float32).eps / 2
        moved = {}
        for name, tensor in self.state.items():
            if tensor.is_floating_point():
                step = eps * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                moved[name] = tensor * (1 + step).to(tensor.device, tensor.dtype)
        return self.change(moved, slice(None))

    def _prepare(self) -> None:
        """Perturbs the weights as strongly as the model bears, and keeps what it then computes."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for perturb in (_strongly, _mildly):
            self._live = self.model.state_dict()
            again = self.model.state_dict()
            self._in_place = all(self._live[n].data_ptr() == again[n].data_ptr() for n in again)
            self.aliases = _aliases(self._live)
            self.state = {**before, **perturb(before)}
            for name, names in self.aliases.items():
                self.state[name] = self.state[names[0]]
            self._outputs = [self._expected(example) for example in self._examples]
            scales = [_size(outputs) for outputs in self._outputs]
            if all(0 < scale < math.inf for scale in scales):
                break
        else:
            if not self._outputs[0]:
                raise SymmetryError(
                    "nlm.symmetry: a specification is proven on outputs of real or complex "
                    "numbers, got none"
                )
            bad = [name for name, tensor in before.items() if count_not_finite(tensor)]
            scale = next(scale for scale in scales if not 0 < scale < math.inf)
            where = f", with NaN or inf in {', '.join(map(repr, bad[:5]))}" if bad else ""
            raise SymmetryError(
                f"nlm.symmetry: a specification is proven on finite outputs that are not all zero, "
                f"got a largest output of {scale}{where}"
            )
        after = self.model.state_dict()
        self._writes = any(not torch.equal(after[name], self.state[name]) for name in after)
        self.state = joined(self._stacks, self.state)
        self.aliases |= {name: [name] for name in self._stacks}

    def _add(self, example: Example) -> None:
        """One more example, where it is of a new shape and the model takes it."""
        if _shapes(example) in map(_shapes, self._examples):
            return
        try:
            outputs = self._expected(example)
        except Exception:  # a model may refuse a shape in any way that it likes
            return
        if 0 < _size(outputs) < math.inf:
            self._examples.append(example)
            self._outputs.append(outputs)

    def change(
        self, moved: Mapping[str, Tensor], examples: slice = slice(1),
        since: Mapping[str, Tensor] | None = None,
    ) -> float:  # fmt: skip
        """The relative change of the outputs with other entries, from ``since`` where given."""
        if self._writes:
            moved = {**self.state, **moved}
        worst = 0.0
        try:
            for example, outputs in zip(
                self._examples[examples], self._outputs[examples], strict=True
            ):
                if since is not None:
                    self._load({**self.state, **since})
                    outputs = self._run(example)
                self._load(moved)
                worst = max(worst, _distance(self._run(example), outputs))
        finally:
            self._load({name: self.state[name] for name in moved})
        return worst

    def difference(self, model: nn.Module) -> float:
        """The relative difference between what another model computes and what this one does."""
        own, self.model = self.model, model
        try:
            return max(map(_distance, map(self._run, self._examples), self._outputs))
        finally:
            self.model = own

    def _expected(self, example: Example) -> list[Tensor]:
        """What the perturbed model computes; it may write into its buffers."""
        self._load(self.state)
        return self._run(example)

    def _load(self, state: Mapping[str, Tensor]) -> None:
        if not self._in_place:
            self.model.load_state_dict(separated(self._stacks, {**self.state, **state}))
            return
        with torch.no_grad():
            for name, tensor in separated(self._stacks, state).items():
                self._live[name].copy_(tensor)

    def _run(self, example: Example) -> list[Tensor]:
        """The real outputs; the model may write into its input and draw random numbers."""
        args, kwargs = tree_map_only(Tensor, torch.clone, example)
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            outputs = named_tensors(self._call(self.model, args, **kwargs))
        outputs = {name: tensor.detach() for name, tensor in outputs.items()}
        parts = tuple(f"{name}." for name in self._selected)
        chosen = [
            tensor
            for name, tensor in outputs.items()
            if name in self._selected or f"{name}.".startswith(parts)
        ]
        return [
            torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()
            for tensor in chosen or outputs.values()
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel()
        ]


def _copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that computes in another type; parameters that share memory share it there too."""
    computed = (
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )  # by hooks, from parameters: a pruned weight
    try:
        copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except RuntimeError as error:
        raise ValueError(
            f"nlm.symmetry: a specification is proven on a copy of the model, got one that cannot "
            f"be copied: {error}"
        ) from error
    made: dict[Hashable, Tensor] = {}
    kept = []  # lest the memory of one is used for another

    def cast(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return made.setdefault(place_of(tensor), _cast(tensor, dtype))

    return copied._apply(cast)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class _Precision(TorchDispatchMode):
    """Watches for the narrowest floating-point type of what depends on some tensors."""

    def __init__(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.narrowest = dtype
        self._dependent = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(StorageWeakRef(source.untyped_storage()) in self._dependent for source in sources):
            for result in tree_leaves(results):
                if isinstance(result, Tensor):
                    self._dependent.add(StorageWeakRef(result.untyped_storage()))
                    real = result.dtype.to_real() if result.is_complex() else result.dtype
                    if TOLERANCE.get(real, 0.0) > TOLERANCE[self.narrowest]:
                        self.narrowest = real
        return results


def other_shapes(example: Example) -> Iterator[Example]:
    """Examples of another batch size and sequence length, made from one; the best first.

    The batch is the first dimension of every tensor. A sequence is the second dimension of a matrix
    of integers, and of all tensors that have as many there (ids, masks, position ids). A longer one
    comes first: it reads rows of a table of positions that a shorter one does not.
    """
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    batches = {tensor.shape[0] for tensor in tensors}
    lengths = {t.shape[1] for t in tensors if t.dim() == 2 and not t.is_floating_point()}
    has_batch, has_length = len(batches) == 1 and 0 not in batches, len(lengths) == 1
    for batch, length in ((1, 1), (-1, -1), (1, 0), (0, 1), (0, -1)):
        if (batch and not has_batch) or (length and not has_length):
            continue
        made = example
        for dim, sizes, step in ((1, lengths, length), (0, batches, batch)):
            for size in sizes if step else ():
                made = tree_map_only(Tensor, partial(_resize, dim=dim, size=size, step=step), made)
        yield made


def _resize(tensor: Tensor, dim: int, size: int, step: int) -> Tensor:
    """One entry more or less along a dimension of that size."""
    if tensor.dim() <= dim or tensor.shape[dim] != size:
        return tensor
    if step < 0 and size > 1:
        return tensor.narrow(dim, 0, size - 1)
    first = tensor.narrow(dim, 0, 1)
    return torch.cat([tensor, first.roll(1, -1) if dim == 0 else first], dim)


def call(model: nn.Module, args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs) if isinstance(args, tuple) else model(args, **kwargs)


def _to(dtype: torch.dtype, example: Example) -> Example:
    return tree_map_only(Tensor, lambda tensor: _cast(tensor, dtype), example)


def _shapes(example: Example) -> tuple[torch.Size, ...]:
    return tuple(leaf.shape for leaf in tree_leaves(example) if isinstance(leaf, Tensor))


def _size(outputs: Sequence[Tensor]) -> float:
    """The largest absolute output; inf where one is not finite."""
    if any(count_not_finite(each) for each in outputs):
        return math.inf
    return max((float(each.abs().max()) for each in outputs), default=0.0)


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value; inf where one is not finite."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape or count_not_finite(one):
            return math.inf
        worst = max(worst, float((one - other).abs().max()))
    return worst / _size(expected)


def _aliases(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Each entry's names: those under which the state dict has the same memory."""
    places: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        places.setdefault(key, []).append(name)
    return {name: names for names in places.values() for name in names}


def _strongly(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of such a size that a layer keeps the size of its input, vectors of a size near 1."""
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, tensor, size in _reals(state):
        if max(tensor.shape, default=1) == tensor.numel():
            noise = _noise(tensor, generator)
            tensor = tensor * (0.3 / size) if 0 < size < 0.1 else tensor
            if bool((tensor > 0).all()):
                moved[name] = tensor * (0.3 * noise).exp()
            else:
                moved[name] = tensor + 0.3 * max(size, 0.3) * noise
        else:
            inputs = tensor[0].numel() if tensor.dim() != 3 else max(tensor.shape[1:])
            goal = inputs**-0.5
            again = tensor * max(1.0, goal / size) if size else goal * _noise(tensor, generator)
            moved[name] = again
    return moved


def _mildly(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors and zero tensors moved by a third of their size, or of the size of their module."""
    generator = torch.Generator().manual_seed(0)
    sizes = {name: size for name, _, size in _reals(state)}
    moved = {}
    for name, tensor, size in _reals(state):
        if tensor.dim() == 1 or size == 0:
            noise = 0.3 * (size or _size_around(name, sizes)) * _noise(tensor, generator)
            moved[name] = tensor + (noise.abs() if bool((tensor >= 0).all()) else noise)
    return moved


def _reals(state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, float]]:
    """The finite floating-point entries with their root mean square."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            size = float(tensor.double().square().mean().sqrt())
            if math.isfinite(size):
                yield name, tensor, size


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return noise.to(tensor.device, tensor.dtype)


def _size_around(name: str, sizes: Mapping[str, float]) -> float:
    """The mean size of what is not zero in an entry's module, or else in the model."""
    module = name.rpartition(".")[0]
    siblings = [size for other, size in sizes.items() if other.rpartition(".")[0] == module]
    for candidates in (siblings, list(sizes.values())):
        if found := [size for size in candidates if size > 0]:
            return sum(found) / len(found)
    return 1.0
