"""The whole way in one call, on two foundations that are copies in another order."""

import copy

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from small_transformers import Size, vit
from torch import nn

import nlm
from nlm.correct import correct
from nlm.evaluate import accuracy
from nlm.gauge import find
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


@pytest.fixture(scope="module")
def turned():
    """Foundations that differ by a permutation, rotations and gains, and experts near them."""
    torch.manual_seed(0)
    first = vit(5, Size(16, 1, 2, 24)).eval()
    images = torch.randn(300, 1, 16, 16)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    spec = nlm.trace(first, images[:4])
    gauge = find(first, images[:4], spec)
    second = copy.deepcopy(first)
    state = spec.apply(spec.random(7), gauge.fold(first.state_dict()))
    second.load_state_dict(gauge.apply(gauge.random(7), state))
    experts, data = {}, {}
    for number, task in enumerate(TASKS):
        expert = copy.deepcopy((first, second)[number % 2])
        expert.head = nn.Linear(16, 4 + number)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
            data[task] = [(images, expert(images).argmax(1))]
        experts[task] = (number % 2, expert)
    return [first, second], experts, spec, data, images


def test_experts_of_a_rotated_foundation_merge(turned):
    foundations, experts, spec, data, images = turned
    scores = {}
    for alignment in ("activations", "orthogonal"):
        choice, aligned = nlm.merge_nonlocal(
            foundations, experts, spec, data, data, alignment=alignment, correction="none",
            scales=(0.3,), align_options={"data": [images]},
        )  # fmt: skip
        assert all(accuracy(aligned.experts[task], data[task]) > 0.99 for task in TASKS)
        scores[alignment] = choice.scores[0.3]
    assert scores["orthogonal"] > 0.85 > scores["activations"]
    there, back = aligned.foundations
    assert all(torch.allclose(there[name], back[name], atol=1e-4) for name in there)


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


def test_batch_norms_are_reset_on_a_copy():
    own = {"a": convnet(1), "b": convnet(2)}
    model = nlm.merge(own, convnet(0), scale=0.5).model(own["a"])
    before = model.states["1.running_mean"].clone()
    data = {"a": [images(40)], "b": [images(40, 1)]}
    fixed = correct(model, own, data, "batch_norm")
    assert torch.equal(model.states["1.running_mean"], before)
    assert nlm.reset_batch_norm(model, data) == 2
    assert torch.equal(model.states["1.running_mean"], fixed.states["1.running_mean"])
    assert not torch.equal(model.states["1.running_mean"], before)


def test_theta_init_may_be_any_foundation(world):
    foundations, experts, spec, _ = world
    first = align_experts(foundations, experts, spec, heads=("4",), base=0)
    assert torch.equal(first.base["0.weight"], foundations[0][0].weight)
    assert "4.weight" not in first.base
    mean = align_experts(foundations, experts, spec, heads=("4",))
    torch.testing.assert_close(mean.base["0.weight"], foundations[0][0].weight)
    raw = align_experts(foundations, experts, spec, None, heads=("4",))
    assert not torch.allclose(raw.base["0.weight"], foundations[0][0].weight, atol=1e-2)


class Shuffled:
    """Batches in another order at every pass."""

    def __init__(self, inputs, labels=None):
        self.inputs, self.labels, self.passes = inputs, labels, 0

    def __iter__(self):
        self.passes += 1
        order = torch.randperm(len(self.inputs))
        for part in order.split(50):
            yield self.inputs[part] if self.labels is None else (
                self.inputs[part], self.labels[part],
            )  # fmt: skip


def test_data_are_drawn_once(world):
    foundations, experts, spec, data = world
    aligned = align_experts(foundations, experts, spec, heads=("4",))
    calibration = {task: Shuffled(data[task][0][0]) for task in TASKS}
    validation = {task: Shuffled(*data[task][0]) for task in TASKS}
    choose(aligned, calibration, validation, heads=("4",), scales=(0.3, 0.5), max_samples=20)
    assert {loader.passes for loader in [*calibration.values(), *validation.values()]} == {1}


def test_no_expert_is_changed(world):
    foundations, experts, spec, data = world
    aligned = align_experts(foundations, experts, spec, heads=("4",), base=1)
    models = [*foundations, *aligned.experts.values()]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    choice = choose(aligned, data, data, heads=("4",), scales=(0.5,))
    for tensor in [*choice.merged.tensors().values(), *aligned.base.values()]:
        tensor.zero_()
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("correction", ["none", "data_free"])
def test_what_sees_no_data_needs_none(world, correction):
    foundations, experts, spec, data = world
    aligned = align_experts(foundations, experts, spec, heads=("4",))
    choose(aligned, {}, data, correction=correction, heads=("4",), scales=(0.3,))
    with pytest.raises(ValueError, match="there is calibration data for every expert"):
        choose(aligned, {}, data, correction="tact", heads=("4",), scales=(0.3,))


def test_known_scores_of_the_experts_spare_their_run(world):
    foundations, experts, spec, data = world
    aligned = align_experts(foundations, experts, spec, heads=("4",))
    options = {"correction": "none", "heads": ("4",), "scales": (0.3,)}
    found = choose(aligned, data, data, **options).scores[0.3]
    halved = choose(aligned, data, data, expert_scores=dict.fromkeys(TASKS, 0.5), **options)
    assert halved.scores[0.3] == pytest.approx(2 * found)  # the experts themselves score 1


def test_what_was_tried_is_named(world):
    foundations, experts, spec, data = world
    aligned = align_experts(foundations, experts, spec, heads="4")
    masked = choose(
        aligned, data, data, method="tall_mask", correction="none", mask_thresholds=(0.2, 0.5),
        heads="4",
    )  # fmt: skip
    assert masked.tried == "mask_threshold" and list(masked.scores) == [0.2, 0.5]
    assert set(masked.mask_thresholds) == set(TASKS) and masked.scale == 1.0
    for method in ("linear", "model_stock"):
        found = choose(aligned, data, data, method=method, correction="none", heads="4")
        assert found.tried == "scale" and list(found.scores) == [1.0]


@pytest.mark.parametrize("correction", ["tact", "repair"])
def test_options_reach_the_fit(world, correction):
    foundations, experts, spec, data = world
    aligned = align_experts(foundations, experts, spec, heads=("4",))
    seen = []

    def forward(model, batch, **kwargs):
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        seen.append(len(inputs))
        return model(inputs, **kwargs)

    def mask(batch):
        return torch.arange(len(batch[0])) < 40

    choice, _ = nlm.merge_nonlocal(
        foundations, experts, spec, data, data, correction=correction, heads=("4",), scales=(0.3,),
        forward=forward, device="cpu", max_samples=64,
        correct_options={"points": ["0"], "mask": mask},
    )  # fmt: skip
    assert list(choice.model.points) == ["0"] and set(seen) >= {64, 300}
    few = {task: [(data[task][0][0][:40],)] for task in TASKS}
    fit = {"tact": nlm.Tact, "repair": nlm.Repair}[correction].fit
    expected = fit(choice.merged.model(mlp()), aligned.experts, few, points=["0"])
    torch.testing.assert_close(choice.model.correction("0"), expected.correction("0"))


def test_bad_calls(world):
    foundations, experts, spec, data = world
    with pytest.raises(ValueError, match="one of 2 foundations, got number 2 for 'a'"):
        align_experts(foundations, {"a": (2, experts["a"][1])}, spec)
    for base in ("median", 7, -1, 0.5):
        with pytest.raises(ValueError, match=f"'mean' or the number of one of 2 .* got {base!r}"):
            align_experts(foundations, experts, spec, base=base)
    with pytest.raises(ValueError, match=r"one permutation per further foundation \(1\), got 0"):
        align_experts(foundations, experts, spec, permutations=[])
    with pytest.raises(ValueError, match="at least one foundation and one expert, got 2 and 0"):
        align_experts(foundations, {}, spec)
    aligned = align_experts(foundations, experts, spec, heads=("4",))
    with pytest.raises(ValueError, match="there is validation data for every expert, got none for"):
        choose(aligned, data, {"a": data["a"]}, heads=("4",))
    with pytest.raises(ValueError, match="the correction is one of none, tact"):
        choose(aligned, data, data, correction="magic", heads=("4",))
    with pytest.raises(ValueError, match="at least one scale to try"):
        choose(aligned, data, data, scales=(), heads=("4",))
