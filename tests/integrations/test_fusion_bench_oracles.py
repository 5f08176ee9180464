"""Results of nlm beside FusionBench's of the same numbers."""

import pytest
import torch
from torch import nn

pytest.importorskip("fusion_bench", reason="a host, of the extra [hosts]")

from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

from nlm.merge import gram_matrices, regmean

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
