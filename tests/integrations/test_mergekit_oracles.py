"""nlm.merge beside the host's methods, on single tensors: the same, or the same in distribution."""

from importlib.util import find_spec
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

pytest.importorskip("mergekit", reason="a host, of the extra [hosts]")

from mergekit.merge_methods import merge_tensors

import nlm

pytestmark = pytest.mark.host

WEIGHTS = {"a": 0.7, "b": 0.3, "c": -0.2}


def models(*shape: int, size: float = 0.1) -> tuple[dict[str, Tensor], dict[str, dict]]:
    make = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=make, dtype=torch.float64)
    experts = {
        task: {"w": base + size * torch.randn(shape, generator=make, dtype=torch.float64)}
        for task in WEIGHTS
    }
    return {"w": base}, experts


def host(method: str, base: dict, experts: dict, **parameters) -> Tensor:
    tensors = [base["w"], *(state["w"] for state in experts.values())]
    return merge_tensors(tensors, method, parameters=parameters, base_index=0)


def test_means_and_ties() -> None:
    base, experts = models(64, 33)
    tensors = [state["w"] for state in experts.values()]
    weights = [*WEIGHTS.values()]
    found = nlm.merge(experts, method="linear", weights=WEIGHTS)["w"]
    expected = merge_tensors(tensors, "linear", parameters={"weight": weights})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pair = {task: experts[task] for task in "ab"}
    found = nlm.merge(pair, method="slerp", t=0.3)["w"]
    expected = merge_tensors(tensors[:2], "slerp", parameters={"t": 0.3}, base_index=0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found = nlm.merge(experts, base, "model_stock")["w"]
    torch.testing.assert_close(found, host("model_stock", base, experts), rtol=1e-9, atol=1e-9)
    given = {"weights": WEIGHTS, "density": 0.4, "dialect": "mergekit"}
    found = nlm.merge(experts, base, "ties", **given)["w"]
    expected = host("ties", base, experts, weight=weights, density=0.4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("density", [0.3, 0.97])
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(name: str, density: float) -> None:
    base, experts = models(64, 33)
    more = {"dialect": "mergekit_sum"} if name.endswith("ties") else {}
    given = {"density": density, "gamma": 0.05}
    found = nlm.merge(experts, base, name, scale=0.6, weights=WEIGHTS, **given, **more)["w"]
    expected = host(name, base, experts, weight=[*WEIGHTS.values()], **given, **{"lambda": 0.6})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("select", [1.0, 0.3])
def test_sce(select: float) -> None:
    """Of task vectors so large that the host weighs them."""
    base, experts = models(40, 17, size=1.0)
    found = nlm.merge(experts, base, "sce", select=select)["w"]
    expected = host("sce", base, experts, select_topk=select)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_host_weighs_small_task_vectors_alike() -> None:
    """What the page of the methods says of it: below 1e-6 in the mean its weights are equal."""
    base, experts = models(40, 17, size=1e-4)
    experts["a"]["w"] = base["w"] + 3 * (experts["a"]["w"] - base["w"])
    found = nlm.merge(experts, base, "sce")["w"]
    expected = host("sce", base, experts)
    assert float((found - base["w"]).norm()) > 1.2 * float((expected - base["w"]).norm())


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_in_distribution(name: str) -> None:
    """How often each rank of a row is kept, and the norm that is given back."""
    rows, length = 6000, 6
    base = {"w": torch.zeros(rows, length)}
    vector = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) + 0.5
    given = {"density": 0.5, "epsilon": 0.3}
    more = {"dialect": "mergekit"} if name == "della" else {}
    ours = nlm.merge({"t": {"w": vector}}, base, name, seed=0, rescale="l1", **given, **more)["w"]
    torch.manual_seed(0)
    theirs = host(name, base, {"t": {"w": vector}}, weight=1.0, normalize=False, **given)
    order = vector.argsort(1)
    for found in (ours, theirs):
        counts = (found != 0).gather(1, order).sum(0).numpy()
        for count, share in zip(counts, np.linspace(0.2, 0.8, length), strict=True):
            assert stats.binomtest(int(count), rows, share).pvalue > 1e-4
        torch.testing.assert_close(found.abs().sum(), vector.abs().sum(), rtol=1e-4, atol=0)


def test_negation() -> None:
    base, experts = models(30, 9)
    found = nlm.merge(experts, base, scale=-0.5, weights=WEIGHTS)["w"]
    given = {"weight": [*WEIGHTS.values()], "lambda": -0.5}
    expected = host("task_arithmetic", base, experts, **given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_negation_and_ties_of_peft() -> None:
    folder = find_spec("peft").submodule_search_locations[0]  # the package takes 7 s to import
    merge_utils = SimpleNamespace(**run_path(f"{folder}/utils/merge_utils.py"))
    base, experts = models(30, 9)
    vectors = [state["w"] - base["w"] for state in experts.values()]
    weights = torch.tensor([*WEIGHTS.values()], dtype=torch.float64)
    found = nlm.merge(experts, base, scale=-0.5, weights=WEIGHTS)["w"] - base["w"]
    torch.testing.assert_close(found, -0.5 * merge_utils.task_arithmetic(vectors, weights))
    found = nlm.merge(experts, base, "ties", density=1.0, dialect="peft", weights=WEIGHTS)["w"]
    expected = merge_utils.ties(vectors, weights, 1.0, "total")
    torch.testing.assert_close(found - base["w"], expected, rtol=1e-9, atol=1e-12)
