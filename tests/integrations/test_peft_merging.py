"""PEFT's functions for merging beside nlm's, and beside each other in add_weighted_adapter."""

from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor

from nlm.integrations import peft as on_nlm

SENTENCE = (
    "nlm.integrations.peft: the host must be peft>=0.21,<0.22, got {}: "
    "pip install 'peft>=0.21,<0.22'"
)


@pytest.mark.parametrize("version", ["0.20.3", "0.22.0"])
def test_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    folder = tmp_path / f"peft-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError) as error:
        on_nlm.use_as_default().__enter__()
    assert str(error.value) == SENTENCE.format(version)


def test_a_missing_host_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ImportError) as error:
        on_nlm.use_as_default().__enter__()
    assert str(error.value) == SENTENCE.format("no such package")


merge_utils = pytest.importorskip("peft", reason="a host, of the extra [hosts]").utils.merge_utils
host_only = pytest.mark.host

SAME = ("task_arithmetic", "magnitude_prune", "ties")
RANDOM = ("dare_linear", "dare_ties")


def tensors(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    make = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=make).to(dtype) for _ in range(count)]


def arguments(name: str, density: float, method: str) -> tuple:
    return () if name == "task_arithmetic" else (density, method) if "ties" in name else (density,)


@host_only
@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("name", SAME)
def test_results_are_the_hosts(name: str, method: str) -> None:
    ours, host = getattr(on_nlm, name), getattr(merge_utils, name)
    for count, shape in ((1, (7,)), (2, (40, 9)), (3, (5, 4, 3, 3)), (4, (1001,))):
        given = tensors(count, *shape)
        before = [x.clone() for x in given]
        weights = torch.tensor([0.7, -0.3, 1.0, 0.2][:count])
        for density in (0.0, 0.3, 0.999):
            rest = arguments(name, density, method)
            found, expected = ours(given, weights, *rest), host(given, weights, *rest)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=3e-7, atol=3e-7)
            if count < 3:
                assert torch.equal(found, expected)
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@host_only
@pytest.mark.parametrize("name", SAME)
def test_types_are_the_hosts_and_narrow_ones_are_rounded_once(name: str) -> None:
    ours, host = getattr(on_nlm, name), getattr(merge_utils, name)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for of_weights in (torch.float32, dtype):
            given, weights = tensors(3, 30, 20, dtype=dtype), torch.tensor([0.5, 0.25, 1.0])
            weights, rest = weights.to(of_weights), arguments(name, 1.0 - 1e-9, "total")
            found, expected = ours(given, weights, *rest), host(given, weights, *rest)
            assert found.dtype == expected.dtype
            wide = host([x.double() for x in given], weights.double(), *rest)
            error, of_host = ((each - wide).abs().mean() for each in (found, expected))
            assert error <= of_host + 1e-12


@host_only
def test_entries_as_large_as_the_threshold_are_all_kept() -> None:
    given = [(x * 8).round() / 8 for x in tensors(2, 50, 40)]
    weights = torch.tensor([0.5, 0.3])
    found = on_nlm.magnitude_prune(given, weights, 0.3)
    expected = merge_utils.magnitude_prune(given, weights, 0.3)
    at_the_threshold = torch.zeros(50, 40, dtype=torch.bool)
    for x in given:
        at_the_threshold |= x.abs() == x.abs().flatten().sort(descending=True).values[599]
    differs = found != expected
    assert 0 < int(differs.sum()) < int(at_the_threshold.sum())
    assert not bool((differs & ~at_the_threshold).any())


@host_only
@pytest.mark.parametrize("name", RANDOM)
def test_what_is_drawn_is_the_hosts_in_distribution(name: str) -> None:
    """Counts of kept entries in blocks are binomial; what is kept is divided by the density."""
    vector, density, block = torch.rand(2**16, generator=torch.manual_seed(1)) + 0.5, 0.3, 64
    for function in (getattr(on_nlm, name), getattr(merge_utils, name)):
        torch.manual_seed(0)
        found = function([vector], torch.tensor([2.0]), density)
        kept = found != 0
        torch.testing.assert_close(found[kept], 2 * vector[kept] / density)
        counts = kept.view(-1, block).sum(1).bincount(minlength=block + 1).double().numpy()
        expected = stats.binom.pmf(range(block + 1), block, density) * counts.sum()
        often = expected >= 5
        observed = [*counts[often], counts[~often].sum()]
        wanted = [*expected[often], expected[~often].sum()]
        assert stats.chisquare(observed, wanted).pvalue > 1e-4, function


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_draws_again_and_tensors_are_drawn_apart(name: str) -> None:
    function, weights = getattr(on_nlm, name), torch.tensor([1.0, 10.0])
    given = [torch.ones(5000), torch.ones(5000)]
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(function(given, weights, 0.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(0)
    both = on_nlm.dare_linear(given, weights, 0.5)
    one, two = both % 20 != 0, both >= 20
    assert abs(float((one == two).float().mean()) - 0.5) < 0.04


def test_wrong_arguments_are_named() -> None:
    given, weights = tensors(2, 4), torch.tensor([1.0, 1.0])
    rule = r"nlm\.integrations\.peft: "
    with pytest.raises(ValueError, match=rule + "a density is at least 0, got -0.1"):
        on_nlm.ties(given, weights, -0.1)
    with pytest.raises(ValueError, match=rule + ".* has a positive one, got 0"):
        on_nlm.dare_ties(given, weights, 0)
    with pytest.raises(ValueError, match=rule + "the majority sign method .* got 'all'"):
        on_nlm.ties(given, weights, 0.5, "all")
    with pytest.raises(ValueError, match=rule + "there is at least one task tensor"):
        on_nlm.task_arithmetic([], weights)
    with pytest.warns(UserWarning, match="all entries are kept from a density of 1 on, got 1.5"):
        on_nlm.magnitude_prune(given, weights, 1.5)


@host_only
def test_the_host_calls_nlm_within_a_context_alone() -> None:
    from peft.tuners.lora import model

    names = [*SAME, *RANDOM]
    stock = [getattr(model, name) for name in names]
    with pytest.raises(KeyError), on_nlm.use_as_default():
        with on_nlm.use_as_default():
            pass
        assert [getattr(model, name) for name in names] == [getattr(on_nlm, n) for n in names]
        raise KeyError
    assert [getattr(model, name) for name in names] == stock
