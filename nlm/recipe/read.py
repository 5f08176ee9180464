"""Reads recipes: nlm's own YAML, and mergekit's (:mod:`nlm.recipe.mergekit`).

A recipe of nlm with every key (``docs/recipes.md`` has them in a table)::

    foundations: {one: models/one, two: models/two}
    base: one                     # a foundation or a path; by default the aligned foundations' mean
    align: {method: activations, spec: spec.json, data: calibration.safetensors, samples: 256}
    experts:
      digits: {path: experts/digits, foundation: one}
      greek:
        path: experts/greek
        foundation: two           # or permutation: two-to-one.safetensors
        weight: [0.2, 1.0]        # from the first layer to the last
        density: [{filter: mlp, value: 0.3}, {value: 0.2}]
    method: ties
    parameters: {scale: 0.4, density: 0.2, dialect: mergekit}
    correct: {method: tact, samples: 128, data: {digits: d.txt, greek: package.module:function}}
    heads: [classifier]
    output: {path: merged, dtype: bfloat16, shard: 5GB, per_task: folded}

An expert of the method ``fisher`` has a ``fisher: FILE`` beside its path, one of ``regmean`` a
``gram: FILE``, or ``data`` and ``samples``; the method ``greedy_soup`` has a ``score``. Only
``experts`` and ``method`` are needed, ``seed`` where something is random, and a base or a
foundation where the method starts from one. An expert or output that is nothing but a path may be
written as one. Relative paths are relative to the recipe's folder.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yaml.nodes import Node, ScalarNode, SequenceNode

from nlm.recipe import mergekit
from nlm.recipe.methods import (
    ALIGNMENTS,
    BY_WEIGHTS,
    CHOICES,
    CORRECTIONS,
    DTYPES,
    METHODS,
    NUMBERS,
    PER_TASK,
    WITHOUT_DATA,
    Method,
)
from nlm.recipe.nodes import Reader, described
from nlm.recipe.recipe import Alignment, Correction, Expert, Output, Recipe
from nlm.recipe.values import Values

_KEYS = (
    "foundations", "base", "experts", "method", "parameters", "seed", "align", "correct", "heads",
    "output", "score",
)  # fmt: skip
_EXPERT = ("path", "foundation", "permutation")
_KNOWN = ("fisher", "gram", "data", "samples")  # of an expert, by methods that have of_each
_ALIGN = ("method", "spec", "data", "samples")
_CORRECT = ("method", "data", "samples")
_OUTPUT = ("path", "dtype", "shard", "per_task")


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe at ``path``; a file with the key ``merge_method`` is mergekit's.

    Raises
    ------
    RecipeError
        Everything that is wrong, a sentence with its line for each.
    """
    reader = Reader(Path(path))
    keys = reader.mapping(reader.root, "a recipe")
    if not keys:
        reader.raise_problems()
    if "merge_method" in keys:
        return mergekit.read(reader)
    return _Own(reader).recipe()


class _Own:
    """Reads nlm's own form."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.folder = reader.file.parent
        self.keys = reader.mapping(reader.root, "a recipe", _KEYS)
        for key, node in self.keys.items():
            reader.mark(key, node)

    def recipe(self) -> Recipe:
        reader, keys = self.reader, self.keys
        for key in ("experts", "method"):
            if key not in keys:
                reader.problem(reader.root, f"a recipe has {key}, got none: write '{key}: ...'")
        name = self._method()
        method = None if name is None else METHODS[name]
        foundations = self._paths("foundations")
        base = self._base(foundations)
        experts = self._experts(method, foundations)
        values, options = self._parameters(name, method)
        align = self._align()
        seed = reader.whole(keys["seed"], "a seed", 0) if "seed" in keys else None
        correct = self._correct()
        heads, output = self._heads(), self._output()
        score = self._named(keys["score"], "the score") if "score" in keys else None
        if name is not None:
            self._check(name, experts, foundations, align)
        reader.raise_problems()
        return Recipe(
            experts, str(name), foundations, base, values, options, seed, align, correct, heads,
            score, output, file=reader.file, text=reader.content, lines=reader.lines,
        )  # fmt: skip

    def _check(
        self,
        name: str,
        experts: tuple[Expert, ...],
        foundations: Mapping[str, Path],
        align: Alignment | None,
    ) -> None:
        """The rules that several keys obey together."""
        keys, note, method = self.keys, self.reader.problem, METHODS[name]
        here = keys["method"]
        if method.random and "seed" not in keys:
            note(here, f"{name} drops at random, by a seed, got none: write 'seed: 0' beside it")
        if method.base and not foundations and "base" not in keys:
            note(here, f"{name} starts from a base, got none: write 'base: FOLDER' beside it")
        least, most = method.experts
        if self._all_named and not least <= len(self._lines) <= most:
            number = f"{least}" if least == most else f"at least {least}"
            note(keys["experts"], f"{name} merges {number} experts, got {len(self._lines)}")
        finds = align is not None and align.method is not None
        if finds and len(foundations) < 2:
            note(keys["align"], f"several foundations are aligned, got {len(foundations)}")
        first = next(iter(foundations), None)
        if (name == "greedy_soup") != ("score" in keys):
            at = keys.get("score", here)
            note(at, f"greedy_soup alone has a score, got {'one' if 'score' in keys else 'none'} "
                 f"for {name}: write 'score: package.module:function', or a file of labelled "
                 "inputs")  # fmt: skip
        is_said = finds or (align is None and "align" in keys)
        for expert in experts:
            line, own = self._lines[expert.name], expert.foundation
            given = [key for key in method.of_each if getattr(expert, key) is not None]
            if method.of_each and len(given) != 1:
                known = " or ".join(f"'{key}: FILE'" for key in method.of_each)
                found = "both" if given else "none"
                what = "Fisher information" if name == "fisher" else "Gram matrices"
                note(line, f"{name} has {what} of every expert, got {found} "
                     f"for {expert.name!r}: write {known}")  # fmt: skip
            if own is None and expert.permutation is None and len(foundations) > 1:
                note(line, f"expert {expert.name!r} is of one of {', '.join(foundations)}, got no "
                     "foundation: write 'foundation: NAME'")  # fmt: skip
            elif own not in (None, first) and expert.permutation is None and not is_said:
                note(line, f"an expert of {own!r} is aligned with {first!r}, got no alignment for "
                     f"{expert.name!r}: write 'align: weights', or 'align: none' to merge it as it "
                     "is")  # fmt: skip

    def _method(self) -> str | None:
        if (node := self.keys.get("method")) is None:
            return None
        return self.reader.choice(node, "a method", METHODS)

    def _path(self, node: Node, what: str) -> Path | None:
        text = self.reader.text(node, what)
        return None if text is None else self.folder / text

    def _paths(self, key: str) -> dict[str, Path]:
        found = {}
        if key in self.keys:
            for name, node in self.reader.mapping(self.keys[key], key).items():
                self.reader.mark(f"{key}.{name}", node)
                if (path := self._path(node, f"the path of {name!r}")) is not None:
                    found[name] = path
        return found

    def _base(self, foundations: Mapping[str, Path]) -> Path | None:
        if "base" not in self.keys:
            return next(iter(foundations.values())) if len(foundations) == 1 else None
        text = self.reader.text(self.keys["base"], "the base")
        if text is None:
            return None
        if text in foundations:
            return foundations[text]
        path = self.folder / text
        same = (f for f in foundations.values() if os.path.realpath(f) == os.path.realpath(path))
        return next(same, path)

    def _experts(
        self, method: Method | None, foundations: Mapping[str, Path]
    ) -> tuple[Expert, ...]:
        reader, noted = self.reader, self.reader.noted
        self._lines: dict[str, Node] = {}
        found = []
        nodes = reader.mapping(self.keys["experts"], "experts") if "experts" in self.keys else {}
        self._all_named = "experts" in self.keys and reader.noted == noted
        for name, node in nodes.items():
            self._lines[name] = node
            reader.mark(f"experts.{name}", node)
            if isinstance(node, ScalarNode):
                path = self._path(node, f"the path of expert {name!r}")
                if path is not None:
                    found.append(Expert(name, path))
            elif (expert := self._expert(name, node, method, foundations)) is not None:
                found.append(expert)
        return tuple(found)

    def _expert(
        self, name: str, node: Node, method: Method | None, foundations: Mapping[str, Path]
    ) -> Expert | None:
        reader, what = self.reader, f"expert {name!r}"
        own = tuple(n for n, of in NUMBERS.items() if of.per_expert)
        allowed = (*own, *_KNOWN) if method is None else method.of_expert
        keys = reader.mapping(node, what, (*_EXPERT, *allowed))
        for key, value in keys.items():
            reader.mark(f"experts.{name}.{key}", value)
        if "path" not in keys:
            reader.problem(node, f"{what} has a path, got none: write 'path: FOLDER'")
            return None
        path = self._path(keys["path"], f"the path of {what}")
        foundation = None
        if "foundation" in keys and not foundations:
            reader.problem(keys["foundation"], "a foundation is one that 'foundations' names, got "
                           f"{described(keys['foundation'])} and none named")  # fmt: skip
        elif "foundation" in keys:
            foundation = reader.choice(keys["foundation"], f"the foundation of {what}", foundations)
        files = {
            key: self._path(keys[key], f"the {key} of {what}")
            for key in ("permutation", "fisher", "gram")
            if key in keys
        }
        data = self._named(keys["data"], f"the data of {what}") if "data" in keys else None
        samples = None
        if "samples" in keys:
            samples = reader.whole(keys["samples"], f"the samples of {what}", 1)
        values = {
            key: values
            for key in keys
            if key in NUMBERS
            and (values := reader.values(keys[key], f"{key} of {what}", NUMBERS[key])) is not None
        }
        if path is None:
            return None
        return Expert(name, path, foundation, values=values, data=data, samples=samples, **files)

    def _parameters(
        self, name: str | None, method: Method | None
    ) -> tuple[dict[str, Values], dict[str, Any]]:
        """The numbers of all experts together, ending in the defaults, and the options."""
        if method is None:
            return {}, {}
        reader = self.reader
        keys: dict[str, Node] = {}
        if "parameters" in self.keys:
            keys = reader.mapping(self.keys["parameters"], f"{name} (the method)", method.names)
        values: dict[str, Values] = {}
        options: dict[str, Any] = {}
        if method.normalize is not None:
            options["normalize"] = method.normalize
        for key in method.parameters:
            if key in CHOICES:
                options[key] = CHOICES[key].default
            else:
                values[key] = Values.of(NUMBERS[key].default)
        for key, node in keys.items():
            reader.mark(f"parameters.{key}", node)
            if key == "normalize":
                options[key] = reader.switch(node, key)
            elif key in CHOICES:
                options[key] = reader.choice(node, key, CHOICES[key].known)
            elif (given := reader.values(node, key, NUMBERS[key])) is not None:
                values[key] = given + values[key]
        return values, options

    def _align(self) -> Alignment | None:
        if "align" not in self.keys:
            return None
        node, reader = self.keys["align"], self.reader
        if isinstance(node, ScalarNode):
            method = reader.choice(node, "an alignment", (*ALIGNMENTS, "none"))
            keys: dict[str, Node] = {}
            if method in (None, "none"):
                return None
        else:
            keys = reader.mapping(node, "align", _ALIGN)
            method = None
            if "method" in keys:
                method = reader.choice(keys["method"], "the method of align", ALIGNMENTS)
                if method is None:
                    return None
        sees = method is not None and method not in BY_WEIGHTS
        if sees and "data" not in keys:
            reader.problem(
                node,
                f"alignment by {method} sees data, got none: write "
                f"'align: {{method: {method}, data: FILE}}'",
            )
        for key in ("data", "samples"):
            if key in keys and not sees:
                of = "no method" if method is None else method
                known = ", ".join(ALIGNMENTS[len(BY_WEIGHTS) :])
                reader.problem(keys[key], f"align has {key} for {known}, got it for {of}")
        spec = self._named(keys["spec"], "the spec of align") if "spec" in keys else None
        data = self._named(keys["data"], "the data of align") if "data" in keys else None
        samples = None
        if "samples" in keys:
            samples = reader.whole(keys["samples"], "the samples of align", 1)
        return Alignment(method, spec, data, samples)

    def _named(self, node: Node, what: str) -> str | None:
        """A file beside the recipe, or a name that is no file."""
        text = self.reader.text(node, what)
        if text is None:
            return None
        file = str(self.folder / text)
        return file if os.path.exists(file) else text

    def _correct(self) -> Correction | None:
        if "correct" not in self.keys:
            return None
        node, reader = self.keys["correct"], self.reader
        if isinstance(node, ScalarNode):
            method = reader.choice(node, "a correction", CORRECTIONS)
            keys: dict[str, Node] = {}
        else:
            keys = reader.mapping(node, "correct", _CORRECT)
            if "method" not in keys:
                reader.problem(node, "correct has a method, got none: write 'method: tact'")
                return None
            method = reader.choice(keys["method"], "the method of correct", CORRECTIONS)
        if method in (None, "none"):
            return None
        data = {}
        if "data" in keys:
            for name, each in reader.mapping(keys["data"], "the data of correct").items():
                if name not in self._lines:
                    reader.problem(
                        each,
                        f"the data of correct is of an expert ({', '.join(self._lines)}), got "
                        f"{name!r}",
                    )
                elif (text := self._named(each, f"the data of {name!r}")) is not None:
                    reader.mark(f"correct.{name}", each)
                    data[name] = text
        samples = None
        if "samples" in keys:
            samples = reader.whole(keys["samples"], "the samples of correct", 1)
        lost = [name for name in self._lines if name not in data]
        if method not in WITHOUT_DATA and lost:
            reader.problem(
                node,
                f"{method} has data for every expert, got none for {', '.join(lost)}: write "
                f"'data: {{{lost[0]}: FILE}}'",
            )
        return Correction(str(method), data, samples)

    def _heads(self) -> tuple[str, ...]:
        if "heads" not in self.keys:
            return ()
        node = self.keys["heads"]
        nodes = node.value if isinstance(node, SequenceNode) else [node]
        texts = (self.reader.text(each, "a pattern of heads") for each in nodes)
        return tuple(text for text in texts if text is not None)

    def _output(self) -> Output:
        if "output" not in self.keys:
            return Output()
        node, reader = self.keys["output"], self.reader
        if isinstance(node, ScalarNode):
            return Output(self._path(node, "the output"))
        keys = reader.mapping(node, "output", _OUTPUT)
        path = self._path(keys["path"], "the path of output") if "path" in keys else None
        dtype = shard = None
        if "dtype" in keys:
            dtype = reader.choice(keys["dtype"], "the dtype of output", DTYPES)
        if "shard" in keys:
            shard = reader.size(keys["shard"], "the shard of output")
        per_task = None
        if "per_task" in keys:
            per_task = reader.choice(keys["per_task"], "per_task of output", PER_TASK)
        return Output(path, dtype, shard or Output.shard_bytes, per_task or Output.per_task)
