"""What a model's folder holds beside its weights: configuration, tokenizer, heads, model card."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

import nlm
from nlm._names import matches
from nlm.checkpoint.atomic import naming, write_text
from nlm.checkpoint.entries import TORCH_TYPES
from nlm.checkpoint.headers import Checkpoint, read_config
from nlm.checkpoint.mapping import MappedFiles
from nlm.checkpoint.names import file_name
from nlm.checkpoint.shards import ShardFile, lay_out
from nlm.streaming.plan import Plan

_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
    ".ot", ".pkl",
}  # fmt: skip
CARD = "README.md"


def write_others(
    folder: Path, plan: Plan, recipe: str, files: Mapping[str, Any], like: Path | None = None
) -> None:
    """Completes the folder of a merged checkpoint.

    The files of the start's folder that hold no weights are copied, with the type in config.json
    as it is now; each expert's heads go to ``heads/TASK.safetensors``; a model card says what was
    merged, and how.

    Parameters
    ----------
    like : the folder to copy from instead.
    recipe : as it was given, YAML.
    files : name -> {"sha256": digest or None} of the weights.
    """
    complete(folder, plan, like)
    write_text(folder / CARD, card(plan, recipe, files))


def complete(
    folder: Path, plan: Plan, like: Path | None = None, settings: Mapping[str, Any] | None = None
) -> None:
    """All of :func:`write_others` but the model card; ``settings`` replace those of config.json."""
    copy_others(like or plan.start.folder, folder)
    if (config := read_config(folder)) is not None:
        changed = dict(settings or {})
        types = {plan.type_of(each) for each in plan.entries().values() if plan.is_merged(each)}
        if len(types) == 1:
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            changed[key] = TORCH_TYPES[types.pop()]
        if changed:
            text = json.dumps({**config, **changed}, indent=2) + "\n"
            write_text(folder / "config.json", text)
    for task, expert in plan.experts.items():
        _write_heads(folder / "heads", task, expert, plan)


def copy_others(source: Path | None, folder: Path, replace: bool = True) -> None:
    """Copies the files of a model's folder, where there is one, that hold no weights."""
    for file in sorted(source.iterdir()) if source is not None else ():
        if file.is_file() and _is_kept(file) and (replace or not (folder / file.name).exists()):
            with naming(folder / file.name):
                shutil.copyfile(file, folder / file.name)


def _is_kept(file: Path) -> bool:
    is_index = file.name.endswith(".index.json")
    return not (file.name.startswith(".") or is_index or file.suffix in _WEIGHTS) and (
        file.name != CARD
    )


def _write_heads(folder: Path, task: str, expert: Checkpoint, plan: Plan) -> None:
    own = [entry for name, entry in expert.tensors.items() if matches(name, plan.heads)]
    if not own:
        return
    folder.mkdir(exist_ok=True)
    name = f"{file_name(task)}.safetensors"
    shard = lay_out(name, [(each.name, each.dtype, each.shape) for each in own], {"format": "pt"})
    file = ShardFile(folder / name, shard, digest=False)
    with MappedFiles([expert]) as files:
        for entry in shard.tensors:
            file.write(files.bytes(expert.tensors[entry.name]).data)
    file.close(sync=False)


def card(
    plan: Plan,
    recipe: str,
    files: Mapping[str, Any],
    models: Mapping[str, Path] | None = None,
    notes: Iterable[str] = (),
) -> str:
    """The model card: Hugging Face's front matter, then what was merged.

    Parameters
    ----------
    models : who -> the checkpoint that a user named, where the plan reads copies of them.
    notes : what else was done, a paragraph each.
    """
    if models is None:
        models = {f"expert {task!r}": each.path for task, each in plan.experts.items()}
        models = models if plan.base is None else {"base": plan.base.path, **models}
    names = list(dict.fromkeys(path.name for path in models.values()))
    front = yaml.safe_dump({"base_model": names, "tags": ["merge", "nlm"]}, sort_keys=False)
    lines = [
        "---", front.rstrip(), "---", "", f"# {plan.output.stem}", "",
        f"Merged by nlm {nlm.__version__} with the method `{plan.method}`.", "",
        "| | checkpoint |", "|---|---|",
        *(f"| {_cell(who)} | {_cell(str(path))} |" for who, path in models.items()), "",
        *(line for note in notes for line in (note, "")),
    ]  # fmt: skip
    if recipe:
        lines += ["## Recipe", "", *(f"    {line}" for line in recipe.splitlines()), ""]
    lines += ["## Files", "", "| file | SHA-256 |", "|---|---|"]
    lines += [f"| {name} | {each['sha256'] or 'not taken'} |" for name, each in files.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
