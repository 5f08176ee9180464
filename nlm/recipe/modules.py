"""The models of a recipe as modules: loaded from their folders, with and without weights."""

from pathlib import Path
from typing import Any

from torch import nn

from nlm.checkpoint import Checkpoint
from nlm.symmetry.pretrained import build_model, entry_names, load_model


def load_module(path: Path) -> nn.Module:
    """The model of a folder in float32, without a cache of keys and values, which nobody reads."""
    model = load_model(str(path))
    config: Any = model.config
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return model


def hollow_module(path: Path) -> nn.Module:
    """The model of a folder without its weights."""
    return build_model(str(path), device="meta")


def names_of(checkpoint: Checkpoint, model: nn.Module | None = None) -> dict[str, str]:
    """Name in a checkpoint -> what its model calls it; files of weights have no model.

    Raises
    ------
    ValueError
        See :func:`nlm.symmetry.pretrained.entry_names`.
    """
    if checkpoint.folder is None:
        return {name: name for name in checkpoint.tensors}
    return entry_names(model or hollow_module(checkpoint.path), checkpoint.tensors)
