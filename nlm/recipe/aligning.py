"""The foundations of a recipe, aligned with the first one; and what that does to their experts."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nlm.align import AlignmentResult, OrthogonalAlignment, align
from nlm.align.result import Move
from nlm.checkpoint import Checkpoint, open_checkpoint, read_tensors, write_tensors
from nlm.checkpoint.pickles import is_pickle
from nlm.recipe.data import open_data
from nlm.recipe.methods import BY_WEIGHTS
from nlm.recipe.modules import hollow_module, load_module, names_of
from nlm.recipe.recipe import Recipe
from nlm.streaming.permuted import check_fits, read_all
from nlm.streaming.ranks import Ranks
from nlm.symmetry import PermutationSpec
from nlm.symmetry.pretrained import make_inputs, trace_config
from nlm.symmetry.transfer import transferred

Progress = Callable[[str, float], None]
Hollow = Callable[[], nn.Module | None]
CALLER = "nlm.recipe"


@dataclass
class Foundations:
    """The foundations of a recipe.

    Attributes
    ----------
    like : a folder of one of the models, whose configuration says what may be permuted.
    results : name -> how it is aligned with the first one.
    notes : what was done, a sentence for each.
    """

    recipe: Recipe
    like: Path | None
    progress: Progress
    results: dict[str, AlignmentResult] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _spec: PermutationSpec | None = None

    def align(self, ranks: Ranks | None = None) -> None:
        """Aligns all with the first one; two of them are held at a time.

        Of several processes each takes its share of the batches, and all find the same; where
        there are fewer batches than processes the first one does it alone.
        """
        recipe = self.recipe
        assert recipe.align is not None and recipe.align.method is not None
        first, *others = recipe.foundations.items()
        method, options = recipe.align.method, self._options(first[1])
        shared = ""
        if ranks is not None:
            options["data"], group = ranks.part(list(options["data"]))
            if not options["data"]:
                return
            if group is not None:
                options["process_group"], shared = group, f" by {ranks.size} processes"
        start = self._model(first[1], proves=True)
        for name, path in others:
            what = f"aligning {name} with {first[0]}"
            self.progress(what, 0.0)
            other = self._model(path)

            def report(number: int, value: float, what: str = what) -> None:
                self.progress(f"{what}: {number}", 0.0)

            with (ranks or Ranks()).hearing():
                found = align(start, other, self.spec, method, progress=report, **options)
            self.results[name] = found
            similar = found.report.correlation
            mean = sum(similar.values()) / len(similar) if similar else 1.0
            self.notes.append(
                f"Foundation {name!r} was aligned with {first[0]!r} by {method} in "
                f"{found.report.seconds:.1f} s{shared}: {len(similar)} groups, mean similarity "
                f"{mean:.4f}, SHA-256 {digest(found)}."
            )

    @property
    def spec(self) -> PermutationSpec:
        """What may be permuted in the foundations."""
        if self._spec is None:
            given = self.recipe.align.spec if self.recipe.align is not None else None
            if given is not None:
                self._spec = PermutationSpec.load(given)
            elif self.like is not None:
                self.progress(f"tracing {self.like.name}", 0.0)
                self._spec = trace_config(str(self.like))
            else:
                raise ValueError(
                    f"{self.recipe.where('align')}nlm.recipe: a file of weights is permuted by a "
                    "specification, got none: write 'align: {spec: FILE}'"
                )
        return self._spec

    def permuted(
        self, model: nn.Module, path: Path, permutation: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state dict of an expert in the first foundation's order."""
        spec, own = self.of_model(open_checkpoint(path), permutation)
        return spec.apply(own, model.state_dict())

    def of_model(
        self, checkpoint: Checkpoint, permutation: Mapping[str, Tensor]
    ) -> tuple[PermutationSpec, Mapping[str, Tensor]]:
        """The specification of an expert, whose head may be another one, and its permutation."""
        heads = self.recipe.heads
        spec = spec_for(self.spec, checkpoint, heads)
        if spec is self.spec:
            return spec, permutation
        return spec, transferred(permutation, self.spec, spec, heads)

    @property
    def rotates(self) -> bool:
        """Whether every model changes, the first foundation's too."""
        return any(isinstance(each, OrthogonalAlignment) for each in self.results.values())

    def move(self, name: str | None) -> Move:
        """What brings a model of a foundation into the common form, where that ``rotates``."""
        here = next(iter(self.results.values())).moves(self.spec)[0]
        return self.results[name].moves(self.spec)[1] if name in self.results else here

    def receiver(self, model: nn.Module) -> nn.Module:
        """A copy of a model that can load what was moved."""
        return next(iter(self.results.values())).receiver(model) if self.results else model

    def _options(self, first: Path) -> dict[str, Any]:
        recipe = self.recipe
        assert recipe.align is not None
        if recipe.align.method in BY_WEIGHTS:
            return {}
        assert recipe.align.data is not None  # as it was read
        self.progress(f"reading {recipe.align.data}", 0.0)
        data = open_data(
            recipe.align.data, hollow_module(first), str(first), CALLER, recipe.align.samples
        )
        return {"data": data}

    def _model(self, path: Path, proves: bool = False) -> "nn.Module | Mapping[str, Tensor]":
        """A foundation; on the first one the specification is proven."""
        if path.suffix == ".safetensors":
            return read_tensors(path)[0]
        if is_pickle(path):
            return read_all(open_checkpoint(path))
        model = load_module(path)
        if proves and not self.spec.proven:
            self.progress(f"proving what may be permuted in {path.name}", 0.0)
            self.spec.verify(model, (), make_inputs(model))
        return model


def spec_for(
    spec: PermutationSpec,
    checkpoint: Checkpoint,
    heads: tuple[str, ...] = (),
    hollow: Hollow | None = None,
) -> PermutationSpec:
    """The specification that fits a checkpoint: the foundations', or where its head is another one
    that of its own configuration; ``hollow`` makes its model, without weights.

    Raises
    ------
    ValueError
        There is none.
    """
    try:
        check_fits(spec, checkpoint, names_for(spec, checkpoint, hollow))
        return spec
    except ValueError:
        if checkpoint.folder is None:
            raise
    own = trace_config(str(checkpoint.folder))
    transferred(spec.random(), spec, own, heads)  # whatever will be found can be carried over
    check_fits(own, checkpoint, names_for(own, checkpoint, hollow))
    return own


def names_for(
    spec: PermutationSpec, checkpoint: Checkpoint, hollow: Hollow | None = None
) -> dict[str, str]:
    """Name in a checkpoint -> the specification's. A model that may have other names than its files
    is built only where theirs are not the specification's.
    """
    try:
        check_fits(spec, checkpoint)
    except ValueError:
        made = hollow() if hollow is not None and checkpoint.folder is not None else None
        return names_of(checkpoint, made)
    return {name: name for name in checkpoint.tensors}


def write_moved(path: Path, move: Move, file: Path) -> Checkpoint:
    """A model in another gauge, in float32: all of its entries, those that were tied too."""
    write_tensors(file, move(load_module(path).state_dict()), {"format": "pt"})
    return open_checkpoint(file)


def digest(found: AlignmentResult | Mapping[str, Tensor]) -> str:
    """The SHA-256 of a permutation, and of a rotation where there is one."""
    permutation = found.permutation if isinstance(found, AlignmentResult) else found
    rotation = found.rotation if isinstance(found, OrthogonalAlignment) else {}
    made = hashlib.sha256()
    for group, index in (*sorted(permutation.items()), *sorted(rotation.items())):
        made.update(group.encode() + index.cpu().contiguous().numpy().tobytes())
    return made.hexdigest()
