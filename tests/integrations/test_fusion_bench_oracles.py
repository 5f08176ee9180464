"""Results of nlm beside FusionBench's of the same numbers."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("fusion_bench", reason="a host, of the extra [hosts]")

from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.tall_mask import utils as of_host
from fusion_bench.utils import state_dict_to_vector, vector_to_state_dict

import nlm
from nlm.merge import gram_matrices, regmean, tall_masks
from nlm.ops.tall_mask import unpack

pytestmark = pytest.mark.host


def test_regmean_is_the_hosts() -> None:
    """The host's least squares of the same Gram matrices, at any factor on their other entries."""
    make = torch.Generator().manual_seed(0)
    experts, grams = {}, {}
    for seed, task in enumerate("abc"):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)).double()
        experts[task] = model
        mixed = torch.randn(12, 12, generator=make, dtype=torch.float64)
        x = torch.randn(60, 12, generator=make, dtype=torch.float64) @ mixed
        grams[task] = gram_matrices(model, [x])
    entries = {n: [m.state_dict()[n] for m in experts.values()] for n in model.state_dict()}
    theirs = [{n.removesuffix(".weight"): g for n, g in own.items()} for own in grams.values()]
    for alpha in (0.0, 0.5, 0.9):
        # What the host multiplies the diagonal by is 1, in float32; the others by alpha.
        expected = merging_with_regmean_weights(entries, theirs, alpha)
        found = regmean(experts, grams=grams, alpha=alpha)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def models(count: int) -> list[dict[str, torch.Tensor]]:
    """A base and experts around it, in float64, named in the order in which the host sorts."""
    make = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (30, 7), "b.bias": (30,), "c.weight": (5, 30)}
    base = {
        name: torch.randn(shape, generator=make, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    moved = [
        {n: x + 0.1 * torch.randn(x.shape, generator=make, dtype=x.dtype) for n, x in base.items()}
        for _ in range(count)
    ]
    return [base, *moved]


def test_fisher_averaging_is_the_hosts() -> None:
    """Of the same Fisher information, far above what the floor of either is."""
    _, *states = models(3)
    make = torch.Generator().manual_seed(1)
    fishers = [
        {n: torch.rand(x.shape, generator=make, dtype=x.dtype) + 0.1 for n, x in state.items()}
        for state in states
    ]
    entries = {name: [state[name] for state in states] for name in states[0]}
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expected = merging_with_fisher_weights(
        entries, fishers, weights, normalize_fisher_weight=False, minimal_fisher_weight=0.0
    )
    found = nlm.merge(
        dict(zip("abc", states, strict=True)), method="fisher", floor=1e-9,
        weights=dict(zip("abc", weights.tolist(), strict=True)),
        fishers=dict(zip("abc", fishers, strict=True)),
    )  # fmt: skip
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("agreement", [1, 2, 3, 4])
def test_tall_masks_and_their_consensus_are_the_hosts(
    agreement: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *states = models(4)
    experts = dict(zip("abcd", states, strict=True))
    start, *vectors = (state_dict_to_vector(each) for each in (base, *states))
    tuned = torch.stack(vectors)
    masks = of_host.generate_task_masks(tuned - start, tuned, start, tall_mask_lambda=0.4)
    theirs = {
        task: vector_to_state_dict(mask, copy.deepcopy(base))
        for task, mask in zip(experts, masks, strict=True)
    }
    whole = nlm.merge(experts, base, "task_arithmetic", scale=1.0)
    own = tall_masks(experts, base, whole, 0.4)
    for task, mask in theirs.items():
        for name, expected in mask.items():
            found = unpack(own[task][name], expected.shape)
            assert torch.equal(found, expected.bool()), (task, name)
    monkeypatch.setattr(of_host, "load_tall_mask", lambda *_: theirs)
    kept = vector_to_state_dict(
        of_host.construct_consensus_mask(base, agreement, None), copy.deepcopy(base)
    )
    merged = nlm.merge(
        experts, base, "consensus", agreement=agreement, mask_threshold=0.4, scale=0.3
    )
    for name, origin in base.items():
        moved = origin + 0.3 * sum(state[name] - origin for state in states)
        expected = torch.where(kept[name].bool(), moved, origin)
        torch.testing.assert_close(merged[name], expected, rtol=1e-13, atol=1e-14)
        assert torch.equal(merged[name] == origin, expected == origin)
    assert {True, False} == {bool(each) for each in kept["a.weight"].flatten()} or agreement == 1
