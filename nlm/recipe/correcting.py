"""The correction of a recipe, fitted on the merged model before its folder gets its name.

What changes weights is written into the merged files; what each task has for itself goes into a
side-car beside them, or is folded into a model for each task (:mod:`nlm.loading`).
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nlm._multitask import MultiTaskModel
from nlm._names import matches
from nlm.checkpoint import open_checkpoint
from nlm.checkpoint.entries import TORCH_TYPES
from nlm.checkpoint.names import file_name
from nlm.checkpoint.shards import sha256_of
from nlm.correct import Correction, correct
from nlm.loading import SIDE_CAR, TASKS
from nlm.merge.result import Merged
from nlm.recipe.data import open_data
from nlm.recipe.methods import SAMPLES, SHARED
from nlm.recipe.modules import hollow_module, names_of
from nlm.recipe.recipe import Recipe
from nlm.statistics import attention_mask, batches
from nlm.statistics.data import sample_count
from nlm.streaming.folder import copy_others
from nlm.streaming.ranks import Ranks
from nlm.symmetry.pretrained import load_model, quiet, read_config

CALLER = "nlm.recipe"
Progress = Callable[[str, float], None]


class Calibration:
    """The calibration data of a recipe's correction, opened before there is anything to correct.

    Attributes
    ----------
    data : expert -> batches.
    """

    def __init__(self, recipe: Recipe, progress: Progress, ranks: Ranks) -> None:
        assert recipe.correct is not None
        self.recipe, self.progress, self.ranks = recipe, progress, ranks
        self.data: dict[str, list[Any]] = {}
        for expert in recipe.experts:
            if (text := recipe.correct.data.get(expert.name)) is not None:
                progress(f"reading {text}", 0.0)
                model = hollow_module(expert.path)
                self.data[expert.name] = open_data(
                    text, model, str(expert.path), CALLER, recipe.correct.samples
                )

    def apply(
        self,
        folder: Path,
        experts: Mapping[str, nn.Module],
        files: dict[str, Any],
        shard_bytes: int,
        like: Path | None,
    ) -> str:
        """Corrects the merged model in a folder.

        Parameters
        ----------
        experts : task -> its expert, as it was merged.
        files : name -> {"sha256": ...}, of the weights; what is written is noted there.
        like : whose tokenizer a model for each task gets.

        Returns
        -------
        str
            What was done, a sentence.
        """
        fitted, model = self.fit(folder, experts)
        inner = fitted.model if isinstance(fitted, Correction) else fitted
        if inner is not model:
            assert isinstance(inner, MultiTaskModel) and isinstance(inner.states, Merged)
            _rewrite(folder, next(iter(experts.values())), inner.states, files)
        for left in folder.glob(f".{SIDE_CAR}.*"):  # of a process that died here
            left.unlink()
        shutil.rmtree(folder / TASKS, ignore_errors=True)
        if isinstance(fitted, Correction) and self.recipe.output.per_task == "folded":
            self._fold(folder, fitted, experts, shard_bytes, like)
            for file in sorted((folder / TASKS).rglob("*.safetensors")):
                files[str(file.relative_to(folder))] = {"sha256": _digest(file, files)}
        elif isinstance(fitted, Correction):
            fitted.save(folder / SIDE_CAR, force=True)
            files[SIDE_CAR] = {"sha256": _digest(folder / SIDE_CAR, files)}
        return self._told(fitted)

    def fit(self, folder: Path, experts: Mapping[str, nn.Module]) -> tuple[Any, MultiTaskModel]:
        """What corrects the merged model, and that model. Of several processes each sees its part
        of the batches, where there are enough of every task and the method is a shared one."""
        chosen = self.recipe.correct
        assert chosen is not None
        heads = {
            expert.name: _head_names(expert.path, experts[expert.name], self.recipe.heads)
            for expert in self.recipe.experts
        }
        model = _merged(folder, experts, heads)
        data, options = self.data, self._options()
        if chosen.method in SHARED and self.ranks.size > 1:
            limit = chosen.samples or SAMPLES  # of all processes
            cut = {task: list(batches(each, limit, None, CALLER)) for task, each in data.items()}
            least = min(map(len, cut.values()))
            data = {task: self.ranks.part(each, least)[0] for task, each in cut.items()}
            if least >= self.ranks.size:
                options["process_group"] = self.ranks.group
            elif not self.ranks.first:
                return None, model
        with self.ranks.hearing():
            return correct(model, experts, data, chosen.method, **options), model

    def _options(self) -> dict[str, Any]:
        chosen = self.recipe.correct
        assert chosen is not None
        if chosen.method == "data_free":
            return {}

        def report(what: str, done: int, total: int) -> None:
            self.progress(f"correcting: {what}", done / total)

        options: dict[str, Any] = {"progress": report}
        if chosen.samples is not None:
            options["max_samples"] = chosen.samples
        hidden = any(
            isinstance(batch, dict) and not bool(torch.as_tensor(batch[name]).all())
            for each in self.data.values()
            for batch in each
            for name in batch
            if name == "attention_mask"
        )
        if hidden and chosen.method != "batch_norm":
            options["mask"] = attention_mask
        return options

    def _fold(
        self,
        folder: Path,
        fitted: Correction,
        experts: Mapping[str, nn.Module],
        shard_bytes: int,
        like: Path | None,
    ) -> None:
        """A model of transformers for each task."""
        config = read_config(str(folder))
        dtype = getattr(torch, TORCH_TYPES[next(
            entry.dtype for entry in open_checkpoint(folder).tensors.values() if entry.is_float
        )])  # fmt: skip
        for task, expert in experts.items():
            self.progress(f"folding {task}", 0.0)
            plain: Any = fitted.fold(task)
            if extra := sorted(plain.state_dict().keys() - expert.state_dict().keys()):
                raise ValueError(
                    f"nlm.recipe: a folded correction needs a bias in every layer that it goes "
                    f"into, got none for {extra[0]!r} in {type(plain).__name__}: write "
                    "'per_task: side-car'"
                )
            plain.config = copy.deepcopy(expert.config)
            for name in ("use_cache", "tie_word_embeddings"):
                if hasattr(config, name):
                    setattr(plain.config, name, getattr(config, name))
            target = folder / TASKS / file_name(task)
            with quiet():
                plain.to(dtype).save_pretrained(target, max_shard_size=shard_bytes)
            own = next(each.path for each in self.recipe.experts if each.name == task)
            copy_others(own, target, replace=False)
            copy_others(like, target, replace=False)

    def _told(self, fitted: nn.Module) -> str:
        import transformers

        chosen = self.recipe.correct
        assert chosen is not None
        used = []
        for task, each in self.data.items():
            count = sum(sample_count(batch, CALLER) for batch in each)
            text = chosen.data[task]
            sha = f", SHA-256 {sha256_of(Path(text))}" if Path(text).is_file() else ""
            used.append(f"{task!r}: {count} samples of `{text}`{sha}")
        where = ""
        if isinstance(fitted, Correction):
            where = f" at {len(fitted.points)} points"
            where += (
                f"; the corrections are folded into `{TASKS}/TASK`"
                if self.recipe.output.per_task == "folded"
                else f"; the corrections are in `{SIDE_CAR}`, which `nlm.load` reads"
            )
        on = f" ({'; '.join(used)})" if used else ""
        return (
            f"Corrected by {chosen.method}{where}{on}. torch {torch.__version__}, transformers "
            f"{transformers.__version__}."
        )


def _merged(
    folder: Path, experts: Mapping[str, nn.Module], heads: Mapping[str, set[str]]
) -> MultiTaskModel:
    """The merged weights as the model of all tasks, each with its own head."""
    first: Any = next(iter(experts.values()))
    apart = set().union(*heads.values())
    state = load_model(str(folder), config=first.config if apart else None).state_dict()
    shared = {name: tensor for name, tensor in state.items() if name not in apart}
    own = {
        task: {name: each for name, each in expert.state_dict().items() if name in apart}
        for task, expert in experts.items()
    }
    return Merged(shared, own, {}, {}).model(first)


def _head_names(path: Path, expert: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    """What an expert calls the entries that it keeps for itself; patterns are of names in files."""
    names = names_of(open_checkpoint(path), expert)
    return {own for name, own in names.items() if matches(name, patterns)}


def _rewrite(
    folder: Path, model: nn.Module, states: Mapping[str, Tensor], files: dict[str, Any]
) -> None:
    """Writes the weights into the files of a checkpoint, where they stand and as they are typed."""
    checkpoint = open_checkpoint(folder)
    names = names_of(checkpoint, model)
    for file in checkpoint.files:
        with file.open("r+b") as opened:
            for entry in checkpoint.tensors.values():
                if entry.file == file and entry.is_float:
                    dtype = getattr(torch, TORCH_TYPES[entry.dtype])
                    made = states[names[entry.name]].detach().to("cpu", dtype).contiguous()
                    if not bool(made.isfinite().all()):
                        raise ValueError(
                            f"nlm.recipe: corrected weights are finite in {dtype}, got NaN or inf "
                            f"in {entry.name!r}"
                        )
                    opened.seek(entry.begin)
                    opened.write(made.view(-1).view(torch.uint8).numpy().data)
        files[file.name] = {**files[file.name], "sha256": _digest(file, files)}


def _digest(file: Path, files: Mapping[str, Any]) -> str | None:
    """A file's SHA-256, where those of the weights were taken."""
    is_taken = all(each["sha256"] for each in files.values())
    return sha256_of(file) if is_taken else None
