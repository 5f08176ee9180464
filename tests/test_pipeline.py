"""The whole way in one call, on two foundations that are copies in another order."""

import copy

import pytest
import torch
from _networks import mlp, vectors

import nlm
from nlm.evaluate import accuracy
from nlm.pipeline import align_experts, choose

TASKS = ("a", "b", "c")


@pytest.fixture(scope="module")
def world():
    """Foundations that differ by a permutation alone, experts near them, and labelled data."""
    first, second = mlp(0), mlp(0)
    spec = nlm.trace(first, vectors(16))
    second.load_state_dict(spec.apply(spec.random(7), first.state_dict()))
    experts, data = {}, {}
    for number, task in enumerate(TASKS):
        expert = copy.deepcopy((first, second)[number % 2])
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in expert.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * parameter.std() * noise)
            inputs = vectors(300, number + 1)
            labels = expert(inputs).argmax(1)
        experts[task] = (number % 2, expert)
        data[task] = [(inputs, labels)]
    return [first, second], experts, spec, data


@pytest.mark.parametrize("alignment", ["weights", "activations"])
def test_aligned_experts_merge_and_unaligned_ones_do_not(world, alignment):
    foundations, experts, spec, data = world
    options = {"data": [vectors(256, 50)]} if alignment == "activations" else {}
    kwargs = {"heads": ("4",), "scales": (0.0, 0.3)}
    choice, aligned = nlm.merge_nonlocal(
        foundations, experts, spec, data, data, alignment=alignment, align_options=options, **kwargs
    )
    control, _ = nlm.merge_nonlocal(
        foundations, experts, spec, data, data, alignment=None, correction="none", **kwargs
    )
    for task in TASKS:
        assert accuracy(choice.model, data[task], task=task) > 0.85
        assert accuracy(aligned.experts[task], data[task]) == 1.0
    assert choice.scale == max(choice.scores, key=choice.scores.get)
    assert max(control.scores.values()) < 0.7 < max(choice.scores.values())


@pytest.mark.parametrize("correction", ["none", "tact", "tact_at_once", "repair"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tall_mask"])
def test_every_merger_with_every_correction(world, method, correction):
    foundations, experts, spec, data = world
    aligned = align_experts(foundations, experts, spec, heads=("4",))
    choice = choose(
        aligned, data, data, method=method, correction=correction, heads=("4",),
        scales=(0.3,), mask_thresholds=(0.2, 0.5),
    )  # fmt: skip
    assert bool(choice.merged.masks) == (method == "tall_mask")
    for task in TASKS:
        assert accuracy(choice.model, data[task], task=task) > 0.75


def test_theta_init_may_be_any_foundation(world):
    foundations, experts, spec, _ = world
    first = align_experts(foundations, experts, spec, heads=("4",), base=0)
    assert torch.equal(first.base["0.weight"], foundations[0][0].weight)
    assert "4.weight" not in first.base
    mean = align_experts(foundations, experts, spec, heads=("4",))
    torch.testing.assert_close(mean.base["0.weight"], foundations[0][0].weight)
    raw = align_experts(foundations, experts, spec, None, heads=("4",))
    assert not torch.allclose(raw.base["0.weight"], foundations[0][0].weight, atol=1e-2)


def test_bad_calls(world):
    foundations, experts, spec, data = world
    with pytest.raises(ValueError, match="one of 2 foundations, got number 2 for 'a'"):
        align_experts(foundations, {"a": (2, experts["a"][1])}, spec)
    aligned = align_experts(foundations, experts, spec, heads=("4",))
    with pytest.raises(ValueError, match="the correction is one of none, tact"):
        choose(aligned, data, data, correction="magic", heads=("4",))
    with pytest.raises(ValueError, match="at least one scale to try"):
        choose(aligned, data, data, scales=(), heads=("4",))
