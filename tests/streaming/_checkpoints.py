"""Small real checkpoints: folders as transformers writes them, and single files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {
    "embed.weight": (50, 8), "layers.0.up.weight": (96, 8), "layers.0.up.bias": (96,),
    "layers.0.down.weight": (8, 96), "norm.weight": (8,), "odd.weight": (7, 13), "none": (0, 3),
    "conv.weight": (4, 3, 3, 3),
}  # fmt: skip


def states(models: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict]:
    """A base and the experts around it, with statistics and an integer."""
    make = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=make) for name, shape in SHAPES.items()}
    found = []
    for number in range(models):
        state = {
            name: (value + 0.1 * number * torch.randn(value.shape, generator=make)).to(dtype)
            for name, value in base.items()
        }
        state["bn.running_mean"] = torch.randn(5, generator=make)
        state["bn.num_batches_tracked"] = torch.tensor(7 + number)
        state["position_ids"] = torch.arange(4)
        found.append(state)
    return found


def write(path: Path, state: dict[str, Tensor], shards: int = 1) -> Path:
    """A folder with an index and more files where there are more shards; else one file."""
    if path.suffix == ".safetensors":
        save_file(state, path)
        return path
    path.mkdir()
    names = list(state)
    weights = {}
    for number in range(shards):
        name = f"model-{number}.safetensors" if shards > 1 else "model.safetensors"
        part = {each: state[each] for each in names[number::shards]}
        save_file(part, path / name)
        weights |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weights}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({"model_type": "toy", "dtype": "float32"}))
    (path / "tokenizer.json").write_text("{}")
    return path
