"""Specifications of configurations that were traced before, kept between runs.

Each is one JSON file in the user's cache folder, named after a SHA-256 of all that it depends on:
the configuration without names and paths, the class, the names and shapes of the state dict, the
inputs, the chosen outputs, the versions of torch and transformers, and the code of this package. A
file is written whole or not at all; one that is damaged is made again.
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nlm.checkpoint import atomic_path, cache_folder
from nlm.checkpoint.texts import parse_json
from nlm.symmetry.spec import PermutationSpec
from nlm.symmetry.text import from_mapping, to_json, to_mapping

# What a configuration says about itself or about training, not about what is computed.
_UNRELATED = {
    "architectures", "dtype", "finetuning_task", "id2label", "label2id", "problem_type",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version",
}  # fmt: skip


def fingerprint(model: nn.Module, inputs: Mapping[str, Any], outputs: Sequence[str] | None) -> str:
    """A SHA-256 of a Hugging Face model, its inputs' shapes and its outputs, without versions."""
    config: Any = model.config
    content = {
        "config": _related(config.to_dict()),
        "class": type(model).__qualname__,
        "state": [[name, *tensor.shape] for name, tensor in model.state_dict().items()],
        "inputs": tree_map_only(Tensor, lambda tensor: list(tensor.shape), dict(inputs)),
        "outputs": list(outputs or ()),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def remember(key: str, make: Callable[[], PermutationSpec]) -> PermutationSpec:
    """The specification of a fingerprint; where it is not kept yet, made and written."""
    versions = f"{key} {torch.__version__} {_transformers_version()} {_code()}"
    name = hashlib.sha256(versions.encode()).hexdigest()[:32]
    file = cache_folder() / f"spec-{name}.json"
    if (kept := _read(file)) is not None:
        return kept
    spec = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file, force=True) as temporary:
            temporary.write_text(to_json(to_mapping(spec) | {"digest": spec.digest()}))
    except OSError as error:
        warnings.warn(
            f"nlm.trace_config: the cache folder must be writable, got {str(file.parent)!r} "
            f"({error}); the next run traces again (NLM_CACHE names another folder)",
            stacklevel=3,
        )
    return spec


def _read(file: Path) -> PermutationSpec | None:
    """The content of a whole file, else None."""
    try:
        content = parse_json(file.read_text())
        spec = from_mapping(content, repr(str(file)))
        if content["digest"] == spec.digest():
            return spec
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError):
        pass
    warnings.warn(
        f"nlm.trace_config: a cached file must be whole, got {str(file)!r} damaged; the model is "
        f"traced again",
        stacklevel=4,
    )
    return None


def _related(settings: Any) -> Any:
    """Settings without names, paths and what concerns training, at every depth."""
    if not isinstance(settings, dict):
        return settings
    return {
        name: _related(value)
        for name, value in settings.items()
        if name not in _UNRELATED
        and not str(name).startswith(("_", "initializer_"))
        and "dropout" not in str(name)
    }


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


@functools.cache
def _code() -> str:
    """A SHA-256 of the code that finds symmetries."""
    state = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()
