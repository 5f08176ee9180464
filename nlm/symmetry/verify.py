"""The proof of a specification: its permutations do not change the function of a model.

Random permutations of all groups at once, and of each group alone, must leave the outputs as they
are to rounding and to a thousandth of the effect of a control: the same group permuted everywhere
except in one place. A control without effect proves nothing. Where a group fails, the place that
explains it is searched (:func:`_culprit`).
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nlm._state_dict import overlapping, place_of
from nlm.symmetry import gather
from nlm.symmetry.layout import Fixed, Layout, Ref, product, references
from nlm.symmetry.permutation import Permutation
from nlm.symmetry.proof import SymmetryError, VacuousError, Verification
from nlm.symmetry.spec import PermutationSpec
from nlm.symmetry.subject import Example, Subject, other_shapes

_CONTROL_RATIO = 1e-3  # the error of a true symmetry against the effect of a broken one
_CLEAR_EFFECT = 1e-4  # of a control, beyond which no stronger one is looked for
_MOST_TRIALS = 200  # of the search for the place that explains a failure

Place = tuple[str, int]  # a dimension of a parameter
Changes = Mapping[Place, Layout | None]  # what stands there instead; None where nothing moves


def verify(
    spec: PermutationSpec,
    model: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    seeds: int,
    forward: Callable[..., Any] | None = None,
    more_inputs: Iterable[Any] = (),
) -> Verification:
    """Proves ``spec`` on ``model``; see :meth:`PermutationSpec.verify`."""
    spec.check_state_dict(model.state_dict())
    _check_shared(spec, model)
    example: Example = (example_inputs, dict(kwargs))
    more = [_more(example, inputs, forward) for inputs in more_inputs]
    subject = Subject(
        model, [example, *more], () if more else other_shapes(example), forward, spec.outputs,
        spec.stacks,
    )  # fmt: skip
    trials = _Trials(spec, subject)
    errors = {group: trials.alone(group) for group in trials.places}
    controls = {group: trials.control(group) for group in trials.places}
    _check_alone(trials, errors, controls)
    control = min(controls.values(), default=None)
    allowed = min([subject.tolerance, *(_CONTROL_RATIO * each for each in controls.values())])
    worst = max(errors.values(), default=0.0)
    for seed in range(seeds):
        error = trials.at_once(spec.random(seed))
        if error > allowed:
            raise _not_together(trials, spec.random(seed), error, allowed)
        worst = max(worst, error)
    return Verification(subject.text, seeds, worst, control, spec.digest(), subject.shapes)


def confirm(
    spec: PermutationSpec,
    model: nn.Module,
    example_inputs: Any,
    forward: Callable[..., Any] | None = None,
) -> None:
    """Sees that a specification with a proof holds on a model at hand, in four runs of the example.

    All groups are permuted at once, in float64 and with perturbed weights as in the proof. That
    must leave the outputs as they are, to rounding and to a thousandth of the effect of a control,
    in which every group is left out in one place: no group may be moved against what this model
    makes of the example. That each group alone has an effect on the outputs, without which its
    error would not be seen, and that other shapes of inputs do as well is left to the proof
    (:meth:`PermutationSpec.verify`), made on a model with the same entries.

    Raises
    ------
    SymmetryError
        The outputs change, or the control does not change them.
    """
    spec.check_state_dict(model.state_dict())
    _check_shared(spec, model)
    subject = Subject(model, [(example_inputs, {})], (), forward, spec.outputs, spec.stacks)
    trials = _Trials(spec, subject)
    if not trials.places:
        return
    error = trials.at_once(trials.drawn)
    left_out = {trials.distinct(group)[0]: None for group in trials.places}
    control = trials.at_once(trials.drawn, left_out)
    allowed = min(subject.tolerance, _CONTROL_RATIO * control)
    if error > allowed or control < _least_effect(subject):
        raise SymmetryError(
            f"nlm.symmetry: permuting all groups at once must not change the outputs, and must "
            f"where each is left out in one place, got relative changes of {error:.1e} and "
            f"{control:.1e}"
        )


def _more(example: Example, inputs: Any, forward: Callable[..., Any] | None) -> Example:
    args, kwargs = example
    if forward is None and isinstance(inputs, Mapping):
        return args, {**kwargs, **inputs}
    return inputs, kwargs


def _check_shared(spec: PermutationSpec, model: nn.Module) -> None:
    """Raises SymmetryError where a parameter under two names would be permuted in two ways."""
    first: dict[Hashable, str] = {}
    members = {each for of in spec.stacks.values() for each in of}
    state = model.state_dict(keep_vars=True)
    for name in overlapping(state):
        if name in members or any(any(references(layout)) for layout in spec.params[name]):
            raise SymmetryError(
                f"nlm.symmetry: a parameter that shares memory with one of another form stays as "
                f"it is, got groups on {name!r}"
            )
    for name, tensor in state.items():
        other = first.setdefault(place_of(tensor), name)
        if name != other and not members.isdisjoint((name, other)):
            raise SymmetryError(
                f"nlm.symmetry: a member of a stack is not shared, got one tensor for {other!r} "
                f"and {name!r}"
            )
        if name not in members and spec.params[name] != spec.params[other]:
            raise SymmetryError(
                f"nlm.symmetry: a parameter that is shared has one layout under all its names, got "
                f"[{', '.join(map(str, spec.params[other]))}] for {other!r} and "
                f"[{', '.join(map(str, spec.params[name]))}] for {name!r}"
            )


def _check_alone(
    trials: "_Trials", errors: Mapping[str, float], controls: Mapping[str, float]
) -> None:
    """Raises where single groups change the outputs, or cannot be told from rounding."""
    tolerance = trials.subject.tolerance
    if broken := [group for group, error in errors.items() if error > tolerance]:
        group = broken[0]
        raise SymmetryError(
            f"nlm.symmetry: a permutation of group {_named(trials, group)} must not change the "
            f"outputs, got a relative change of {errors[group]:.1e}: {_culprit(trials, group)}",
            broken,
        )
    least = _least_effect(trials.subject)
    vacuous = [
        group
        for group, effect in controls.items()
        if effect < least or errors[group] > _CONTROL_RATIO * effect
    ]
    if vacuous:
        named = ", ".join(_named(trials, group) for group in vacuous[:5])
        raise VacuousError(
            f"nlm.symmetry: a group can be proven only where its units matter, got no effect on "
            f"the outputs ({controls[vacuous[0]]:.1e}) when it is permuted everywhere but in one "
            f"place, for {named}{f' and {len(vacuous) - 5} more' if vacuous[5:] else ''}",
            vacuous,
        )


def _least_effect(subject: Subject) -> float:
    """Of a control that can be told from rounding.

    In float64 a small effect is one: in a network of small weights the biases of the last layer may
    outweigh what comes from the first.
    """
    exact = subject.text == "float64"
    return min(1e-3 * subject.tolerance, 1e-12) if exact else subject.tolerance


def _not_together(
    trials: "_Trials", permutation: Permutation, error: float, allowed: float
) -> SymmetryError:
    """Groups that hold alone, on the first example, and not together or on all examples."""
    everywhere = slice(None)
    trials.drawn = permutation
    for group in trials.places:
        alone = trials.alone(group, examples=everywhere)
        if alone > allowed:
            return SymmetryError(
                f"nlm.symmetry: a permutation of group {_named(trials, group)} must not change the "
                f"outputs for inputs of another shape, got a relative change of {alone:.1e}: "
                f"{_culprit(trials, group, everywhere)}",
                [group],
            )
    needed = [
        group
        for group in list(trials.places)[:_MOST_TRIALS]
        if trials.at_once({g: p for g, p in permutation.items() if g != group}) <= allowed
    ]
    without = f", and none without one of {', '.join(needed)}" if needed else ""
    return SymmetryError(
        f"nlm.symmetry: permuting all groups at once must not change the outputs, got a relative "
        f"change of {error:.1e}{without}",
        needed,
    )


class _Trials:
    """Runs of the subject with some groups permuted in some places."""

    def __init__(self, spec: PermutationSpec, subject: Subject) -> None:
        self.spec = spec
        self.subject = subject
        self.places: dict[str, list[Place]] = {
            group: spec.carriers(group) for group, of in spec.free.items() if of.size > 1
        }
        self.drawn = spec.random(2**31)

    def at_once(self, permutation: Permutation, changes: Changes | None = None) -> float:
        """The change of the outputs of all examples under a permutation.

        ``changes``: other layouts in some places.
        """
        moved = self._moved(permutation, self.spec.params, self._aliased(changes))
        return self.subject.change(moved, slice(None))

    def alone(
        self, group: str, changes: Changes | None = None, examples: slice = slice(1)
    ) -> float:
        """The change when one group is permuted, with other layouts in some places."""
        changes = self._aliased(changes)
        names = dict.fromkeys(name for name, _ in (*self.places[group], *changes))
        moved = self._moved({group: self.drawn[group]}, names, changes)
        return self.subject.change(moved, examples)

    def control(self, group: str) -> float:
        """The largest effect of permuting a group everywhere except in one place.

        Where it stands in one place only, its units get other values instead.
        """
        places = self.distinct(group)
        if len(places) == 1:
            [(name, _)] = places
            tensor = self.subject.state[name]
            [permuted] = self._moved({group: self.drawn[group]}, [name], {}).values()
            factors = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0))
            other = tensor * (2 * factors).to(tensor.device, tensor.dtype)
            changed = torch.where(permuted == tensor, tensor, other)
            return self.subject.change(dict.fromkeys(self.subject.aliases[name], changed))
        clear = max(_CLEAR_EFFECT, self.subject.tolerance / _CONTROL_RATIO)
        effect = 0.0
        for place in places:
            effect = max(effect, self.alone(group, {place: None}))
            if effect > clear:
                break
        return effect

    def _aliased(self, changes: Changes | None) -> Changes:
        """Changes under all names of the parameters."""
        return {
            (alias, dim): layout
            for (name, dim), layout in (changes or {}).items()
            for alias in self.subject.aliases[name]
        }

    def distinct(self, group: str) -> list[Place]:
        """Where a group stands, each shared parameter once, matrices first."""
        places = [
            (name, dim) for name, dim in self.places[group] if self.subject.aliases[name][0] == name
        ]
        return sorted(places, key=lambda place: -len(self.spec.params[place[0]]))

    def _moved(
        self, permutation: Permutation, names: Iterable[str], changes: Changes
    ) -> dict[str, Tensor]:
        """The entries of the state that a permutation moves, in their new order."""
        gathers = gather.Gathers(self.spec.groups, permutation)
        plans = {}
        for name in names:
            layouts = [
                changes.get((name, dim)) or layout
                for dim, layout in enumerate(self.spec.params[name])
            ]
            left_out = [dim for (of, dim), layout in changes.items() if of == name and not layout]
            if plan := gathers.of(tuple(layouts), left_out):
                plans[name] = plan
        moved = gather.apply([self.subject.state[name] for name in plans], plans.values())
        return dict(zip(plans, moved, strict=True))


def _culprit(trials: _Trials, group: str, examples: slice = slice(1)) -> str:
    """Says in which place a group stands, or is missing, for its permutation to change nothing."""
    for number, (changes, text) in enumerate(_explanations(trials, group)):
        if number == _MOST_TRIALS:
            break
        if trials.alone(group, changes, examples) <= trials.subject.tolerance:
            return text
    return f"no single place explains it; it stands on {_listed(trials.places[group])}"


def _explanations(trials: _Trials, group: str) -> Iterator[tuple[Changes, str]]:
    """Single places first, then the places of a module, then the sides of a parameter."""
    standing = trials.places[group]
    missing = list(_missing(trials, group))
    for place in standing:
        if len(standing) > 1:
            text = f"it stands on {_listed([place])}, without which they stay"
            yield {place: None}, text
    for place, layout in missing:
        yield {place: layout}, f"it is missing on {_listed([place])}, with which they stay"
    exact = [(place, layout) for place, layout in missing if isinstance(layout, Ref)]
    for module in dict.fromkeys(_module(place) for place, _ in exact):
        added = {place: layout for place, layout in exact if _module(place) == module}
        if len(added) > 1:
            yield added, f"it is missing on {_listed(added)}, with which they stay"
    for module in dict.fromkeys(map(_module, standing)):
        places = [place for place in standing if _module(place) == module]
        if 1 < len(places) < len(standing):
            text = f"it stands on {_listed(places)}, without which they stay"
            yield dict.fromkeys(places), text
    for place in standing:
        for other, layout in exact:
            if other[0] == place[0]:
                text = f"it stands on {_listed([place])} instead of dimension {other[1]}"
                yield {place: None, other: layout}, text


def _missing(trials: _Trials, group: str) -> Iterator[tuple[Place, Layout]]:
    """Where a group could stand and does not; its own modules and dimensions of its size first."""
    of = trials.spec.groups[group]
    if of.parents:
        return
    modules = set(map(_module, trials.places[group]))
    found: list[tuple[Place, Layout]] = []
    for name, layouts in trials.spec.params.items():
        for dim, layout in enumerate(layouts):
            place, (times, rest) = (name, dim), divmod(layout.size, of.size)
            if place in trials.places[group] or rest or not times:
                continue
            unit = Ref(group, of.size)
            found.append((place, product(unit, Fixed(times))))
            if times > 1:
                found.append((place, product(Fixed(times), unit)))
    yield from sorted(
        found, key=lambda each: (not isinstance(each[1], Ref), _module(each[0]) not in modules)
    )


def _named(trials: _Trials, group: str) -> str:
    """A group with where it was found, where that is known."""
    origin = trials.spec.groups[group].origin
    return f"{group!r} ({origin})" if origin else repr(group)


def _module(place: Place) -> str:
    return place[0].rpartition(".")[0]


def _listed(places: Iterable[Place]) -> str:
    texts = [f"{name!r} dimension {dim}" for name, dim in places]
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if texts[5:] else "")
