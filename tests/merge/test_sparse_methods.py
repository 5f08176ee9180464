"""Breadcrumbs, DELLA, SCE and task negation against their formulas, written once more in numpy."""

import hashlib

import numpy as np
import pytest
import torch
from _networks import mlp
from scipy import stats

import nlm
from nlm._sparse import Total, kth_largest
from nlm.ops.dare import random_words

WEIGHTS = {"a": 1.0, "b": 0.5, "c": -0.7}
BASE = mlp(9).double().state_dict()
EXPERTS = {task: mlp(seed).double().state_dict() for seed, task in enumerate(WEIGHTS)}


def vectors(name: str) -> list[np.ndarray]:
    return [(state[name] - BASE[name]).numpy() for state in EXPERTS.values()]


def elected(left: list[np.ndarray]) -> np.ndarray:
    """The mean of mergekit's dialect, untrimmed."""
    weighted = [w * vector for w, vector in zip(WEIGHTS.values(), left, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1, -1)
    agrees = [np.sign(each) == sign for each in weighted]
    below = sum(w * each for w, each in zip(WEIGHTS.values(), agrees, strict=True))
    total = sum(each * own for each, own in zip(weighted, agrees, strict=True))
    return total / np.where(below == 0, 1, below)


def close(merged, name: str, direction: np.ndarray, scale: float = 0.7) -> None:
    expected = BASE[name].numpy() + scale * direction
    np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-9, atol=1e-12)


def crumbs(vector: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """By sorting: behind the largest gamma n entries, the next density n."""
    order = np.argsort(-np.abs(vector), axis=None)
    kept = int(density * vector.size)
    first = min(int(gamma * vector.size), vector.size - kept)
    found = np.zeros(vector.size)
    found[order[first : first + kept]] = vector.reshape(-1)[order[first : first + kept]]
    return found.reshape(vector.shape)


@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (0.9, 0.2), (0.5, 0.0), (0.01, 0.5)])
def test_breadcrumbs(density: float, gamma: float) -> None:
    given = {"density": density, "gamma": gamma, "scale": 0.7, "weights": WEIGHTS}
    summed = nlm.merge(EXPERTS, BASE, "breadcrumbs", **given)
    voted = nlm.merge(EXPERTS, BASE, "breadcrumbs_ties", dialect="mergekit", **given)
    for name in BASE:
        left = [crumbs(vector, density, gamma) for vector in vectors(name)]
        close(summed, name, sum(w * x for w, x in zip(WEIGHTS.values(), left, strict=True)))
        close(voted, name, elected(left))


def test_entries_of_one_size_are_kept_together_or_not_at_all() -> None:
    base, expert = {"w": torch.zeros(6)}, {"w": torch.tensor([3.0, 2.0, -2.0, 2.0, 1.0, 0.5])}
    given = {"density": 0.5, "gamma": 0.2}
    assert nlm.merge({"t": expert}, base, "breadcrumbs", **given)["w"].tolist() == [
        0, 2, -2, 2, 0, 0
    ]  # fmt: skip
    given["gamma"] = 0.4
    assert nlm.merge({"t": expert}, base, "breadcrumbs", **given)["w"].tolist() == [
        0, 0, 0, 0, 1, 0
    ]  # fmt: skip


def pruned(task: str, name: str, density: float, epsilon: float, rescale: str) -> np.ndarray:
    """MagPrune by a stable sort of each row; what a seed means must not change."""
    digest = hashlib.sha256(f"3\0{task}\0{name}".encode()).digest()
    vector = (EXPERTS[task][name] - BASE[name]).numpy()
    rows = vector.reshape(len(vector) if vector.ndim > 1 else 1, -1)
    key, device = int.from_bytes(digest[:8], "little") // 2, torch.device("cpu")
    words = random_words(key, 0, rows.size, device).numpy().reshape(rows.shape)
    shares = np.linspace(density - epsilon, density + epsilon, rows.shape[1])
    found = np.zeros_like(rows)
    for row, order in enumerate(np.argsort(np.abs(rows), axis=1, kind="stable")):
        for rank, place in enumerate(order):
            if words[row, rank] / 2**32 >= 1 - shares[rank]:
                factor = 1 / shares[rank] if rescale == "expected" else 1.0
                found[row, place] = factor * rows[row, place]
    if rescale == "l1":
        found *= np.abs(rows).sum() / (np.abs(found).sum() or 1)
    return found.reshape(vector.shape)


@pytest.mark.parametrize("rescale", ["expected", "l1", "none"])
def test_della(rescale: str) -> None:
    given = {"density": 0.4, "epsilon": 0.3, "seed": 3, "rescale": rescale, "scale": 0.7}
    summed = nlm.merge(EXPERTS, BASE, "della_linear", weights=WEIGHTS, **given)
    voted = nlm.merge(EXPERTS, BASE, "della", weights=WEIGHTS, dialect="mergekit", **given)
    for name in BASE:
        left = [pruned(task, name, 0.4, 0.3, rescale) for task in EXPERTS]
        close(summed, name, sum(w * x for w, x in zip(WEIGHTS.values(), left, strict=True)))
        close(voted, name, elected(left))


def test_della_keeps_by_rank_and_keeps_the_expected_value() -> None:
    rows, length = 4000, 6
    base = {"w": torch.zeros(rows, length)}
    expert = {"w": torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) + 0.5}
    given = {"density": 0.5, "epsilon": 0.3, "seed": 1}
    kept = nlm.merge({"t": expert}, base, "della_linear", rescale="none", **given)["w"] != 0
    order = expert["w"].argsort(1)
    counts = kept.gather(1, order).sum(0).numpy()
    for count, share in zip(counts, np.linspace(0.2, 0.8, length), strict=True):
        assert stats.binomtest(int(count), rows, share).pvalue > 1e-4
    whole = nlm.merge({"t": expert}, base, "della_linear", **given)["w"]
    assert abs(float(whole.mean() / expert["w"].mean()) - 1) < 0.03


def test_della_is_drawn_alike_whoever_else_is_there() -> None:
    one = {"2.weight": BASE["2.weight"]}
    alone = nlm.merge({"a": {n: EXPERTS["a"][n] for n in one}}, one, "della_linear", seed=1)
    others = dict.fromkeys(EXPERTS, 0.0) | {"a": 1.0}
    turned = dict(reversed(BASE.items()))
    whole = nlm.merge(EXPERTS, turned, "della_linear", seed=1, weights=others)
    assert torch.equal(alone["2.weight"], whole["2.weight"])
    other = nlm.merge({"a": EXPERTS["a"]}, BASE, "della_linear", seed=2)
    assert not torch.equal(alone["2.weight"], other["2.weight"])


@pytest.mark.parametrize("select", [1.0, 0.4, 0.001])
def test_sce(select: float) -> None:
    merged = nlm.merge(EXPERTS, BASE, "sce", select=select, scale=0.7)
    for name in BASE:
        stacked = np.stack(vectors(name))
        spread = stacked.var(0)
        if select < 1:
            kept = int(select * np.count_nonzero(spread))
            least = np.sort(spread, axis=None)[-kept] if kept else np.inf
            stacked = stacked * (spread >= least)
        squares = (stacked**2).reshape(len(stacked), -1).sum(1)
        share = squares / squares.sum() if squares.sum() else np.full(3, 1 / 3)
        share = share.reshape(-1, *[1] * (stacked.ndim - 1))
        agrees = np.sign(stacked) == np.where(stacked.sum(0) >= 0, 1, -1)
        below = (share * agrees).sum(0)
        close(merged, name, (share * agrees * stacked).sum(0) / np.where(below, below, 1))


def test_negation_takes_the_task_vector_away() -> None:
    """A negative scale, or a negative weight, goes to the other side of the base."""
    expert = {"a": EXPERTS["a"]}
    forgot = nlm.merge(expert, BASE, "task_arithmetic", scale=-0.7)
    same = nlm.merge(expert, BASE, "task_arithmetic", scale=0.7, weights={"a": -1.0})
    for name in BASE:
        close(forgot, name, -(EXPERTS["a"][name] - BASE[name]).numpy())
        assert torch.equal(forgot[name], same[name])
    both = nlm.merge({**expert, "b": EXPERTS["a"]}, BASE, weights={"a": 1.0, "b": -1.0})
    assert all(torch.equal(both[name], BASE[name]) for name in BASE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_kth_largest_is_found_in_chunks(dtype) -> None:
    values = np.abs(np.random.default_rng(1).standard_normal(900)).astype(dtype) ** 8
    values[:200], values[200:230] = 0, values[777]
    parts = np.split(values, [64, 640])
    for share in (1.0, 0.5, 0.013, 1 / 700):
        kept = int(share * 700)
        assert kth_largest(lambda: parts, share, values.dtype) == np.sort(values)[-kept]
    assert kth_largest(lambda: parts, 0.0001, values.dtype) == np.inf


@pytest.mark.parametrize("power", [1, 2])
def test_a_sum_does_not_depend_on_its_chunks(power: int) -> None:
    values = np.random.default_rng(2).standard_normal(150_000) * np.geomspace(1, 1e9, 150_000)
    whole = Total(power)
    whole.add(values)
    for size in (64 * 7, 192 * 200, 131_072):
        other = Total(power)
        for begin in range(0, len(values), size):
            other.add(values[begin : begin + size])
        assert other.value == whole.value
    np.testing.assert_allclose(whole.value, (np.abs(values) ** power).sum(), rtol=1e-12)
