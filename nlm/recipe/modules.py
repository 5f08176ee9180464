"""The models of a recipe as modules: loaded from their folders, with and without weights."""

from pathlib import Path
from typing import Any

from torch import nn

from nlm.symmetry.pretrained import build_model, load_model


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
