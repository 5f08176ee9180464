"""Git Re-Basin's functions beside a plain reference that is written from the paper."""

import copy
import math
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from _networks import images, mlp, vectors
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nlm.integrations.git_rebasin import (
    PermutationSpec,
    apply_permutation,
    get_permuted_param,
    permutation_spec_from_axes_to_perm,
    weight_matching,
)

MLP = {
    "0.weight": ("P_0", None), "0.bias": ("P_0",), "2.weight": ("P_1", "P_0"), "2.bias": ("P_1",),
    "4.weight": (None, "P_1"), "4.bias": (None,),
}  # fmt: skip


class ScriptsOwn(NamedTuple):
    """The specification of a script that has its own builders of them."""

    perm_to_axes: dict
    axes_to_perm: dict


def conv_table() -> dict[str, tuple[str | None, ...]]:
    """As scripts write it: helpers that merge dictionaries, and ("P", None) for vectors."""

    def conv(name: str, before: str | None, after: str | None) -> dict:
        return {f"{name}.weight": (after, before, None, None)}

    def dense(name: str, before: str | None, after: str | None) -> dict:
        return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}

    def norm(name: str, at: str) -> dict:
        vectors = ("weight", "bias", "running_mean", "running_var")
        return {f"{name}.{each}": (at, None) for each in vectors} | {
            f"{name}.num_batches_tracked": ()
        }

    return {
        **conv("0", None, "P_bg0"), **norm("1", "P_bg0"), **conv("3", "P_bg0", "P_bg0/inner"),
        **norm("4", "P_bg0/inner"), **conv("6", "P_bg0/inner", "P_bg1"), **norm("7", "P_bg1"),
        **dense("11", "P_bg1", None),
    }  # fmt: skip


def conv_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    for name, each in net.state_dict().items():
        if each.dim() == 1 and name != "11.bias":
            each.copy_(torch.rand(len(each)) + 0.5)
    return net.eval()


def objective(ps: PermutationSpec, a: dict, b: dict) -> float:
    """The inner product of the weights, without BatchNorm's statistics."""
    return math.fsum(
        float((a[name].double() * b[name].double()).sum())
        for name in ps.axes_to_perm
        if "running" not in name and "tracked" not in name
    )


def reference(ps: PermutationSpec, a: dict, b: dict, seed: int) -> dict[str, np.ndarray]:
    """Algorithm 1 of the paper, in NumPy and float64."""
    random = np.random.default_rng(seed)
    a, b = ({name: each.double().numpy() for name, each in state.items()} for state in (a, b))
    perm = {p: np.arange(a[axes[0][0]].shape[axes[0][1]]) for p, axes in ps.perm_to_axes.items()}
    for _ in range(100):
        progress = False
        for p in random.permutation(list(perm)):
            cost = np.zeros((len(perm[p]), len(perm[p])))
            for name, axis in ps.perm_to_axes[p]:
                if "running" in name:
                    continue
                there = b[name]
                for other, q in enumerate(ps.axes_to_perm[name]):
                    if q is not None and other != axis:
                        there = there.take(perm[q], other)
                rows = [np.moveaxis(x, axis, 0).reshape(len(perm[p]), -1) for x in (a[name], there)]
                cost += rows[0] @ rows[1].T
            found = linear_sum_assignment(cost, maximize=True)[1]
            units = np.arange(len(found))
            progress |= cost[units, found].sum() > cost[units, perm[p]].sum() + 1e-12
            perm[p] = found
        if not progress:
            break
    return perm


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_published_script_goes_on(kind: str) -> None:
    """Specification, matching, application, loading: the function stays, the models are nearer."""
    make, table, x = (mlp, MLP, vectors()) if kind == "mlp" else (conv_net, conv_table(), images(8))
    model_a, model_b = make(seed=0), make(seed=1)
    a, b = model_a.state_dict(), copy.deepcopy(model_b.state_dict())
    ps = permutation_spec_from_axes_to_perm(table)
    best = max(
        objective(ps, a, apply_permutation(ps, reference(ps, a, b, seed), b)) for seed in range(3)
    )
    ours = []
    for seed in range(3):
        torch.manual_seed(seed)
        perm = weight_matching(ps, a, b)
        updated = apply_permutation(ps, perm, b)
        ours.append(objective(ps, a, updated))
        assert list(perm) == list(ps.perm_to_axes)
        assert all(index.dtype == torch.int64 for index in perm.values())
    assert max(ours) >= best * (1 - 1e-9)
    more = weight_matching(ps, a, b, 3, seed=0, frank_wolfe=True)
    assert objective(ps, a, apply_permutation(ps, more, b)) > best
    before = model_b(x)
    model_b.load_state_dict(updated)
    torch.testing.assert_close(model_b(x), before)
    naive, aligned = (
        sum(float((a[n] - s[n]).square().sum()) for n in a if "weight" in n) for s in (b, updated)
    )
    assert aligned < naive


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_planted_permutation_comes_back(kind: str) -> None:
    make, table = (mlp, MLP) if kind == "mlp" else (conv_net, conv_table())
    a = make(seed=3).state_dict()
    ps = ScriptsOwn(*permutation_spec_from_axes_to_perm(table))
    torch.manual_seed(5)
    sizes = {p: a[axes[0][0]].shape[axes[0][1]] for p, axes in ps.perm_to_axes.items()}
    planted = {p: torch.randperm(n) for p, n in sizes.items()}
    perm = weight_matching(ps, a, apply_permutation(ps, planted, a))
    for name, index in planted.items():
        assert torch.equal(index[perm[name]], torch.arange(len(index)))


def test_the_objective_never_falls() -> None:
    """From any start, with one name on two axes of an entry, which the published loop forbids."""
    make = torch.Generator().manual_seed(0)
    table = {"in": ("r", None), "square": ("r", "r"), "out": (None, "r")}
    shapes = {"in": (12, 5), "square": (12, 12), "out": (4, 12)}
    ps = permutation_spec_from_axes_to_perm(table)
    for seed in range(8):
        a, b = ({n: torch.randn(s, generator=make) for n, s in shapes.items()} for _ in range(2))
        start = {"r": torch.randperm(12, generator=make)}
        before = objective(ps, a, apply_permutation(ps, start, b))
        for sweeps in (0, 1, 2, 100):
            found = weight_matching(ps, a, b, sweeps, start, seed=seed)
            value = objective(ps, a, apply_permutation(ps, found, b))
            assert value >= before - 1e-9
        assert sweeps == 100 and value > before
        again = weight_matching(ps, a, b, 100, found, seed=seed)
        assert objective(ps, a, apply_permutation(ps, again, b)) >= value - 1e-9


def test_no_sweep_is_the_start_and_seeds_settle_the_order() -> None:
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    ps = permutation_spec_from_axes_to_perm(MLP)
    start = {"P_0": torch.randperm(24).float()}
    perm = weight_matching(ps, a, b, 0, start)
    assert torch.equal(perm["P_0"], start["P_0"].long())
    assert torch.equal(perm["P_1"], torch.arange(24))
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append([weight_matching(ps, a, b) for _ in range(2)])
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_parameter_is_permuted_but_for_one_axis() -> None:
    b = mlp(1).state_dict()
    ps = permutation_spec_from_axes_to_perm(MLP)
    perm = {name: torch.randperm(24) for name in ("P_0", "P_1")}
    w = b["2.weight"]
    both, rows = (get_permuted_param(ps, perm, "2.weight", b, axis) for axis in (None, 1))
    assert torch.equal(both, w[perm["P_1"]][:, perm["P_0"]])
    assert torch.equal(rows, w[perm["P_1"]])
    assert torch.equal(apply_permutation(ps, perm, {"2.weight": w})["2.weight"], both)


def test_arrays_are_taken_and_given() -> None:
    """Of Flax's order of axes too, and in memory that is not to be written to."""
    table = {
        "Dense_0/kernel": (None, "P_0"),
        "Dense_0/bias": ("P_0",),
        "Dense_1/kernel": ("P_0", None),
    }
    ps = permutation_spec_from_axes_to_perm(table)
    random = np.random.default_rng(0)
    a = {
        "Dense_0/kernel": random.normal(size=(7, 9)).astype(np.float32),
        "Dense_0/bias": random.normal(size=9).astype(np.float16),
        "Dense_1/kernel": random.normal(size=(9, 4)),
    }
    planted = {"P_0": random.permutation(9)}
    b = apply_permutation(ps, planted, a)
    for each in b.values():
        each.flags.writeable = False
    perm = weight_matching(ps, a, b)
    assert isinstance(perm["P_0"], np.ndarray) and perm["P_0"].dtype == np.int64
    back = apply_permutation(ps, perm, b)
    for name, each in a.items():
        assert back[name].dtype == each.dtype
        np.testing.assert_array_equal(back[name], each)
        np.testing.assert_array_equal(get_permuted_param(ps, perm, name, b), each)


def test_any_names_of_permutations_and_none_at_all() -> None:
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    expected = weight_matching(permutation_spec_from_axes_to_perm(MLP), a, b, seed=0)
    for first, second in ((0, 1), ("a b", "a/b"), ("1", "P1"), ("é", "_")):
        names = {"P_0": first, "P_1": second, None: None}
        table = {name: tuple(names[each] for each in axes) for name, axes in MLP.items()}
        perm = weight_matching(permutation_spec_from_axes_to_perm(table), a, b, seed=0)
        assert torch.equal(perm[first], expected["P_0"])
        assert torch.equal(perm[second], expected["P_1"])
    ps = permutation_spec_from_axes_to_perm(
        {name: (None,) * len(axes) for name, axes in MLP.items()}
    )
    assert weight_matching(ps, a, b) == {} == weight_matching(ps, a, b, frank_wolfe=True)
    assert apply_permutation(ps, {}, b) == dict(b)


def test_gradients_pass_through() -> None:
    """A straight-through estimator differentiates what is permuted."""
    params = {n: p.clone().requires_grad_() for n, p in mlp(1).state_dict().items()}
    ps = permutation_spec_from_axes_to_perm(MLP)
    perm = {name: torch.randperm(24) for name in ("P_0", "P_1")}
    moved = apply_permutation(ps, perm, params)
    (moved["2.bias"] * torch.arange(24)).sum().backward()
    assert torch.equal(params["2.bias"].grad[perm["P_1"]], torch.arange(24.0))


def test_a_permuted_output_is_said() -> None:
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    ps = permutation_spec_from_axes_to_perm(MLP | {"4.weight": ("P_2", "P_1"), "4.bias": ("P_2",)})
    with pytest.warns(UserWarning, match=r"'P_2' on '4.weight' alone: it permutes an input or"):
        weight_matching(ps, a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight_matching(permutation_spec_from_axes_to_perm(MLP), a, b)


def broken(perm: object) -> dict:
    return {"P_0": perm, "P_1": torch.arange(24)}


@pytest.mark.parametrize(
    ("perm", "says"),
    [
        (torch.full((24,), 0.5), "whole numbers in one dimension, got [0.5, "),
        (torch.full((24,), math.nan), "whole numbers in one dimension, got [nan, "),
        (torch.zeros(24, dtype=torch.int64), "each of 0 to 23 once, got [0, 0, "),
        (torch.arange(23), "[24], got torch.int64 of shape [23]"),
        (torch.eye(24), "of shape [24, 24] for 'P_0'"),
    ],
)
def test_indices_that_are_none_are_refused(perm: Tensor, says: str) -> None:
    b = mlp(1).state_dict()
    ps = permutation_spec_from_axes_to_perm(MLP)
    with pytest.raises(ValueError) as error:
        apply_permutation(ps, broken(perm), b)
    assert says in str(error.value)
    with pytest.raises(ValueError, match=r"^nlm.integrations.git_rebasin: the indices of a perm"):
        get_permuted_param(ps, broken(perm), "0.weight", b)


def test_what_does_not_fit_the_table_is_refused() -> None:
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    ps = permutation_spec_from_axes_to_perm(MLP)
    with pytest.raises(ValueError, match=r"got 1 missing in params_b, such as '2.bias'$"):
        weight_matching(ps, a, {name: each for name, each in b.items() if name != "2.bias"})
    with pytest.raises(ValueError, match=r"are finite, got 1 NaN or inf of 24 in '0\.bias'"):
        bias = b["0.bias"].clone()
        bias[0] = math.nan
        weight_matching(ps, a, b | {"0.bias": bias})
    with pytest.raises(ValueError, match=r"'2.bias' must have the shape of its layout"):
        weight_matching(ps, a, b | {"2.bias": torch.zeros(23)})
    with pytest.raises(ValueError, match=r"permutations of the table \(P_0, P_1\), got 'P_9'"):
        weight_matching(ps, a, b, init_perm={"P_9": torch.arange(24)})
    with pytest.raises(ValueError, match=r"entries of the table .*, got 'scale'$"):
        apply_permutation(ps, broken(torch.arange(24)), b | {"scale": torch.ones(1)})
    with pytest.raises(ValueError, match="got none for 'P_0' among 'P_1'"):
        apply_permutation(ps, {"P_1": torch.arange(24)}, b)
    with pytest.raises(ValueError, match="got none for 'P_0' among 'P_1'"):
        get_permuted_param(ps, {"P_1": torch.arange(24)}, "0.weight", b)


def test_entries_beside_the_table_do_not_count() -> None:
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    ps = permutation_spec_from_axes_to_perm(MLP)
    one = weight_matching(ps, a, b, seed=1)
    other = weight_matching(ps, a, b | {"step": torch.ones(3)}, seed=1)
    assert all(torch.equal(one[name], other[name]) for name in one)
