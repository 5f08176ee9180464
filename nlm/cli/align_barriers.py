"""The losses between two models of ``nlm align``, on data that has labels."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from nlm._results import Barrier
from nlm.evaluate import loss_barrier
from nlm.report import barriers as as_barriers
from nlm.statistics import Data


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
