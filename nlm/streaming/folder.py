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
from nlm.checkpoint.names import file_name, printable
from nlm.checkpoint.shards import ShardFile, lay_out, sha256_of
from nlm.streaming.plan import Plan

_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
    ".ot", ".pkl",
}  # fmt: skip
CARD = "README.md"
_FILES, _NOT_TAKEN = "## Files", "not taken"
_KNOWN = "`nlm merge --resume` knows this merge as "


def complete(
    folder: Path, plan: Plan, like: Path | None = None, settings: Mapping[str, Any] | None = None
) -> None:
    """Completes the folder of a merged checkpoint, but for its model card.

    The files of the start's folder that hold no weights are copied, with the type in config.json
    as it is now; each expert's heads go to ``heads/TASK.safetensors``.

    Parameters
    ----------
    like : the folder to copy from instead.
    settings : what replaces those of config.json.
    """
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
    identity: str = "",
) -> str:
    """The model card: Hugging Face's front matter, then what was merged.

    Parameters
    ----------
    recipe : as it was given, YAML.
    files : name -> {"sha256": digest or None} of the files of tensors.
    models : who -> the checkpoint that a user named, where the plan reads copies of them.
    notes : what else was done, a paragraph each.
    identity : what the merge is known by when it is resumed.
    """
    if models is None:
        models = {f"expert {task!r}": each.path for task, each in plan.experts.items()}
        models = models if plan.base is None else {"base": plan.base.path, **models}
    names = list(dict.fromkeys(path.name for path in models.values()))
    front = yaml.safe_dump({"base_model": names, "tags": ["merge", "nlm"]}, sort_keys=False)
    lines = [
        "---", front.rstrip(), "---", "", f"# {printable(plan.output.stem)}", "",
        f"Merged by nlm {nlm.__version__} with the method `{plan.method}`.", "",
        "| | checkpoint |", "|---|---|",
        *(f"| {_cell(who)} | {_cell(str(path))} |" for who, path in models.items()), "",
        *(line for note in notes for line in (note, "")),
    ]  # fmt: skip
    if recipe:
        lines += ["## Recipe", "", *(f"    {line}" for line in recipe.splitlines()), ""]
    lines += [_FILES, "", "| file | SHA-256 |", "|---|---|"]
    lines += [f"| {name} | {each['sha256'] or _NOT_TAKEN} |" for name, each in files.items()]
    lines += ["", f"{_KNOWN}`{identity}`."] if identity else []
    text = "\n".join(lines) + "\n"  # a folder's name need not be UTF-8
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_card(folder: Path) -> tuple[str | None, dict[str, str | None]]:
    """What a folder's card says: the merge's identity, and file -> SHA-256; nothing where there is
    no card of nlm's."""
    try:
        lines = (folder / CARD).read_text(encoding="utf-8").splitlines()
        table = lines[len(lines) - lines[::-1].index(_FILES) + 3 :]
    except (OSError, ValueError):
        return None, {}
    rows = (line[2:-2].rsplit(" | ", 1) for line in table if line.startswith("| "))
    files = {name: None if digest == _NOT_TAKEN else digest for name, digest in rows}
    known = [line[len(_KNOWN) :].strip("`.") for line in table if line.startswith(_KNOWN)]
    return (known[0], files) if known else (None, {})


def note_others(folder: Path, files: dict[str, Any]) -> None:
    """Notes the other files of tensors in a folder, heads and masks, as those that were written."""
    is_taken = all(each["sha256"] for each in files.values())
    for file in sorted(folder.rglob("*.safetensors")):
        name = file.relative_to(folder).as_posix()
        if name not in files:
            files[name] = {"sha256": sha256_of(file) if is_taken else None}


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
