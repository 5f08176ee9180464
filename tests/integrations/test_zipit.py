"""ZipIt's contract, on metrics of random features and of two real networks."""

import math

import pytest
import torch
from _networks import mlp, vectors
from torch import Tensor

from nlm.integrations.zipit import match_tensors_nlm, match_tensors_nlm_zip
from nlm.statistics import CrossMoments

FUNCTIONS = (match_tensors_nlm, match_tensors_nlm_zip)


def covariance(features: Tensor) -> dict[str, Tensor]:
    """As ZipIt's CovarianceMetric has it: of features [units, samples], in float32."""
    mean = features.mean(1)
    return {"covariance": features @ features.T / features.shape[1] - torch.outer(mean, mean)}


def features(models: int, units: int, noise: float = 0.05, seed: int = 0) -> tuple[Tensor, list]:
    """[models * units, 400]: of every model the units of the first, in an order, with noise."""
    make = torch.Generator().manual_seed(seed)
    first = torch.randn(units, 400, generator=make)
    orders = [torch.randperm(units, generator=make) for _ in range(models)]
    orders[0] = torch.arange(units)
    scales = 10 ** torch.randn(models, units, 1, generator=make)
    every = [
        scale * (first[order] + noise * torch.randn(first.shape, generator=make))
        for order, scale in zip(orders, scales, strict=True)
    ]
    return torch.cat(every), orders


@pytest.mark.parametrize("models", [2, 3, 4])
@pytest.mark.parametrize("match", FUNCTIONS)
def test_planted_orders_come_back(match, models: int) -> None:
    """By both functions; a unit and its copies in the other models are one."""
    found, orders = features(models, 11)
    metric = covariance(found)
    before = metric["covariance"].clone()
    merge, unmerge = match(metric, 1 - 1 / models, prune_threshold=0.0)
    assert torch.equal(metric["covariance"], before)
    assert merge.shape == (11, 11 * models) and unmerge.shape == (11 * models, 11)
    assert merge.dtype == unmerge.dtype == torch.float32
    for part, own in zip(merge.chunk(models, 1), orders, strict=True):
        expected = torch.zeros(11, 11)
        expected[own, torch.arange(11)] = 1 / models
        torch.testing.assert_close(part, expected)
    assert torch.equal(unmerge, (merge.T > 0).float())


@pytest.mark.parametrize("match", FUNCTIONS)
@pytest.mark.parametrize("r", [0.5, 2 / 3, 0.0])
def test_merges_are_means_and_unmerges_say_where(match, r: float) -> None:
    make = torch.Generator().manual_seed(1)
    metric = covariance(torch.randn(12, 100, generator=make))
    merge, unmerge = match(metric, r)
    left = round(12 * (1 - r))
    assert merge.shape == (left, 12) and unmerge.shape == (12, left)
    assert torch.equal(unmerge.sum(1), torch.ones(12)) and bool((unmerge.sum(0) > 0).all())
    torch.testing.assert_close(merge @ unmerge, torch.eye(left))
    torch.testing.assert_close(merge.sum(1), torch.ones(left))
    biased = match(metric, r, add_bias=True)
    models = round(1 / (1 - r))
    assert torch.equal(biased[0], merge)
    assert biased[1].shape == (12 + models, left + 1)
    for part, own in zip(biased[1].chunk(models), unmerge.chunk(models), strict=True):
        assert torch.equal(part[:-1, :-1], own)
        assert float(part[-1, -1]) == 1 and float(part.sum() - own.sum()) == 1


def test_the_assignment_is_the_best_one() -> None:
    """Against all orders of six units."""
    from itertools import permutations

    make = torch.Generator().manual_seed(2)
    metric = covariance(torch.randn(12, 50, generator=make))
    *_, value = match_tensors_nlm(metric, get_merge_value=True)
    scale = metric["covariance"].diagonal().rsqrt()
    block = (metric["covariance"] * scale[:, None] * scale)[:6, 6:]
    best = max(float(block[torch.arange(6), list(p)].mean()) for p in permutations(range(6)))
    assert value == pytest.approx(best, abs=1e-6)


def test_units_of_one_model_are_zipped() -> None:
    """Where two units of a model are one and the same, and the rest have nothing in common."""
    make = torch.Generator().manual_seed(3)
    found = torch.randn(8, 2000, generator=make)
    found[2], found[7] = 3 * found[0], 0.5 * found[6]
    found[5], found[4] = found[1] + 5, 2 * found[3]
    *_, unmerge, value = match_tensors_nlm_zip(covariance(found), get_merge_value=True)
    together = {tuple(unmerge[:, column].nonzero().flatten().tolist()) for column in range(4)}
    assert together == {(0, 2), (1, 5), (3, 4), (6, 7)}
    assert value == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("match", FUNCTIONS)
def test_cosines_are_taken_as_they_are(match) -> None:
    found, _ = features(2, 7)
    cosine = torch.nn.functional.normalize(found, dim=1)
    one = match({"cossim": cosine @ cosine.T})
    other = match(covariance(found - found.mean(1, keepdim=True)))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("match", FUNCTIONS)
def test_dead_units_correlate_with_nothing(match) -> None:
    """One constant, one of a negative variance as sums in float32 make it."""
    found, _ = features(2, 9)
    metric = covariance(found)
    for unit, variance in ((3, 0.0), (12, -1e-3)):
        metric["covariance"][unit] = metric["covariance"][:, unit] = 0.0
        metric["covariance"][unit, unit] = variance
    for each in match(metric):
        assert bool(each.isfinite().all())


def test_two_networks_are_one_function_where_they_are_one() -> None:
    """The host's use of the matrices: rows are merged, the next layer's columns unmerged."""
    net, x = mlp(0).double(), vectors().double()
    make = torch.Generator().manual_seed(0)
    order = torch.randperm(24, generator=make)
    one, two = ({n: p.clone() for n, p in net.state_dict().items()} for _ in range(2))
    two["0.weight"], two["0.bias"] = one["0.weight"][order], one["0.bias"][order]
    two["2.weight"] = one["2.weight"][:, order]
    hidden = net[:2](x)
    moments = CrossMoments.zeros(48)
    moments.update(torch.cat([hidden, hidden[:, order]], 1))
    for match in FUNCTIONS:
        merge, unmerge = match({"covariance": moments.comoment / len(x)})
        parts = zip(merge.chunk(2, 1), unmerge.chunk(2), (one, two), strict=True)
        merged = {name: torch.zeros_like(p) for name, p in one.items()}
        for to, back, state in parts:
            to, back = to.double(), back.double()
            merged["0.weight"] += to @ state["0.weight"]
            merged["0.bias"] += to @ state["0.bias"]
            merged["2.weight"] += state["2.weight"] @ back / 2
            for name in ("2.bias", "4.weight", "4.bias"):
                merged[name] += state[name] / 2
        both = mlp(0).double()
        both.load_state_dict(merged)
        torch.testing.assert_close(both(x), net(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("match", FUNCTIONS)
@pytest.mark.parametrize(
    ("metric", "r", "error", "says"),
    [
        ({"mean": torch.ones(4)}, 0.5, ValueError, "'covariance' or 'cossim', got 'mean'"),
        ({"covariance": torch.ones(4, 3)}, 0.5, ValueError, "square matrix .* got \\[4, 3\\]"),
        (
            {"covariance": torch.ones(4, 4, dtype=int)},
            0.5,
            TypeError,
            "float type, got torch.int64",
        ),
        ({"cossim": torch.full((4, 4), math.nan)}, 0.5, ValueError, "got 16 NaN or inf of 16"),
        ({"covariance": torch.eye(5)}, 0.5, ValueError, "got 5 units of 2 models"),
        ({"covariance": torch.eye(4)}, 1.0, ValueError, r"lies in \[0, 1\), got 1.0"),
    ],
)
def test_bad_metrics_are_refused(match, metric: dict, r: float, error: type, says: str) -> None:
    with pytest.raises(error, match=f"^nlm.integrations.zipit: .*{says}"):
        match(metric, r)
