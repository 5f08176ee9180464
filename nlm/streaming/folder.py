"""What a model's folder holds beside its weights: configuration, tokenizer, heads, model card."""

import json
import shutil
from collections.abc import Mapping
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
    if (source := like or plan.start.folder) is not None:
        for file in sorted(source.iterdir()):
            if file.is_file() and _is_kept(file):
                with naming(folder / file.name):
                    shutil.copyfile(file, folder / file.name)
    if (config := read_config(folder)) is not None and plan.dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        typed = {**config, key: TORCH_TYPES[plan.dtype]}
        write_text(folder / "config.json", json.dumps(typed, indent=2) + "\n")
    for task, expert in plan.experts.items():
        _write_heads(folder / "heads", task, expert, plan)
    write_text(folder / CARD, card(plan, recipe, files))


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


def card(plan: Plan, recipe: str, files: Mapping[str, Any]) -> str:
    """The model card: Hugging Face's front matter, then what was merged."""
    models = {f"expert {task!r}": each for task, each in plan.experts.items()}
    if plan.base is not None:
        models = {"base": plan.base, **models}
    names = list(dict.fromkeys(each.path.name for each in models.values()))
    front = yaml.safe_dump({"base_model": names, "tags": ["merge", "nlm"]}, sort_keys=False)
    lines = [
        "---", front.rstrip(), "---", "", f"# {plan.output.stem}", "",
        f"Merged by nlm {nlm.__version__} with the method `{plan.method}`.", "",
        "| | checkpoint |", "|---|---|",
        *(f"| {_cell(who)} | {_cell(str(each.path))} |" for who, each in models.items()), "",
    ]  # fmt: skip
    if recipe:
        lines += ["## Recipe", "", *(f"    {line}" for line in recipe.splitlines()), ""]
    lines += ["## Files", "", "| file | SHA-256 |", "|---|---|"]
    lines += [f"| {name} | {each['sha256'] or 'not taken'} |" for name, each in files.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
