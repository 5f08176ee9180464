"""How the demo's foundations and experts are trained: the same bits for a seed and a thread count.

AdamW under a cosine schedule with warm-up and clipped gradients. A foundation learns the 240-way
pre-training task from its own draw of images. An expert starts from a foundation with a logistic
probe as head, then trains trunk and head: it ends three to eight points above the probe.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.correct import linear_probe
from nlm.demo.augmentation import stream
from nlm.demo.glyphs import Glyphs
from nlm.demo.networks import NETWORKS
from nlm.demo.tasks import Split, Task

_PROBE_IMAGES = 1500
_PROBE_PENALTY = 1e-3
_PROBE_STEPS = 30


@dataclass(frozen=True)
class Recipe:
    """The settings of one training run; the last incomplete batch of an epoch is left out."""

    epochs: int
    learning_rate: float
    weight_decay: float
    batch: int = 128
    warm_up: float = 0.05  # share of all steps
    clip: float = 5.0


# Strong weight decay moves a foundation away from its initial weights, which is what makes two of
# them alignable: at 0.01 the aligned midpoint of two MLPs scores 0.24, at 1.0 it scores 0.65.
FOUNDATION = {
    "cnn64": Recipe(3, 2e-3, 0.5),
    "cnn64_norm": Recipe(3, 2e-3, 0.5),
    "mlp512": Recipe(3, 2e-3, 1.0),
}
EXPERT = {
    "cnn64": Recipe(4, 1e-3, 0.01),
    "cnn64_norm": Recipe(4, 1e-3, 0.01),
    "mlp512": Recipe(5, 1e-3, 0.01),
}

Fraction = Callable[[float], None]


def train_foundation(
    network: str,
    glyphs: Glyphs,
    images: int,
    recipe: Recipe,
    seed: int,
    index: int,
    progress: Fraction | None = None,
) -> nn.Sequential:
    """Train foundation ``index``: the two differ in weights, images and order of batches."""
    name = f"foundation {index}"
    classes = len(glyphs.alphabets["pretraining"])
    model = NETWORKS[network](classes, seed=2 * seed + index)
    data = Split(*glyphs.draw("pretraining", images, stream(seed, name, "images")))
    fit(model, data, recipe, stream(seed, name, "batches"), progress)
    return model


def train_expert(
    network: str,
    foundation: nn.Sequential,
    task: Task,
    recipe: Recipe,
    seed: int,
    index: int,
    progress: Fraction | None = None,
) -> nn.Sequential:
    """Fine-tune foundation ``index`` on a task; the foundation itself is left as it is."""
    model = NETWORKS[network](len(task.classes))
    trunk, head = model.get_submodule("trunk"), model.get_submodule("head")
    trunk.load_state_dict(foundation.get_submodule("trunk").state_dict())
    probe = linear_probe(
        model,
        task.train.batches(),
        max_samples=_PROBE_IMAGES,
        l2=_PROBE_PENALTY,
        steps=_PROBE_STEPS,
    )
    head.load_state_dict(probe.state_dict())
    fit(model, task.train, recipe, stream(seed, task.name, f"expert {index}", "batches"), progress)
    return model


def fit(
    model: nn.Module,
    data: Split,
    recipe: Recipe,
    generator: torch.Generator,
    progress: Fraction | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> None:
    """Train ``model`` in place; ``progress`` gets the share done and may raise to stop."""
    per_epoch = len(data) // recipe.batch
    steps = recipe.epochs * per_epoch
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_factor(step, steps, recipe.warm_up)
    )
    model.train()
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(data), generator=generator)
        for batch in order[: per_epoch * recipe.batch].split(recipe.batch):
            optimizer.zero_grad()
            loss(model(data.inputs[batch]), data.labels[batch]).backward()
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress((epoch + 1) / recipe.epochs)
    model.eval()
    model.zero_grad()


def _learning_rate_factor(step: int, steps: int, warm_up: float) -> float:
    """Linear warm-up times half a cosine."""
    ramp = min(1.0, (step + 1) / (warm_up * steps + 1))
    return ramp * (1 + math.cos(math.pi * min(step, steps) / max(steps, 1))) / 2
