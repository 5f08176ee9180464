"""What a recipe says, done: align the foundations, permute the experts, merge, complete the folder.

Checkpoints are streamed (:mod:`nlm.streaming`); only alignment holds models, and those of two
foundations at a time. Permuted experts, and the mean of the aligned foundations, are files in a
hidden folder beside the output until it is done.
"""

import hashlib
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
from nlm.checkpoint.partial import is_unfinished, own_folder, tidy
from nlm.checkpoint.pickles import is_pickle
from nlm.recipe.check import check
from nlm.recipe.methods import DTYPES, METHODS
from nlm.recipe.recipe import Recipe, RecipeError
from nlm.streaming import MEMORY, Plan, Report, run
from nlm.streaming.aligned import is_aligned, write_aligned
from nlm.streaming.folder import write_others
from nlm.streaming.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from nlm.symmetry import PermutationSpec

Progress = Callable[[str, float], None]


def execute(
    recipe: Recipe,
    output: Path | None = None,
    *,
    memory: int = MEMORY,
    resume: bool = False,
    force: bool = False,
    sync: bool = True,
    digest: bool = True,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Merges what a recipe names; the output appears whole or not at all.

    Parameters
    ----------
    output : instead of the recipe's.
    memory, resume, force, sync, digest, progress, ranks : see :func:`nlm.streaming.run`. The first
        process aligns and permutes for all.

    Raises
    ------
    RecipeError
        What :func:`nlm.recipe.check` finds.
    ValueError
        No output; and what :func:`nlm.streaming.run` and :func:`nlm.align` raise.
    """
    if output is not None:
        recipe = replace(recipe, output=replace(recipe.output, path=output))
    ranks = ranks or Ranks()
    target = recipe.output.path
    if target is None:
        raise ValueError("nlm.recipe: a merge has an output, got none (output.path, or --output)")
    target = Path(os.path.realpath(target))
    work = target.parent / f".{target.name}.work"
    if ranks.first and target.exists():
        tidy(target)
    if problems := check(recipe, force=force or (resume and is_unfinished(target))):
        raise RecipeError(problems)
    models = _Models(recipe, work, memory, progress or (lambda what, share: None), ranks.first)
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                stack.enter_context(own_folder(work))
                plan = models.plan(target)
        if not ranks.first:
            plan = models.plan(target)
        text = recipe.file.read_text(encoding="utf-8") if recipe.file is not None else ""
        moved = ranks.gather(models.moved)[0]

        def complete(folder: Path, files: Mapping[str, Any]) -> None:
            write_others(folder, plan, text, files, models.like())
            shutil.rmtree(work, ignore_errors=True)  # nothing is left beside an output with a name

        return run(
            plan, "\n".join([text or repr(recipe), *moved]), resume=resume, force=force, sync=sync,
            digest=digest, progress=progress, ranks=ranks, write_others=complete,
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
    _spec: "PermutationSpec | None" = None

    def plan(self, output: Path) -> Plan:
        recipe = self.recipe
        if recipe.align is not None and recipe.align.spec is not None:
            spec = Path(recipe.align.spec)
            self.inputs |= {spec: stamp(spec)} if spec.is_file() else {}
        found = self._found()
        experts = {
            each.name: self._expert(each.name, found.get(each.foundation or "", {}))
            for each in recipe.experts
        }
        base = self._base(found) if METHODS[recipe.method].base else None
        start = base or next(iter(experts.values()))
        return Plan(
            output, experts, base, recipe.method, recipe.numbers(start.tensors),
            {**recipe.options, "seed": recipe.seed}, recipe.heads,
            DTYPES[recipe.output.dtype] if recipe.output.dtype else None,
            recipe.output.shard_bytes, self.memory, self.inputs,
        )  # fmt: skip

    def _opened(self, path: Path) -> Checkpoint:
        checkpoint = open_checkpoint(path)
        self.inputs |= checkpoint.stamps
        return checkpoint

    def _found(self) -> dict[str, Mapping[str, "Tensor"]]:
        """foundation -> the permutation that brings it into the first one's order."""
        recipe = self.recipe
        aligns = recipe.align is not None and recipe.align.method is not None
        if len(recipe.foundations) < 2 or not aligns or not self.makes:
            return {}
        assert recipe.align is not None and recipe.align.method is not None
        from nlm.align import align

        first, *others = recipe.foundations.items()
        start = self._weights(first[1], proves=True)
        found: dict[str, Mapping[str, Tensor]] = {}
        for name, path in others:
            self.progress(f"aligning {name} with {first[0]}", 0.0)
            other = self._weights(path)
            result = align(start, other, self._specification(), recipe.align.method)
            found[name] = result.permutation
        return found

    def _weights(self, path: Path, proves: bool = False) -> "Mapping[str, Tensor]":
        """The weights of a foundation; on the first one the specification is proven."""
        if path.suffix == ".safetensors":
            from nlm.checkpoint import read_tensors

            return read_tensors(path)[0]
        if is_pickle(path):
            from nlm.streaming.permuted import read_all

            return read_all(open_checkpoint(path))
        from nlm.symmetry.pretrained import load_model, make_inputs

        model = load_model(str(path))
        spec = self._specification()
        if proves and not spec.proven:
            self.progress(f"proving what may be permuted in {path.name}", 0.0)
            spec.verify(model, (), make_inputs(model))
        return model.state_dict()

    def _specification(self) -> "PermutationSpec":
        if self._spec is None:
            from nlm.symmetry import PermutationSpec
            from nlm.symmetry.pretrained import trace_config

            given = self.recipe.align.spec if self.recipe.align is not None else None
            if given is not None:
                self._spec = PermutationSpec.load(given)
            elif (folder := self.like()) is not None:
                self.progress(f"tracing {folder.name}", 0.0)
                self._spec = trace_config(str(folder))
            else:
                raise ValueError(
                    f"{self.recipe.where('align')}nlm.recipe: a file of weights is permuted by a "
                    "specification, got none: write 'align: {spec: FILE}'"
                )
        return self._spec

    def _all_models(self) -> list[Path]:
        base = [] if self.recipe.base is None else [self.recipe.base]
        paths = [*base, *self.recipe.foundations.values()]
        return [*paths, *(each.path for each in self.recipe.experts)]

    def like(self) -> Path | None:
        """The folder whose configuration and tokenizer the output takes over."""
        return next((path for path in self._all_models() if path.is_dir()), None)

    def _expert(self, name: str, found: "Mapping[str, Tensor]") -> Checkpoint:
        expert = self.recipe.expert(name)
        permutation = found
        if expert.permutation is not None:
            from nlm.align import AlignmentResult

            self.inputs[expert.permutation] = stamp(expert.permutation)
            permutation = AlignmentResult.load(expert.permutation).permutation
        return self._permuted(self._opened(expert.path), permutation, f"expert {name}")

    def _permuted(
        self, checkpoint: Checkpoint, permutation: "Mapping[str, Tensor]", name: str
    ) -> Checkpoint:
        file = self.work / f"{file_name(name)}.safetensors"
        if not self.makes:
            found = open_checkpoint(file) if file.exists() else checkpoint
            return replace(found, path=checkpoint.path)
        if not permutation and is_aligned(checkpoint):
            return checkpoint
        if not permutation:
            return replace(write_aligned(checkpoint, file), path=checkpoint.path)
        from nlm.streaming.permuted import write_permuted

        self.moved.append(f"{name}: {_digest(permutation)}")
        written = write_permuted(
            checkpoint, self._specification(), permutation, file,
            lambda tensor: self.progress(f"permuting {name}: {tensor}", 0.0),
        )  # fmt: skip
        return replace(written, path=checkpoint.path)

    def _base(self, found: "Mapping[str, Mapping[str, Tensor]]") -> Checkpoint:
        """The recipe's base, its only foundation, or the mean of the aligned foundations."""
        recipe = self.recipe
        if recipe.base is not None:
            of = next((n for n, path in recipe.foundations.items() if path == recipe.base), "")
            return self._permuted(self._opened(recipe.base), found.get(of, {}), "base")
        if not recipe.foundations:
            raise ValueError(f"nlm.recipe: {recipe.method!r} starts from a base, got none")
        foundations = {
            name: self._permuted(self._opened(path), found.get(name, {}), f"foundation {name}")
            for name, path in recipe.foundations.items()
        }
        first = next(iter(foundations.values()))
        if len(foundations) == 1:
            return first
        file = self.work / "base.safetensors"
        if not self.makes:
            return open_checkpoint(file)
        mean = Plan(
            file, foundations, None, "linear",
            lambda parameter, task, tensor: 1.0, heads=recipe.heads, memory=self.memory,
        )  # fmt: skip
        run(mean, sync=False, digest=False, progress=self.progress)
        return open_checkpoint(file)


def _digest(permutation: "Mapping[str, Tensor]") -> str:
    digest = hashlib.sha256()
    for group, index in sorted(permutation.items()):
        digest.update(group.encode() + index.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
