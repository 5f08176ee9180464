"""Recipes of mergekit, version 0.1.5, for the methods that both have.

=================  =================  ==============================================================
merge_method       method             what its parameters become
=================  =================  ==============================================================
linear             linear             weight, normalize (true)
slerp              slerp              t; the base is the first of the two experts
task_arithmetic    task_arithmetic    weight, normalize (false), lambda: scale
ties               ties               weight, density (1), lambda: scale, normalize (true): dialect
                                      mergekit, false: mergekit_sum
dare_linear        dare               weight, 1 - density: drop, lambda: scale, normalize (false),
                                      rescale (true): l1, false: none
dare_ties          dare_ties          as both
breadcrumbs        breadcrumbs        weight, density (1), gamma (0.01), lambda: scale, normalize
                                      (false)
breadcrumbs_ties   breadcrumbs_ties   as both
della_linear       della_linear       weight, density (1), epsilon (0.15), lambda: scale, normalize
                                      (false), rescale (true): l1, false: none
della              della              as both, normalize (true)
sce                sce                select_topk (1): select
model_stock        model_stock        none; filter_wise is not there
=================  =================  ==============================================================

A parameter is looked up at the model, the slice and the top, and the first rule that fits a tensor
counts; ``weight`` and ``t`` have no default. What one of these methods reads and another does not,
mergekit passes over in silence at the top, and so does this; ``int8_mask`` changes no result.
Computed is in float32 whatever the ``dtype``, which is the output's where there is no
``out_dtype``. Paths are relative to the working folder, as mergekit has it.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yaml.nodes import MappingNode, Node

from nlm.recipe.methods import DTYPES, METHODS, NUMBERS
from nlm.recipe.nodes import Reader, described, is_empty
from nlm.recipe.recipe import Expert, Output, Recipe
from nlm.recipe.values import Rule, Values

#: merge_method -> method, and what mergekit takes for ``normalize`` and ``rescale`` by default.
_METHODS = {
    "linear": ("linear", True, False),
    "slerp": ("slerp", False, False),
    "task_arithmetic": ("task_arithmetic", False, False),
    "ties": ("ties", True, False),
    "dare_linear": ("dare", False, True),
    "dare_ties": ("dare_ties", False, True),
    "breadcrumbs": ("breadcrumbs", False, False),
    "breadcrumbs_ties": ("breadcrumbs_ties", False, False),
    "della_linear": ("della_linear", False, True),
    "della": ("della", True, True),
    "sce": ("sce", False, False),
    "model_stock": ("model_stock", False, False),
}
_KEYS = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer",
)  # fmt: skip
_LACKING = {
    "modules": "write 'models', with filters for what differs between modules",
    "chat_template": "set it in the base's folder",
}

_PER_MODEL = {name: NUMBERS[name] for name in ("weight", "density", "gamma", "epsilon")}
_NUMBERS = {
    **_PER_MODEL, "lambda": NUMBERS["scale"], "t": NUMBERS["t"], "select_topk": NUMBERS["select"],
}  # fmt: skip
_DEFAULTS = {
    "density": 1.0, "lambda": 1.0, "select_topk": 1.0, "gamma": NUMBERS["gamma"].default,
    "epsilon": NUMBERS["epsilon"].default,
}  # fmt: skip
_NAMES = {"lambda": "scale", "select_topk": "select"}
_SWITCHES = ("normalize", "rescale", "filter_wise", "int8_mask")


@dataclass
class _Input:
    """A model as it is written, with its own parameters and where it stands."""

    model: str
    node: Node
    values: dict[str, Values] = field(default_factory=dict)


def read(reader: Reader) -> Recipe:
    """The recipe of a file whose root has the key ``merge_method``.

    Raises
    ------
    RecipeError
        Everything that is wrong or that nlm lacks, a sentence with its line for each.
    """
    return _Mergekit(reader).recipe()


class _Mergekit:
    """One file.

    Attributes
    ----------
    values, switches : the parameters of all models together: of the slice, then of the top.
    inputs : the models as they are written. layers : how many layers they have.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.keys = self._mapping(reader.root, "a recipe of mergekit", (*_KEYS, *_LACKING))
        self.values: dict[str, Values] = {}
        self.switches: dict[str, bool] = {}
        self.inputs: list[_Input] = []
        self.layers: int | None = None
        for key, node in self.keys.items():
            reader.mark({"merge_method": "method", "base_model": "base"}.get(key, key), node)
            if key in _LACKING:
                reader.problem(node, f"nlm has no {key!r} of mergekit: {_LACKING[key]}")

    def recipe(self) -> Recipe:
        reader, keys = self.reader, self.keys
        here = keys.get("merge_method", reader.root)
        given = reader.choice(here, "a merge_method that nlm has", _METHODS)
        noted = reader.noted
        base = self._model("base_model", keys["base_model"]) if "base_model" in keys else None
        if "models" in keys and "slices" in keys:
            reader.problem(keys["slices"], "a recipe of mergekit has models or slices, got both")
        elif "models" in keys:
            for node in reader.items(keys["models"], "models"):
                self._input(node, ("model", "parameters"))
            if base is not None and base not in self._models():
                self.inputs.append(_Input(base, keys["base_model"]))
        elif "slices" in keys:
            self._slice(keys["slices"], base)
        elif "modules" not in keys:
            reader.problem(reader.root, "a recipe of mergekit has models, got none: write 'models'")
        is_whole = reader.noted == noted and "modules" not in keys
        if "parameters" in keys:
            self._parameters(keys["parameters"])
        dtype = self._dtype()
        if given is None:
            reader.raise_problems()
        name, normalize, rescale = _METHODS[str(given)]
        normalize = self.switches.get("normalize", normalize)
        rescale = self.switches.get("rescale", rescale)
        experts = self._experts(str(given), base, is_whole)
        self._tokenizer(base, experts)
        if given in ("ties", "breadcrumbs", "breadcrumbs_ties") and rescale:
            reader.problem(
                here, f"{given} of nlm rescales nothing, got true: write 'rescale: false'"
            )
        if given == "model_stock" and self.switches.get("filter_wise"):
            reader.problem(here, "model_stock of nlm takes whole tensors, got filter_wise: write "
                           "'filter_wise: false'")  # fmt: skip
        reader.raise_problems()
        method = METHODS[name]
        options: dict[str, Any] = {} if method.normalize is None else {"normalize": normalize}
        if "dialect" in method.parameters:
            options["dialect"] = "mergekit" if normalize else "mergekit_sum"
        if "rescale" in method.parameters:
            options["rescale"] = "l1" if rescale else "none"
        of_all = {
            key: self.values.get(key, Values()) + Values.of(each) for key, each in _DEFAULTS.items()
        }
        values = _translated({**self.values, **of_all})
        return Recipe(
            experts, name, {}, Path(str(base)) if method.base else None,
            {key: each for key, each in values.items() if key in method.parameters}, options,
            0 if method.random else None, output=Output(None, dtype), layers=self.layers,
            form="mergekit", file=reader.file, text=reader.content, lines=reader.lines,
        )  # fmt: skip

    def _mapping(self, node: Node, what: str, known: Iterable[str]) -> dict[str, Node]:
        """key -> node; for mergekit what is empty is absent."""
        found = self.reader.mapping(node, what, known)
        return {key: each for key, each in found.items() if not is_empty(each)}

    def _models(self) -> list[str]:
        return [each.model for each in self.inputs]

    def _model(self, what: str, node: Node) -> str | None:
        """The folder of a model."""
        if isinstance(node, MappingNode):
            self.reader.problem(node, f"{what} is a folder, got {described(node)}: write its path")
            return None
        text = self.reader.text(node, what)
        if text is not None and "+" in text and not os.path.exists(text):
            self.reader.problem(node, f"nlm merges no LoRA, got {text!r}: merge it into its model "
                                "first and write that folder")  # fmt: skip
            return None
        return text

    def _input(self, node: Node, known: tuple[str, ...]) -> dict[str, Node]:
        """Takes up a model with its parameters; gives its keys."""
        reader = self.reader
        keys = self._mapping(node, "what is merged", known)
        if "model" not in keys:
            if isinstance(node, MappingNode):
                reader.problem(node, "what is merged has a model, got none: write 'model: FOLDER'")
            return keys
        model, values = self._model("a model", keys["model"]), {}
        if "parameters" in keys:
            what = "the parameters of one model"
            parameters = self._mapping(keys["parameters"], what, (*_NUMBERS, *_SWITCHES))
            for key, each in parameters.items():
                if key in _PER_MODEL:
                    values[key] = reader.values(each, key, _PER_MODEL[key]) or Values()
                elif key != "int8_mask":
                    reader.problem(each, f"mergekit reads no {key!r} of one model: write it under "
                                   "the 'parameters' of the whole merge")  # fmt: skip
        if model is not None and model in self._models():
            reader.problem(node, f"a model is merged once, got {model!r} twice")
        elif model is not None:
            self.inputs.append(_Input(model, node, values))
        return keys

    def _slice(self, node: Node, base: str | None) -> None:
        """Takes up a slice that is the whole model."""
        reader, slices = self.reader, self.reader.items(node, "slices")
        if len(slices) != 1:
            reader.problem(node, f"nlm merges whole models, got {len(slices)} slices: write one of "
                           "all layers, with lists of numbers for what changes with the layer"
                           )  # fmt: skip
            return
        keys = self._mapping(slices[0], "a slice", ("sources", "base_model", "parameters"))
        if "parameters" in keys:
            self._parameters(keys["parameters"])
        own = self._model("base_model", keys["base_model"]) if "base_model" in keys else base
        if own != base:
            reader.problem(keys["base_model"], f"nlm has one base for all layers, got {own!r}: "
                           "write it beside 'merge_method'")  # fmt: skip
        if "sources" not in keys:
            reader.problem(slices[0], "a slice has sources, got none: write 'sources'")
            return
        ends = set()
        for each in reader.items(keys["sources"], "the sources of a slice"):
            of = self._input(each, ("model", "layer_range", "parameters"))
            if "layer_range" in of:
                ends.add(self._last_layer(of["layer_range"]))
            elif isinstance(each, MappingNode):
                reader.problem(each, "a source has a layer_range, got none: write 'layer_range'")
        if len(ends) > 1:
            said = " and ".join(map(str, sorted(end for end in ends if end is not None)))
            reader.problem(keys["sources"], f"all sources have as many layers, got {said}")
        self.layers = next(iter(ends), None)

    def _last_layer(self, node: Node) -> int | None:
        ends = self.reader.items(node, "a layer_range")
        if len(ends) != 2 or getattr(ends[0], "value", None) != "0":
            self.reader.problem(node, "a layer_range of a whole model is [0, LAYERS], got "
                                f"{described(node)}")  # fmt: skip
            return None
        return self.reader.whole(ends[1], "the end of a layer_range", 1)

    def _parameters(self, node: Node) -> None:
        """Takes up parameters of all models, behind those that came before."""
        keys = self._mapping(node, "parameters", (*_NUMBERS, *_SWITCHES))
        for key, each in keys.items():
            self.reader.mark(f"parameters.{key}", each)
            if key in _SWITCHES:
                if (value := self.reader.switch(each, key)) is not None:
                    self.switches.setdefault(key, value)
            elif (found := self.reader.values(each, key, _NUMBERS[key])) is not None:
                self.values[key] = self.values.get(key, Values()) + found

    def _experts(self, given: str, base: str | None, is_whole: bool) -> tuple[Expert, ...]:
        """The models that are merged, with their own numbers; counted where all were read."""
        reader, method = self.reader, METHODS[_METHODS[given][0]]
        here, inputs = self.keys["merge_method"], self.inputs
        if (method.base or given == "slerp") and base not in self._models():
            if is_whole:
                said = base or "none"
                reader.problem(here, f"{given} has a base_model among its models, got {said}")
        elif method.base:
            inputs = [each for each in inputs if each.model != base]
        elif given == "slerp":
            inputs = sorted(inputs, key=lambda each: each.model != base)
        least, most = method.experts
        if is_whole and not least <= len(inputs) <= most:
            number = f"{least}" if least == most else f"at least {least}"
            beside = " beside the base" if method.base else ""
            reader.problem(here, f"{given} merges {number} models{beside}, got {len(inputs)}")
        if given == "slerp" and "t" not in self.values:
            reader.problem(here, "slerp has a t, got none: write 't: 0.5' under 'parameters'")
        if "weight" in method.parameters and "weight" not in self.values:
            for each in inputs:
                if "weight" not in each.values:
                    reader.problem(each.node, f"a model has a weight, got none for {each.model!r}: "
                                   "write 'weight: 1.0' under its 'parameters'")  # fmt: skip
        short = [Path(each.model).name for each in inputs]
        found = []
        for each, name in zip(inputs, short, strict=True):
            name = name if short.count(name) == 1 else each.model
            reader.mark(f"experts.{name}", each.node)
            own = _translated(each.values)
            own = {key: value for key, value in own.items() if key in method.parameters}
            found.append(Expert(name, Path(each.model), values=own))
        return tuple(found)

    def _dtype(self) -> str | None:
        found = None
        for key in ("dtype", "out_dtype"):
            if key not in self.keys:
                continue
            name = str(self.keys[key].value).removeprefix("torch.")
            if name in DTYPES:
                found = name
            else:
                self.reader.choice(self.keys[key], f"a {key} that nlm has", DTYPES)
        return found

    def _tokenizer(self, base: str | None, experts: tuple[Expert, ...]) -> None:
        """The result has the tokenizer of the base, or of the first model where there is none."""
        node = self.keys.get("tokenizer_source")
        if "tokenizer" in self.keys:
            node = self._mapping(self.keys["tokenizer"], "tokenizer", ("source",)).get("source")
        if node is None or not experts:
            return
        is_base = base is not None and Path(base) not in [each.path for each in experts]
        start = base if is_base else str(experts[0].path)
        source = self.reader.text(node, "the source of a tokenizer")
        if source is not None and (base if source == "base" else source) != start:
            self.reader.problem(node, f"nlm keeps the tokenizer of {start!r}, got {source!r}: drop "
                                "it")  # fmt: skip


def _translated(values: Mapping[str, Values]) -> dict[str, Values]:
    """Numbers by the names of nlm."""
    found = {_NAMES.get(key, key): each for key, each in values.items()}
    if "density" in found:
        found["drop"] = Values(
            tuple(
                Rule(rule.part, tuple(1.0 - number for number in rule.numbers))
                for rule in found["density"].rules
            )
        )
    return found
