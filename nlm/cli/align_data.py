"""DATA of ``nlm align``: batches from a file of tensors, from a text, or from a function."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlm._results import Barrier
from nlm.checkpoint import read_tensors
from nlm.cli.spec_source import called
from nlm.evaluate import loss_barrier
from nlm.report import barriers as as_barriers
from nlm.statistics import Data

_BATCH = 16  # samples
_WINDOW = 128  # tokens


def open_data(text: str, folder: str, model: nn.Module) -> list[Any]:
    """What DATA names, as batches; ``folder`` has the tokens for a text."""
    path = Path(text)
    if not path.exists():
        module, colon, function = text.rpartition(":")
        if not colon:
            raise FileNotFoundError(
                f"nlm align: data is a file or package.module:function, got {text!r}"
            )
        return list(called(module, function, "nlm align: the data"))
    if path.suffix == ".safetensors":
        return _batches(path, read_tensors(path)[0])
    tokens = _tokens(path, folder)
    length = min(_WINDOW, getattr(model.config, "max_position_embeddings", None) or _WINDOW)
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    if not len(windows):
        raise ValueError(
            f"nlm align: a text has at least {length} tokens, got {len(tokens)} in {text!r}"
        )
    return [{"input_ids": each} for each in windows.split(_BATCH)]


def _batches(path: Path, inputs: Mapping[str, Tensor]) -> list[Any]:
    lengths = {name: len(each) if each.dim() else 0 for name, each in inputs.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            f"nlm align: a file of inputs has one entry per sample in every tensor, got lengths "
            f"{lengths} in {str(path)!r}"
        )
    parts = zip(*(each.split(_BATCH) for each in inputs.values()), strict=True)
    return [dict(zip(inputs, part, strict=True)) for part in parts]


def _tokens(path: Path, folder: str) -> Tensor:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"nlm align: a text needs the tokenizer of A's folder, got none in {folder!r}"
        ) from error
    text = path.read_text(encoding="utf-8")
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(found, dtype=torch.int64)


def barriers(
    model: nn.Module,
    states: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    data: Data,
    samples: int | None,
) -> Barrier | None:
    """The losses on the line between two models, for each pair; None where the data has no labels.

    Labels are the entry ``labels`` of a batch by name, the second of a pair, and the text itself
    for a model that generates text.
    """
    batches = list(data)
    labelled = [pair for batch in batches if (pair := _labelled(model, batch)) is not None]
    if len(labelled) < len(batches):
        return None
    by_model = isinstance(labelled[0][0], Mapping)
    curves = {
        name: loss_barrier(
            model, a, b, labelled, max_samples=samples,
            loss=(lambda loss, _: loss) if by_model else functional.cross_entropy,
            forward=(lambda model, batch: model(**batch[0]).loss) if by_model else None,
        )
        for name, (a, b) in states.items()
    }  # fmt: skip
    return as_barriers(curves)


def _labelled(model: nn.Module, batch: Any) -> tuple[Any, Tensor] | None:
    """(inputs, labels), the labels among the inputs too where these have names."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if not isinstance(batch, Mapping):
        return None
    if "labels" in batch:
        return batch, batch["labels"]
    config: Any = getattr(model, "config", None)
    generates = getattr(model, "can_generate", bool)() and not config.is_encoder_decoder
    if generates and "input_ids" in batch and "attention_mask" not in batch:
        return {**batch, "labels": batch["input_ids"]}, batch["input_ids"]
    return None
