"""slerp and Model Stock: their geometry, and mergekit's formulas written once more in numpy."""

import math

import numpy as np
import pytest
import torch
from _networks import mlp

import nlm
from nlm._coefficients import model_stock, slerp


def states(*seeds: int) -> list[dict[str, torch.Tensor]]:
    return [mlp(seed).state_dict() for seed in seeds]


def _slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """mergekit's ``slerp``, in numpy."""
    norms = [np.linalg.norm(x) for x in (a, b)]
    first, second = (norm if norm > 1e-8 else 1 for norm in norms)
    dot = np.clip((a / first * (b / second)).sum(), -1, 1)
    if abs(dot) > 0.9995:
        return (1 - t) * a + t * b
    theta = np.arccos(dot)
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def _model_stock(base: np.ndarray, experts: list[np.ndarray]) -> np.ndarray:
    """mergekit's ``model_stock``, in numpy."""
    offsets = [(x - base).ravel() for x in experts]
    cosines = []
    for i, x in enumerate(offsets):
        for y in offsets[i + 1 :]:
            norms = np.linalg.norm(x) * np.linalg.norm(y)
            cosines.append(np.clip((x * y).sum() / max(norms, 1e-6), -1, 1))
    cosine, count = np.mean(cosines), len(experts)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum(experts) / count + (1 - t) * base


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_mergekits(t: float) -> None:
    a, b = states(0, 1)
    merged = nlm.merge({"a": a, "b": b}, method="slerp", t=t)
    for name in a:
        expected = _slerp(a[name].double().numpy(), b[name].double().numpy(), t)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-7)


def test_slerp_keeps_the_length_and_is_linear_for_one_direction() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    merged = nlm.merge({"a": {"w": a}, "b": {"w": b}}, method="slerp", t=1 / 3)["w"]
    expected = 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    torch.testing.assert_close(merged, expected)
    for factor in (3.0, -3.0):
        merged = nlm.merge({"a": {"w": a}, "b": {"w": factor * a}}, method="slerp", t=0.25)["w"]
        assert merged.tolist() == [2 * (0.75 + 0.25 * factor), 0]


@pytest.mark.parametrize("count", [2, 4])
def test_model_stock_is_mergekits(count: int) -> None:
    base, *others = states(*range(count + 1))
    # half of each task vector is one for all, so that the cosines are near 1/2
    shift = states(99)[0]
    experts = {
        str(k): {name: base[name] + 0.1 * (shift[name] + x[name]) for name in base}
        for k, x in enumerate(others)
    }
    merged = nlm.merge(experts, base, "model_stock")
    for name, start in base.items():
        each = [state[name].double().numpy() for state in experts.values()]
        expected = _model_stock(start.double().numpy(), each)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-7)


def test_coefficients_at_their_limits() -> None:
    assert slerp([[1, 0.99951], [0.99951, 1]], 0.25) == (0.75, 0.25)
    assert slerp([[1, -1], [-1, 1]], 0.25) == (0.75, 0.25)
    assert slerp([[0, 0], [0, 4]], 0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert slerp(np.array([[4, 0], [0, 9]]), 1.0) == pytest.approx((0, 1), abs=1e-15)
    assert model_stock([[1, 0], [0, 1]]) == 0
    assert model_stock([[4, 4], [4, 4]]) == 1
    assert model_stock([[1, -1], [-1, 1]]) == 0  # singular
    assert model_stock([[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]]) == pytest.approx(0.75)
    assert model_stock([[1e-16, 1e-16], [1e-16, 1e-16]]) == pytest.approx(2e-10)  # still


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {"method": "slerp"}, "'slerp' merges two experts, got 3"),
        (1, {"method": "model_stock"}, "'model_stock' merges two experts or more, got 1"),
        (2, {"method": "slerp", "weights": {"0": 1, "1": 2}}, "weights is an option of linear, "),
        (2, {"method": "model_stock", "scale": 0.5}, "scale is an option of task_arithmetic, "),
        (2, {"method": "linear", "t": 0.4}, "t is an option of slerp, got 0.4 for 'linear'"),
    ],
)
def test_bad_options(count: int, options: dict, message: str) -> None:
    experts = {str(seed): mlp(seed) for seed in range(count)}
    with pytest.raises(ValueError, match=message):
        nlm.merge(experts, mlp(9), **options)
