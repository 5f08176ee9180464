"""What a recipe says, done: align the foundations, permute the experts, merge, correct, complete.

Checkpoints are streamed (:mod:`nlm.streaming`). Only alignment and correction hold models: those of
two foundations, and the merged one with all experts. Permuted experts, and the mean of the aligned
foundations, are files in a hidden folder beside the output until it is done. The correction works
in the hidden folder that becomes the output: a crash leaves the merge to be resumed.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlm.checkpoint import Checkpoint, open_checkpoint
from nlm.checkpoint.headers import Stamp, stamp
from nlm.checkpoint.names import file_name
from nlm.checkpoint.partial import own_folder
from nlm.recipe.check import check
from nlm.recipe.methods import DTYPES, METHODS
from nlm.recipe.recipe import Expert, Recipe, RecipeError
from nlm.streaming import MEMORY, Plan, Report, run
from nlm.streaming.aligned import is_aligned, write_aligned
from nlm.streaming.folder import CARD, card, complete
from nlm.streaming.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nlm.recipe.aligning import Foundations
    from nlm.recipe.correcting import Calibration

Progress = Callable[[str, float], None]


def execute(
    recipe: Recipe,
    output: Path | None = None,
    *,
    memory: int = MEMORY,
    force: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    **how: Any,
) -> Report:
    """Merges what a recipe names; the output appears whole or not at all.

    Parameters
    ----------
    output : instead of the recipe's.
    memory : bytes that the buffers of the merge may take; see :class:`nlm.streaming.Plan`.
    force, progress, ranks : see :func:`nlm.streaming.run`, whose further arguments ``how`` are. The
        first process aligns, permutes and corrects for all.

    Raises
    ------
    RecipeError
        What :func:`nlm.recipe.check` finds.
    ValueError
        No output; and what :func:`nlm.streaming.run`, :func:`nlm.align` and the correction raise.
    """
    if output is not None:
        recipe = replace(recipe, output=replace(recipe.output, path=output))
    if problems := check(recipe, force=force):
        raise RecipeError(problems)
    target = recipe.output.path
    if target is None:
        raise ValueError("nlm.recipe: a merge has an output, got none (output.path, or --output)")
    ranks = ranks or Ranks()
    target = Path(os.path.realpath(target))
    work = target.parent / f".{target.name}.work"
    models = _Models(recipe, work, memory, progress or (lambda what, share: None), ranks.first)
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                stack.enter_context(own_folder(work))
                models.open_calibration()
                plan = models.plan(target)
        if not ranks.first:
            plan = models.plan(target)
        text = recipe.file.read_text(encoding="utf-8") if recipe.file is not None else ""
        moved = ranks.gather(models.moved)[0]
        return run(
            plan, "\n".join([text or repr(recipe), *moved]), force=force, progress=progress,
            ranks=ranks, write_others=lambda to, files: models.complete(to, plan, text, files),
            **how,
        )  # fmt: skip


@dataclass
class _Models:
    """The checkpoints of a recipe, in one order of units.

    The files that are made for them lie in ``work``, where another process ``makes`` them or this
    one.
    """

    recipe: Recipe
    work: Path
    memory: int
    progress: Progress
    makes: bool
    inputs: dict[Path, Stamp] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)  # digests of the permutations
    _foundations: "Foundations | None" = None
    _calibration: "Calibration | None" = None

    # --- before the merge -------------------------------------------------------------------------

    def open_calibration(self) -> None:
        """Reads the data of the correction: what is wrong with it is told before any work."""
        if self.recipe.correct is not None:
            from nlm.recipe.correcting import Calibration

            self._calibration = Calibration(self.recipe, self.progress)

    def plan(self, output: Path) -> Plan:
        recipe = self.recipe
        self._stamp_files()
        if recipe.aligns:
            for path in recipe.foundations.values():
                self._opened(path)
            if self.makes:
                self.foundations.align()
        experts = {each.name: self._expert(each) for each in recipe.experts}
        fishers = {
            each.name: self._fisher(each)
            for each in recipe.experts
            if METHODS[recipe.method].fisher
        }
        base = self._base() if METHODS[recipe.method].base else None
        start = base or next(iter(experts.values()))
        dtype = DTYPES[recipe.output.dtype] if recipe.output.dtype else self._dtype()
        return Plan(
            output, experts, base, recipe.method, recipe.numbers(start.tensors),
            {**recipe.options, "seed": recipe.seed}, recipe.heads, dtype,
            recipe.output.shard_bytes, self.memory, self.inputs, fishers,
        )  # fmt: skip

    def _stamp_files(self) -> None:
        """The files beside the models by which a merge is known again."""
        recipe = self.recipe
        align, correct = recipe.align, recipe.correct
        named = [] if align is None else [align.spec, align.data]
        named += [] if correct is None else correct.data.values()
        files = [Path(each) for each in named if each is not None]
        files += [each.permutation for each in recipe.experts if each.permutation is not None]
        self.inputs |= {file: stamp(file) for file in files if file.is_file()}

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

    def _fisher(self, expert: Expert) -> Checkpoint:
        """An expert's Fisher information, permuted as the expert is."""
        if expert.fisher is None:
            raise ValueError(
                f"nlm.recipe: {self.recipe.method!r} has Fisher information of every expert, got "
                f"none for {expert.name!r}"
            )
        checkpoint, like = self._opened(expert.fisher), self._opened(expert.path)
        return self._permuted(checkpoint, self._permutation(expert), f"fisher {expert.name}", like)

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
        return write_moved(checkpoint.path, self.foundations.move(foundation), self._file(name))

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
        file = self._file(name)
        if not self.makes:
            return open_checkpoint(file) if file.exists() else checkpoint
        if not permutation:
            return checkpoint if is_aligned(checkpoint) else write_aligned(checkpoint, file)
        from nlm.recipe.aligning import digest
        from nlm.recipe.modules import names_of
        from nlm.streaming.permuted import write_permuted

        self.moved.append(f"{name}: {digest(permutation)}")
        spec, permutation = self.foundations.of_model(like, permutation)
        names = {each: own for each, own in names_of(like).items() if each in checkpoint.tensors}
        return write_permuted(
            checkpoint, spec, permutation, file,
            lambda tensor: self.progress(f"permuting {name}: {tensor}", 0.0), names,
        )  # fmt: skip

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
            lambda parameter, task, tensor: 1.0, heads=recipe.heads, memory=self.memory,
        )  # fmt: skip
        run(mean, sync=False, digest=False, progress=self.progress)
        return open_checkpoint(folder)

    # --- after the merge --------------------------------------------------------------------------

    def complete(self, folder: Path, plan: Plan, text: str, files: dict[str, Any]) -> None:
        """All of a merged folder but its weights, and what the correction changes in these."""
        recipe = self.recipe
        unties = self._rotates and bool(self._gauged().untied)
        settings = {"tie_word_embeddings": False} if unties else {}
        complete(folder, plan, self.like(), settings)
        self._write_head_configs(folder)
        notes = [] if self._foundations is None else list(self._foundations.notes)
        if self._calibration is not None:
            experts = {each.name: self._module(each) for each in recipe.experts}
            notes.append(
                self._calibration.apply(
                    folder, experts, files, recipe.output.shard_bytes, self.like()
                )
            )
        (folder / CARD).write_text(
            card(plan, text, files, self._named_models(), notes), encoding="utf-8"
        )

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
            if head.is_file() and (settings := expert.path / "config.json").is_file():
                shutil.copyfile(settings, head.with_suffix(".json"))

    def _named_models(self) -> dict[str, Path]:
        """Who -> the checkpoint that the recipe names."""
        recipe = self.recipe
        base = {} if recipe.base is None else {"base": recipe.base}
        foundations = {f"foundation {name!r}": path for name, path in recipe.foundations.items()}
        experts = {f"expert {each.name!r}": each.path for each in recipe.experts}
        return {**base, **foundations, **experts}
