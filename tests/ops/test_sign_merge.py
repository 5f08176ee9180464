"""sign_merge beyond the rules of all operators."""

import math

import numpy as np
import pytest
import torch

from nlm.ops import magnitude_threshold, sign_merge
from nlm.ops.sign_merge import DIALECTS


def merged(base: list[float], *experts: list[float], threshold: float = 0.0, **options: object):
    """One tensor, as a list of numbers."""
    models = [[torch.tensor(expert)] for expert in experts]
    limits = torch.full((len(models),), threshold)
    return sign_merge([torch.tensor(base)], models, limits, **options)[0].tolist()


def test_the_papers_figure() -> None:
    """Trim, elect, merge: by hand, with the thresholds that keep two of five."""
    base = [torch.zeros(5)]
    experts = [[torch.tensor([4.0, -3, 0.5, 0, 1])], [torch.tensor([2.0, 1, -4, 0.1, 3])]]
    limits = torch.stack([magnitude_threshold(x, 2) for x in experts])
    assert limits.tolist() == [3, 3]
    assert sign_merge(base, experts, limits)[0].tolist() == [4, -3, -4, 0, 3]
    untrimmed = sign_merge(base, experts, torch.zeros(2), scale=2.0)[0]
    torch.testing.assert_close(untrimmed, torch.tensor([6, -6, -8, 0.2, 4]))


def test_dialects_by_hand() -> None:
    experts = [1.0, -6.0], [3.0, 2.0]
    weights = {"weights": [3.0, 1.0]}
    # votes 6 and -16: means of 3, 3 and of -18 alone
    assert merged([0.0, 0.0], *experts, **weights) == [3.0, -18.0]
    # divided by the weights that agree
    assert merged([0.0, 0.0], *experts, dialect="mergekit", **weights) == [1.5, -6.0]
    # not divided
    assert merged([0.0, 0.0], *experts, dialect="mergekit_sum", **weights) == [6.0, -18.0]
    assert merged([0.0], [1.0], [2.0], dialect="mergekit_sum") == [3.0]
    # the votes are not weighted
    assert merged([0.0, 0.0], *experts, dialect="peft", **weights) == [3.0, -18.0]
    assert merged([0.0], [1.0], [-2.0], weights=[3.0, 1.0], dialect="peft") == [-2.0]
    assert merged([0.0], [1.0], [-2.0], weights=[3.0, 1.0]) == [3.0]


@pytest.mark.parametrize(("rest", "expected"), [([5.0], 2.0), ([-5.0], -2.0), ([0.0], 2.0)])
def test_a_tie_follows_the_majority_of_all_entries(rest: list[float], expected: float) -> None:
    """The majority lies in another tensor of the list."""
    base = [torch.zeros(1), torch.zeros(1)]
    experts = [
        [torch.tensor([2.0]), torch.tensor(rest)],
        [torch.tensor([-2.0]), torch.tensor(rest)],
    ]
    whole = sign_merge(base, experts, torch.zeros(2))
    assert [x.item() for x in whole] == [expected, rest[0]]
    for dialect in ("mergekit", "peft", "mergekit_sum"):
        assert sign_merge(base, experts, torch.zeros(2), dialect=dialect)[0].item() == 2.0


def test_the_list_is_many_tensors_one_by_one_but_for_ties() -> None:
    make = torch.Generator().manual_seed(0)
    base = [torch.randn(n, generator=make) for n in (5, 0, 70_001)]
    experts = [[torch.randn(x.shape, generator=make) for x in base] for _ in range(3)]
    limits = torch.tensor([0.1, 0.5, 1.0])
    for dialect in DIALECTS:
        together = sign_merge(base, experts, limits, [1, 2, 0.5], 0.3, dialect)
        for t, result in enumerate(together):
            alone = sign_merge(
                base[t : t + 1], [x[t : t + 1] for x in experts], limits, [1, 2, 0.5], 0.3, dialect
            )
            assert torch.equal(result, alone[0])


def test_against_numpy() -> None:
    random = np.random.default_rng(0)
    base, experts = random.normal(size=999), random.normal(size=(4, 999))
    limits, weights = np.array([0.2, 0.5, 1.0, 2.0]), np.array([1.0, 0.5, 2.0, 1.0])
    difference = experts - base
    kept = np.where(np.abs(difference) >= limits[:, None], difference, 0) * weights[:, None]
    sign = np.sign(kept.sum(0))
    agrees = (np.sign(kept) == sign) & (kept != 0)
    expected = base + 0.3 * (kept * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    found = sign_merge(
        [torch.from_numpy(base)],
        [[torch.from_numpy(x)] for x in experts],
        torch.from_numpy(limits),
        weights.tolist(),
        0.3,
    )
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-13)


def test_the_threshold_itself_is_kept_in_any_mix_of_types() -> None:
    """A float64 threshold between two float32 numbers trims the lower one alone."""
    low = torch.tensor([1.0])
    high = torch.nextafter(low, torch.tensor([2.0]))
    between = (low.double() + high.double()) / 2
    zero = [torch.zeros(1)]
    assert sign_merge(zero, [[low]], between)[0].item() == 0
    assert sign_merge(zero, [[high]], between)[0].item() == high.item()
    assert sign_merge(zero, [[low]], low)[0].item() == 1


def test_nan_and_infinity_are_not_hidden() -> None:
    inf, nan = math.inf, math.nan
    found = merged([0.0] * 4, [nan, inf, inf, 1.0], [1.0, 1.0, -inf, 2.0], threshold=0.5)
    assert np.isnan(found[0]) and found[1] == inf and np.isnan(found[2]) and found[3] == 1.5


def test_types_and_layouts_are_the_bases() -> None:
    base = torch.ones(6, 4, dtype=torch.bfloat16).T
    (found,) = sign_merge([base], [[torch.full((4, 6), 3.0)]], torch.zeros(1), scale=0.5)
    assert found.dtype == torch.bfloat16 and found.shape == (4, 6) and found.is_contiguous()
    assert (found == 2).all()
    assert sign_merge([], [[]], torch.zeros(1)) == []


def test_no_gradient_reaches_the_experts() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not sign_merge([x], [[2 * x]], torch.zeros(1))[0].requires_grad
