"""The checkpoints of a recipe in one order of units, and what completes the merged folder."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlm._methods import greedy_soup
from nlm.checkpoint import Checkpoint, open_checkpoint
from nlm.checkpoint.atomic import write_text
from nlm.checkpoint.headers import Stamp, read_config
from nlm.checkpoint.names import file_name
from nlm.recipe.finished import named_files
from nlm.recipe.methods import DTYPES, METHODS, SHARED
from nlm.recipe.recipe import Expert, Recipe
from nlm.streaming import Plan, run
from nlm.streaming.aligned import is_aligned, write_aligned
from nlm.streaming.folder import CARD, card, complete, copy_others, note_others
from nlm.streaming.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nlm.recipe.aligning import Foundations
    from nlm.recipe.correcting import Calibration

Progress = Callable[[str, float], None]


def _is_measured(recipe: Recipe, expert: Expert) -> bool:
    return recipe.method == "regmean" and expert.gram is None and expert.data is not None


def _one(parameter: str, task: str | None, tensor: str) -> float:
    return 1.0


@dataclass
class Models:
    """The checkpoints of a recipe, in one order of units.

    The files that are made for them lie in ``work``, where the first process makes them.
    """

    recipe: Recipe
    work: Path
    memory: int
    progress: Progress
    ranks: Ranks
    inputs: dict[Path, Stamp] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)  # digests of the permutations
    notes: list[str] = field(default_factory=list)  # for the model card
    _foundations: "Foundations | None" = None
    _calibration: "Calibration | None" = None

    @property
    def makes(self) -> bool:
        """Whether files are made by this process."""
        return self.ranks.first

    # --- before the merge -------------------------------------------------------------------------

    def open_calibration(self) -> None:
        """Reads the data of the correction: what is wrong with it is told before any work."""
        if self.recipe.correct is not None and (self.makes or self.corrects_together):
            from nlm.recipe.correcting import Calibration

            self._calibration = Calibration(self.recipe, self.progress, self.ranks)

    @property
    def corrects_together(self) -> bool:
        """Whether all processes correct, each on its part of the data."""
        chosen = self.recipe.correct
        return (
            self.ranks.size > 1 and chosen is not None and chosen.method in SHARED
            and not self.recipe.rotates
        )  # fmt: skip

    def align(self) -> None:
        """Aligns the foundations: on data of which every process sees a part, or the first alone.
        Then every process measures its part of the data that a method needs."""
        recipe, ranks = self.recipe, self.ranks
        measured = [each for each in recipe.experts if _is_measured(recipe, each)]
        if recipe.aligns:
            for path in recipe.foundations.values():
                self._opened(path)
            if recipe.align is not None and recipe.align.data is not None and ranks.size > 1:
                self.foundations.align(ranks)  # one that fails ends, and the others see that
            with ranks.together():
                if self.makes and not self.foundations.results:
                    self.foundations.align()
            if ranks.size > 1 and (measured or self.corrects_together):
                found = ranks.gather(self.foundations.results if self.makes else None)[0]
                self.foundations.results = found
        for each in measured:
            self._measure(each)

    def _measure(self, expert: Expert) -> None:
        from nlm.recipe.measuring import write_grams

        model = self._module(expert)
        self.progress(f"measuring expert {expert.name}", 0.0)
        file = self._file(f"grams {expert.name}")
        write_grams(expert, model, self.recipe.heads, file, self.ranks)

    def plan(self, output: Path) -> Plan:
        recipe = self.recipe
        self.inputs |= named_files(recipe)
        experts = {each.name: self._expert(each) for each in recipe.experts}
        curvatures = {
            each.name: self._curvature(each)
            for each in recipe.experts
            if METHODS[recipe.method].of_each
        }
        method, options = recipe.method, {**recipe.options, "seed": recipe.seed}
        if method == "regmean":
            options["columns"] = self._column_weights()
        elif method == "greedy_soup":
            method, experts = "uniform_soup", self._soup(experts)
        base = self._base() if METHODS[recipe.method].base else None
        start = base or next(iter(experts.values()))
        dtype = DTYPES[recipe.output.dtype] if recipe.output.dtype else self._dtype()
        return Plan(
            output, experts, base, method, recipe.numbers(start.tensors), options, recipe.heads,
            dtype, recipe.output.shard_bytes, self.memory, self.inputs, curvatures,
        )  # fmt: skip

    @property
    def foundations(self) -> "Foundations":
        if self._foundations is None:
            from nlm.recipe.aligning import Foundations

            self._foundations = Foundations(self.recipe, self.like(), self.progress)
        return self._foundations

    @property
    def _rotates(self) -> bool:
        """Whether all models are brought into another gauge."""
        return self.recipe.rotates

    def _dtype(self) -> str | None:
        """Models in another gauge are float32 until they are merged; the result is as they were."""
        if not self._rotates:
            return None
        entries = open_checkpoint(self._all_models()[0]).tensors.values()
        return next(entry.dtype for entry in entries if entry.is_weight)

    def _opened(self, path: Path) -> Checkpoint:
        checkpoint = open_checkpoint(path)
        self.inputs |= checkpoint.stamps
        return checkpoint

    def _all_models(self) -> list[Path]:
        base = [] if self.recipe.base is None else [self.recipe.base]
        paths = [*base, *self.recipe.foundations.values()]
        return [*paths, *(each.path for each in self.recipe.experts)]

    def like(self) -> Path | None:
        """The folder whose configuration and tokenizer the output takes over."""
        return next((path for path in self._all_models() if path.is_dir()), None)

    def _expert(self, expert: Expert) -> Checkpoint:
        name = f"expert {expert.name}"
        checkpoint = self._opened(expert.path)
        if expert.permutation is None:
            return self._moved(checkpoint, expert.foundation, name)
        return self._permuted(checkpoint, self._permutation(expert), name)

    def _curvature(self, expert: Expert) -> Checkpoint:
        """An expert's Fisher information, permuted as the expert is, or its Gram matrices."""
        like, file = self._opened(expert.path), expert.fisher or expert.gram
        if file is not None:
            permutation = self._permutation(expert) if expert.fisher else {}
            return self._permuted(self._opened(file), permutation, f"known of {expert.name}", like)
        if expert.data is None:
            raise ValueError(
                f"nlm.recipe: {self.recipe.method!r} has "
                f"{' or '.join(METHODS[self.recipe.method].of_each)} of every expert, got none for "
                f"{expert.name!r}"
            )
        return open_checkpoint(self._file(f"grams {expert.name}"))

    def _column_weights(self) -> tuple[str, ...]:
        """The weights that are [inputs, outputs], of models that have a configuration."""
        if (folder := self.like()) is None or not (folder / "config.json").is_file():
            return ()
        from nlm.recipe.measuring import column_weights

        return column_weights(folder)

    def _soup(self, experts: dict[str, Checkpoint]) -> dict[str, Checkpoint]:
        """Those whose mean scores best, found greedily."""
        chosen, trial = self.work / "soup.json", self.work / "soup"
        if self.makes:
            from nlm.recipe.measuring import open_score

            assert self.recipe.score is not None
            score_of = open_score(self.recipe.score, self.like())

            def score(names: tuple[str, ...]) -> float:
                self.progress(f"scoring {' and '.join(names)}", 0.0)
                shutil.rmtree(trial, ignore_errors=True)
                some = {name: experts[name] for name in names}
                folder = trial if self.like() else trial.with_suffix(".safetensors")
                plan = Plan(folder, some, None, "uniform_soup", _one, memory=self.memory)
                run(plan, sync=False, digest=False, force=True)
                if self.like():
                    copy_others(self.like(), trial)
                return score_of(folder)

            names, best, scores = greedy_soup(experts, score)
            told = ", ".join(f"{name!r} {each:.6g}" for name, each in scores.items())
            self.notes.append(
                f"A greedy soup of {', '.join(map(repr, names))}, of score {best:.6g} by "
                f"`{self.recipe.score}`; alone: {told}."
            )
            write_text(chosen, json.dumps(names))
        found = json.loads(chosen.read_text())
        self.moved.append(f"soup: {', '.join(found)}")
        return {name: experts[name] for name in found}

    def _permutation(self, expert: Expert) -> "Mapping[str, Tensor]":
        """What brings an expert into the first foundation's order."""
        if expert.permutation is not None:
            from nlm.align import AlignmentResult

            return AlignmentResult.load(expert.permutation).permutation
        return self._found(expert.foundation)

    def _found(self, foundation: str | None) -> "Mapping[str, Tensor]":
        if self._foundations is None or foundation not in self._foundations.results:
            return {}
        return self._foundations.results[foundation].permutation

    def _moved(self, checkpoint: Checkpoint, foundation: str | None, name: str) -> Checkpoint:
        """A model of a foundation, as that is aligned with the first one."""
        if not self._rotates or not self.makes:
            return self._permuted(checkpoint, self._found(foundation), name)
        from nlm.recipe.aligning import digest, write_moved

        self.progress(f"rotating {name}", 0.0)
        found = next(iter(self.foundations.results.values()))
        self.moved.append(
            f"{name}: {digest(self.foundations.results.get(foundation or '', found))}"
        )
        moved = write_moved(checkpoint.path, self.foundations.move(foundation), self._file(name))
        return replace(moved, path=checkpoint.path)

    def _file(self, name: str) -> Path:
        return self.work / f"{file_name(name)}.safetensors"

    def _permuted(
        self,
        checkpoint: Checkpoint,
        permutation: "Mapping[str, Tensor]",
        name: str,
        like: Checkpoint | None = None,
    ) -> Checkpoint:
        """A checkpoint in another order; ``like`` is the model that it has the entries of."""
        like = like or checkpoint
        own = {n: e for n, e in checkpoint.tensors.items() if n in like.tensors}
        checkpoint = replace(checkpoint, tensors=own)  # Fisher information of tied entries too
        file = self._file(name)
        if not self.makes:
            found = open_checkpoint(file) if file.exists() else checkpoint
            return replace(found, path=checkpoint.path)
        if not permutation and is_aligned(checkpoint):
            return checkpoint
        if not permutation:
            return replace(write_aligned(checkpoint, file), path=checkpoint.path)
        from nlm.recipe.aligning import digest, names_for
        from nlm.streaming.permuted import write_permuted

        self.moved.append(f"{name}: {digest(permutation)}")
        spec, permutation = self.foundations.of_model(like, permutation)
        names = {
            each: own for each, own in names_for(spec, like).items() if each in checkpoint.tensors
        }
        written = write_permuted(
            checkpoint, spec, permutation, file,
            lambda tensor: self.progress(f"permuting {name}: {tensor}", 0.0), names,
        )  # fmt: skip
        return replace(written, path=checkpoint.path)

    def _base(self) -> Checkpoint:
        """The recipe's base, its only foundation, or the mean of the aligned foundations."""
        recipe = self.recipe
        if recipe.base is not None:
            of = next((n for n, path in recipe.foundations.items() if path == recipe.base), None)
            return self._moved(self._opened(recipe.base), of, "base")
        if not recipe.foundations:
            raise ValueError(f"nlm.recipe: {recipe.method!r} starts from a base, got none")
        foundations = {
            name: self._moved(self._opened(path), name, f"foundation {name}")
            for name, path in recipe.foundations.items()
        }
        first = next(iter(foundations.values()))
        if len(foundations) == 1:
            return first
        folder = self.work / "base"  # which may leave heads out, as a file may not
        if not self.makes:
            return open_checkpoint(folder)
        mean = Plan(
            folder, foundations, None, "linear",
            _one, heads=recipe.heads, memory=self.memory,
        )  # fmt: skip
        run(mean, sync=False, digest=False, progress=self.progress)
        return open_checkpoint(folder)

    # --- after the merge --------------------------------------------------------------------------

    def complete(
        self, folder: Path, plan: Plan, text: str, files: dict[str, Any], identity: str
    ) -> None:
        """All of a merged folder but its weights, and what the correction changes in these."""
        recipe = self.recipe
        unties = self._rotates and bool(self._gauged().untied)
        settings = {"tie_word_embeddings": False} if unties else {}
        complete(folder, plan, self.like(), settings)
        self._write_head_configs(folder)
        notes = [] if self._foundations is None else list(self._foundations.notes)
        notes += self.notes
        if self._calibration is not None:
            experts = self._modules()
            if self.corrects_together:
                self.ranks.told(str(folder))  # which the others wait for
            notes.append(
                self._calibration.apply(
                    folder, experts, files, recipe.output.shard_bytes, self.like()
                )
            )
        note_others(folder, files)
        models = self._named_models()
        write_text(folder / CARD, card(plan, text, files, models, notes, identity))

    def assist(self) -> None:
        """What another process than the first does of :meth:`complete`."""
        if self._calibration is None:
            return
        experts = self._modules()
        self._calibration.fit(Path(self.ranks.told()), experts)

    def _modules(self) -> "dict[str, nn.Module]":
        return {each.name: self._module(each) for each in self.recipe.experts}

    def _gauged(self) -> Any:
        return next(iter(self.foundations.results.values())).gauge  # type: ignore[attr-defined]

    def _module(self, expert: Expert) -> "nn.Module":
        """An expert in the form in which it is merged."""
        from nlm.recipe.modules import load_module

        self.progress(f"loading expert {expert.name}", 0.0)
        model = load_module(expert.path)
        if self._rotates:
            state = self.foundations.move(expert.foundation)(model.state_dict())
            model = self.foundations.receiver(model)
            model.load_state_dict(state)
        elif permutation := self._permutation(expert):
            model.load_state_dict(self.foundations.permuted(model, expert.path, permutation))
        return model

    def _write_head_configs(self, folder: Path) -> None:
        """The configurations of the experts' heads, by which :func:`nlm.load` builds them."""
        for expert in self.recipe.experts:
            head = folder / "heads" / f"{file_name(expert.name)}.safetensors"
            if head.is_file() and (expert.path / "config.json").is_file():
                config = dict(read_config(expert.path) or {})
                merged = read_config(folder) or {}
                dtype = merged.get("dtype", merged.get("torch_dtype"))
                if dtype is not None:
                    config.pop("torch_dtype", None)
                    config["dtype"] = dtype
                write_text(head.with_suffix(".json"), json.dumps(config, indent=2) + "\n")

    def _named_models(self) -> dict[str, Path]:
        """Who -> the checkpoint that the recipe names."""
        recipe = self.recipe
        base = {} if recipe.base is None else {"base": recipe.base}
        foundations = {f"foundation {name!r}": path for name, path in recipe.foundations.items()}
        experts = {f"expert {each.name!r}": each.path for each in recipe.experts}
        return {**base, **foundations, **experts}
