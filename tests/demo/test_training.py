"""Training learns, repeats itself bit by bit, and leaves the foundation as it was."""

import pytest
import torch

from nlm.demo import Demo, Recipe, Settings, Split
from nlm.demo.glyphs import Glyphs
from nlm.demo.networks import mlp512
from nlm.demo.tasks import Sizes, make_task
from nlm.demo.training import fit, train_expert, train_foundation


def accuracy(model: torch.nn.Module, split: Split) -> float:
    with torch.no_grad():
        return (model(split.inputs).argmax(1) == split.labels).float().mean().item()


def test_an_expert_learns_more_than_its_probe(glyphs: Glyphs, world: Demo) -> None:
    task = make_task("digits", glyphs, 0, Sizes(train=1500, validation=10, calibration=10))
    probe, expert = (
        train_expert(
            "mlp512", world.foundations[0], task, Recipe(epochs, 1e-3, 0.01), seed=0, index=0
        )
        for epochs in (0, 6)
    )
    assert accuracy(probe, task.test) > 0.5  # chance is 0.10
    assert accuracy(expert, task.test) > accuracy(probe, task.test) + 0.05
    assert not expert.training


def test_training_repeats_and_leaves_the_foundation_alone(world: Demo, small: Settings) -> None:
    foundation = world.foundations[0]
    before = {name: value.clone() for name, value in foundation.state_dict().items()}
    task = world.tasks["upper"]
    first, again = (
        train_expert("mlp512", foundation, task, small.expert_recipe, seed=5, index=0)
        for _ in range(2)
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for name, value in foundation.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_foundations_differ_in_weights_images_and_order(glyphs: Glyphs) -> None:
    none = Recipe(0, 1e-3, 0.0)
    untrained = [train_foundation("mlp512", glyphs, 8, none, 0, index) for index in range(2)]
    weights = [model.state_dict()["trunk.fc1.weight"] for model in untrained]
    assert not torch.equal(*weights)


def test_progress_can_stop_a_training() -> None:
    data = Split(torch.randn(32, 1, 16, 16), torch.zeros(32, dtype=torch.long))
    seen: list[float] = []

    def stop(share: float) -> None:
        seen.append(share)
        if share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(mlp512(4), data, Recipe(4, 1e-3, 0.0, batch=16), torch.Generator(), stop)
    assert seen == [0.25, 0.5]
