"""The methods beside the host's own, on single tensors. The host is a real mergekit."""

import math
import threading
from collections.abc import Iterator

import pytest
import torch
from scipy import stats
from torch import Tensor

pytest.importorskip("mergekit", reason="a host, of the extra [hosts]")

from mergekit.merge_methods import get, merge_state_dicts, merge_tensors, registered_methods

from nlm.integrations import mergekit as on_nlm
from nlm.integrations.mergekit import methods

pytestmark = pytest.mark.host

EXACT = ("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")
NAMES = tuple(methods.KERNELS)


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    on_nlm.register()


def models(*shape: int, count: int = 4, seed: int = 0) -> list[Tensor]:
    """A base and what is fine-tuned from it; all in other layouts."""
    make = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=make)
    found = [base] + [base + 0.1 * torch.randn(shape, generator=make) for _ in range(count - 1)]
    if len(shape) == 2:
        found[1] = found[1].T.contiguous().T
        found[-1] = torch.stack([found[-1], found[-1]], -1)[..., 0]
    return found


def settings(name: str, count: int) -> Iterator[dict]:
    """Parameters of a method, the defaults first."""
    weights = [0.7, 0.3, -0.2, 1.1, 0.45][: count - 1]
    if name == "slerp":
        yield from ({"t": t} for t in (0.3, 0.0, 1.0))
    elif name == "linear":
        yield {"weight": [*weights, 0.6]}
        yield {"weight": 0.3, "normalize": False}
    else:
        own = {"gamma": 0.05} if "crumbs" in name else {"epsilon": 0.1} if "della" in name else {}
        density = [0.2, 0.55, 0.8, 0.31, 0.5][: count - 1]
        yield {"weight": weights, "density": density, **own}
        yield {"weight": 0.4, "density": 0.5, "normalize": True, "lambda": 0.7, **own}
        yield {"weight": weights, "density": density, "normalize": False, "lambda": 1.5, **own}
        yield {"weight": 1.0, "density": 1.0, "int8_mask": True, **own}
        yield {"weight": 1.0, "density": [0.0, 1.5, 0.4, 1.0][: count - 1], **own}


def merge(method: str, tensors: list[Tensor], parameters: dict, **more) -> Tensor:
    base = None if method.removeprefix("nlm_") == "linear" else 0
    return merge_tensors(
        tensors, method, parameters=parameters, base_index=base, **{"name": "layer.weight", **more}
    )


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", [(1000,), (37, 41), (6, 5, 3, 3), (1, 1), (0, 4)])
def test_float32_has_the_hosts_bits(name: str, shape: tuple[int, ...]) -> None:
    for count in (2, 3, 4, 5):
        tensors = models(*shape, count=count) if count > 2 else models(*shape, count=3)[:2]
        before = [x.clone() for x in tensors]
        for parameters in settings(name, count):
            found = merge(f"nlm_{name}", tensors, parameters)
            assert torch.equal(found, merge(name, tensors, parameters)), (count, parameters)
            assert found.is_contiguous() and found.dtype == torch.float32
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_entries_as_large_as_the_threshold_are_all_kept() -> None:
    """Rounded differences have many; the host keeps as many as the density says, by chance."""
    base, *experts = models(50, 40)
    experts = [base + (x - base).mul(64).round() / 64 for x in experts]
    base = (base * 64).round() / 64
    experts = [(x * 64).round() / 64 for x in experts]
    parameters = {"weight": [0.5, 0.3, 0.2], "density": [0.2, 0.5, 0.7]}
    found, host = (merge(name, [base, *experts], parameters) for name in ("nlm_ties", "ties"))
    at_the_threshold = torch.zeros_like(base, dtype=torch.bool)
    for x, density in zip(experts, parameters["density"], strict=True):
        magnitude = (x - base).abs()
        limit = magnitude.flatten().sort(descending=True).values[int(density * 2000) - 1]
        at_the_threshold |= magnitude == limit
    differs = found != host
    assert 0 < int(differs.sum()) < int(at_the_threshold.sum())
    assert not bool((differs & ~at_the_threshold).any())


@pytest.mark.parametrize("name", ["ties", "slerp", "dare_linear"])
def test_rescaling_and_float64_are_the_hosts_but_for_rounding(name: str) -> None:
    tensors = models(64, 33, count=2 if name == "slerp" else 4)
    for parameters in settings(name, len(tensors)):
        if name == "dare_linear":
            parameters |= {"density": 1.0}
        elif name == "ties":
            parameters |= {"rescale": True}
        for dtype, most in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
            typed = [x.to(dtype) for x in tensors]
            found, host = (merge(each, typed, parameters) for each in (f"nlm_{name}", name))
            torch.testing.assert_close(found, host, rtol=most, atol=most)


@pytest.mark.parametrize("name", ["nlm_dare_linear", "nlm_dare_ties"])
def test_parts_of_a_tensor_that_are_drawn_apart_are_those_of_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {"weight": 0.4, "density": [0.3, 0.6, 1.0], "rescale": True}
    for shape in ((300, 41), (7,), (0, 4)):
        tensors = models(*shape)
        whole = merge(name, tensors, parameters)
        monkeypatch.setattr(methods, "_PART", methods._ROW)
        assert torch.equal(merge(name, tensors, parameters), whole)
        monkeypatch.undo()
        assert whole.shape == shape and bool(whole.isfinite().all())


def test_slerp_of_parallel_opposite_and_no_models() -> None:
    one = torch.randn(300, generator=torch.Generator().manual_seed(0))
    for other in (2 * one, -one, torch.zeros_like(one), one + 1e-6):
        found, host = (merge(name, [one, other], {"t": 0.3}) for name in ("nlm_slerp", "slerp"))
        torch.testing.assert_close(found, host, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "slerp", "task_arithmetic", "ties"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Within one unit in the last place of float64, and no farther from it than the host."""
    tensors = [x.to(dtype) for x in models(80, 70, count=2 if name == "slerp" else 3)]
    parameters = next(settings(name, len(tensors)))
    exact = [x.double() for x in tensors]
    sure = torch.ones(80, 70, dtype=torch.bool)
    if name == "ties":  # no threshold that several entries have, no vote of rounded zeros
        parameters["density"] = 1.0
        votes = sum(
            w * (x - exact[0]) for w, x in zip(parameters["weight"], exact[1:], strict=True)
        )
        sure = votes.abs() > 1e-6
    found, host = (merge(each, tensors, parameters).double() for each in (f"nlm_{name}", name))
    truth = merge(name, exact, parameters)
    unit = torch.finfo(dtype).eps * 2.0 ** truth.abs().log2().floor()
    assert bool(((found - truth).abs() <= unit)[sure].all())
    errors = [(each - truth)[sure].abs() for each in (found, host)]
    mean, most = (errors[0].mean() / errors[1].mean(), errors[0].max() / errors[1].max())
    assert mean < 1.0001 and most < 1.0001


def test_8_bit_floats_are_computed_in_float32() -> None:
    tensors = [x.to(torch.float8_e4m3fn) for x in models(16, 8, count=3)]
    found = merge("nlm_ties", tensors, {"weight": 1.0, "density": 0.5})
    wide = merge("nlm_ties", [x.float() for x in tensors], {"weight": 1.0, "density": 0.5})
    assert torch.equal(found.float(), wide.to(torch.float8_e4m3fn).float())


WRONG: dict[str, tuple[dict, str]] = {
    "nlm_linear": ({"weight": math.nan}, "a parameter is a finite number, got weight = nan"),
    "nlm_ties": ({"weight": 1.0, "density": math.inf}, "finite number, got density = inf"),
    "nlm_slerp": ({"t": math.inf}, "a parameter is a finite number, got t = inf"),
    "nlm_breadcrumbs": ({"weight": 1.0, "lambda": math.nan}, "got lambda = nan"),
    "nlm_breadcrumbs_ties": (
        {"weight": 1.0, "density": 0.5, "gamma": -0.1},
        r"gamma, .* is at least 0, got -0\.1",
    ),
    "nlm_dare_ties": ({"weight": 1.0, "density": -0.5}, "is at least 0, got -0.5"),
    "nlm_della": ({"weight": 1.0, "density": 0.5, "epsilon": -0.1}, "epsilon is at least 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_parameters_are_named(name: str) -> None:
    tensors = models(20, 10, count=2 if name == "nlm_slerp" else 3)
    parameters, sentence = WRONG[name]
    with pytest.raises(ValueError, match=r"nlm\.integrations\.mergekit: .*" + sentence):
        merge(name, tensors, parameters)
    with pytest.raises(ValueError, match="do not sum to 0"):
        merge("nlm_linear", tensors, {"weight": 0.0})


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_linear", "dare_ties"])
def test_integers_are_the_hosts(name: str) -> None:
    """Positions, say, which are one for all models."""
    tensors = [torch.arange(600).view(20, 30)] * 3
    found = merge(f"nlm_{name}", tensors, {"weight": 0.5, "density": 0.5})
    assert torch.equal(found, tensors[0]) and found.dtype == torch.int64
    with pytest.raises(TypeError, match="requires floating-point tensors"):
        merge("nlm_linear", tensors, {"weight": 0.5})


@pytest.mark.parametrize("name", ["linear", "slerp", "task_arithmetic", "ties", "breadcrumbs"])
def test_what_is_not_finite_stays_so(name: str) -> None:
    """Not one entry is finite that the host's has as NaN or infinite."""
    tensors = models(20, 10, count=2 if name == "slerp" else 3)
    tensors[1][0, 0], tensors[-1][3, 3] = math.nan, math.inf
    parameters = {"t": 0.3} if name == "slerp" else {"weight": 0.5}
    found, host = (merge(each, tensors, parameters) for each in (f"nlm_{name}", name))
    assert torch.equal(found.isfinite(), host.isfinite())


# --- what is drawn at random --------------------------------------------------------------------


def drawn(name: str, vector: Tensor, seed: int = 0, **parameters) -> Tensor:
    """What is left of a difference from a base of zeros."""
    torch.manual_seed(seed)
    more = {"name": parameters.pop("tensor", "layer.weight")}
    tensors = [torch.zeros_like(vector), vector]
    return merge(name, tensors, {"weight": 1.0, "rescale": False, **parameters}, **more)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_is_the_hosts_in_distribution(name: str) -> None:
    """Counts of kept entries in blocks are binomial, in both; the kept are multiplied alike."""
    vector, density, block = torch.rand(2**18, generator=torch.manual_seed(1)) + 0.5, 0.2, 64
    for method in (f"nlm_{name}", name):
        found = drawn(method, vector, density=density)
        kept = found != 0
        assert torch.equal(found[kept], vector[kept])
        counts = kept.view(-1, block).sum(1).bincount(minlength=block + 1).double().numpy()
        expected = stats.binom.pmf(range(block + 1), block, density) * counts.sum()
        often = expected >= 5
        observed = [*counts[often], counts[~often].sum()]
        wanted = [*expected[often], expected[~often].sum()]
        assert stats.chisquare(observed, wanted).pvalue > 1e-4, method
        rescaled = drawn(method, vector, density=density, rescale=True)
        torch.testing.assert_close(rescaled.abs().sum(), vector.abs().sum(), rtol=1e-4, atol=0)
        factor = rescaled[rescaled != 0] / vector[rescaled != 0]
        assert factor.std() < 1e-6 and abs(factor.mean() * density - 1) < 0.02


def test_next_to_nothing_is_not_rescaled_as_in_the_host() -> None:
    vector = torch.full((500,), 1e-11)
    for method in ("nlm_dare_linear", "dare_linear"):
        kept = drawn(method, vector, density=0.5, rescale=True)
        assert kept.unique().tolist() == [0.0, vector[0].item()], method
    for empty in ((0,), (0, 4)):
        assert drawn("nlm_dare_ties", torch.zeros(empty), density=0.5).shape == empty


def test_a_sum_beyond_the_largest_float_still_rescales() -> None:
    vector = torch.full((20_000,), 1e36)
    kept = drawn("nlm_dare_linear", vector, density=0.5, rescale=True)
    torch.testing.assert_close(kept.double().sum(), vector.double().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_keeps_large_entries_more_often_as_the_host_does(name: str) -> None:
    """By rank within a row, from density - epsilon to density + epsilon."""
    rows, length, density, epsilon = 20_000, 8, 0.5, 0.3
    vector = torch.rand(rows, length, generator=torch.manual_seed(2)) + 0.5
    rank = vector.argsort(1).argsort(1)
    wanted = torch.linspace(density - epsilon, density + epsilon, length)
    for method in (f"nlm_{name}", name):
        kept = drawn(method, vector, density=density, epsilon=epsilon, normalize=False) != 0
        shares = torch.stack([kept[rank == r].float().mean() for r in range(length)])
        assert bool(((shares - wanted).abs() < 5 * (0.25 / rows) ** 0.5).all()), method
    for shape in ((500,), (4, 3, 5, 5)):
        vector = torch.rand(shape, generator=torch.manual_seed(3)) + 0.5
        kept = drawn(f"nlm_{name}", vector, density=0.4, epsilon=0.1) != 0
        assert 0.2 < kept.float().mean() < 0.6
    with pytest.raises(ValueError, match=r"nlm\.integrations\.mergekit: density - epsilon and"):
        drawn(f"nlm_{name}", vector, density=0.9, epsilon=0.2)


def test_what_is_drawn_follows_seed_tensor_and_model_alone() -> None:
    vector = torch.ones(5000)
    first = drawn("nlm_dare_linear", vector, density=0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(drawn("nlm_dare_linear", vector, density=0.5), first)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    pair = {"weight": [1.0, 10.0], "density": 0.5, "rescale": False}
    both = merge("nlm_dare_linear", [torch.zeros(5000), vector, vector], pair)
    assert torch.equal(both % 10 != 0, first != 0)
    others = [
        drawn("nlm_dare_linear", vector, density=0.5, seed=1),
        drawn("nlm_dare_linear", vector, density=0.5, tensor="another"),
        both >= 10,
    ]
    for other in others:
        assert abs(float(((other != 0) == (first != 0)).float().mean()) - 0.5) < 0.04
    unnamed = [drawn("nlm_dare_linear", vector, density=0.5, tensor=None) for _ in range(2)]
    assert torch.equal(*unnamed)
    torch.manual_seed(0)
    tensors, parameters = [torch.zeros(5000), vector], {"weight": 1.0, "density": 0.5}
    one, two = (merge("nlm_dare_linear", tensors, parameters, name=None) for _ in range(2))
    assert not torch.equal(one, two)


# --- as methods of the host -----------------------------------------------------------------------


def test_registering_twice_is_registering_once() -> None:
    count = len(registered_methods())
    on_nlm.register()
    assert len(registered_methods()) == count
    for name in NAMES:
        host, ours = get(name).spec, get(f"nlm_{name}").spec
        assert ours.parameters == host.parameters and ours.contract == host.contract
        assert (ours.pretty_name, ours.reference_url) == (host.pretty_name, host.reference_url)
        assert type(get(name)) is not methods.Method


def test_the_hosts_names_run_on_nlm_within_a_context() -> None:
    stock = {name: get(name) for name in NAMES}
    with on_nlm.use_as_default():
        assert all(
            type(get(name)) is methods.Method and get(name).spec.name == name for name in NAMES
        )
        with on_nlm.use_as_default():
            pass
        assert type(get("ties")) is methods.Method
        on_nlm.register()
    assert all(get(name) is method for name, method in stock.items())
    with pytest.raises(KeyError), on_nlm.use_as_default():
        raise KeyError
    assert all(get(name) is method for name, method in stock.items())


@pytest.mark.parametrize("name", ["linear", "ties"])
def test_gradients_are_the_hosts(name: str) -> None:
    tensors = models(20, 10, count=3)
    parameters = next(settings(name, 3))
    gradients = []
    for method in (name, f"nlm_{name}"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        merge(method, leaves, parameters).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_state_dicts_merge_as_with_the_host() -> None:
    """Small tensors, which the host packs, and an integer buffer."""
    states = [
        {f"{n}": models(7, 5, seed=n)[k] for n in range(5)} | {"steps": torch.tensor(3)}
        for k in range(3)
    ]
    for name, parameters in (
        ("linear", {"weight": [0.5, 0.2, 0.3]}), ("ties", {"weight": 0.5, "density": 0.4}),
    ):  # fmt: skip
        base = None if name == "linear" else 0
        found, host = (
            merge_state_dicts(states, each, parameters=parameters, base=base)
            for each in (f"nlm_{name}", name)
        )
        assert found.keys() == host.keys()
        assert all(torch.equal(found[key], host[key]) for key in host)


def test_threads_do_not_disturb_one_another() -> None:
    work = [models(150, 70, seed=seed) for seed in range(6)]
    parameters = {"weight": 0.5, "density": 0.3}
    alone = [merge("nlm_dare_ties", x, parameters, name=f"{n}") for n, x in enumerate(work)]
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        found[number] = merge("nlm_dare_ties", work[number], parameters, name=f"{number}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], each) for number, each in enumerate(alone))
