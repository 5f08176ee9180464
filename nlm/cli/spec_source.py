"""SOURCE of the ``nlm spec`` commands: where a model comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from nlm.recipe.functions import find_function
from nlm.symmetry import PermutationSpec, pretrained, trace

Example = tuple[nn.Module, Any, dict[str, Any]]


class Source(Protocol):
    """A model that can be traced, and run with its weights."""

    def trace(self, outputs: Sequence[str] | None, cache: bool) -> PermutationSpec: ...

    def with_weights(self, random: bool) -> Example: ...


def open_source(text: str, model_class: str | None = None) -> Source:
    """What SOURCE names: a function of a module, or a Hugging Face model."""
    module, colon, function = text.rpartition(":")
    if colon and not Path(text).exists():
        return _Function(module, function)
    return _Pretrained(text, model_class)


@dataclass(frozen=True)
class _Function:
    """``package.module:function``, which returns (model, example_inputs[, kwargs])."""

    module: str
    function: str

    def trace(self, outputs: Sequence[str] | None, cache: bool) -> PermutationSpec:
        model, example_inputs, kwargs = self.with_weights()
        return trace(model, example_inputs, kwargs, outputs)

    def with_weights(self, random: bool = False) -> Example:
        made = find_function(f"{self.module}:{self.function}", "nlm spec: a source")()
        if (
            not isinstance(made, tuple)
            or len(made) not in (2, 3)
            or not isinstance(made[0], nn.Module)
        ):
            raise ValueError(
                f"nlm spec: a source function returns (model, example_inputs[, kwargs]), got "
                f"{type(made).__name__} from {f'{self.module}:{self.function}'!r}"
            )
        model, inputs, kwargs = (*made, {})[:3]
        if isinstance(inputs, Mapping):
            return model, (), {**inputs, **kwargs}
        return model, inputs, dict(kwargs)


@dataclass(frozen=True)
class _Pretrained:
    """A folder, a config.json, or an id in the local cache of Hugging Face."""

    source: str
    model_class: str | None

    def trace(self, outputs: Sequence[str] | None, cache: bool) -> PermutationSpec:
        return pretrained.trace_config(self.source, self.model_class, outputs=outputs, cache=cache)

    def with_weights(self, random: bool) -> Example:
        model = pretrained.load_model(self.source, self.model_class, random)
        return model, (), pretrained.make_inputs(model)
