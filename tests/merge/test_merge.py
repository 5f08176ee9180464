"""Merging: the formulas on numbers worked out by hand, and independent re-writings as oracles."""

import numpy as np
import pytest
import torch
from _networks import convnet, merge_options, mlp, vectors

import nlm
from nlm.merge import DIALECTS, METHODS


def states(*rows: list[float]) -> dict[str, dict[str, torch.Tensor]]:
    return {f"t{number}": {"w": torch.tensor(row)} for number, row in enumerate(rows)}


BASE = {"w": torch.zeros(5)}


@pytest.mark.parametrize("method", METHODS)
def test_merging_copies_of_one_model_gives_it_back(method):
    model = convnet()
    base = {n: t + 0.1 if t.is_floating_point() else t for n, t in model.state_dict().items()}
    options = {
        "task_arithmetic": {"scale": 0.5},
        "ties": {"density": 1.0},
        "dare": {"scale": 0.5, "drop": 0.0, "seed": 0},
        "dare_ties": {"drop": 0.0, "seed": 0},
        "consensus": {"scale": 0.5},
        "breadcrumbs": {"scale": 0.5, "density": 1.0},
        "breadcrumbs_ties": {"density": 1.0},
        "della": {"density": 1.0, "seed": 0},
        "della_linear": {"scale": 0.5, "density": 1.0, "seed": 0},
        "fisher": {"fishers": {task: {n: t.abs() for n, t in base.items()} for task in "ab"}},
    }
    merged = nlm.merge({"a": model, "b": model}, base, method, **options.get(method, {}))
    expected = model.state_dict()
    if method == "tall_mask":
        base = {n: t - 0.1 if t.is_floating_point() else t for n, t in expected.items()}
        merged = nlm.merge({"a": model}, base, method)
        merged = merged.for_task("a")
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_linear_and_task_arithmetic():
    experts = states([1.0, 2, 3, 4, 5], [3.0, 2, 1, 0, -1])
    assert nlm.merge(experts, method="linear")["w"].tolist() == [2, 2, 2, 2, 2]
    weighted = nlm.merge(experts, method="linear", weights={"t0": 3, "t1": 1})
    assert weighted["w"].tolist() == [1.5, 2, 2.5, 3, 3.5]
    base = {"w": torch.ones(5)}
    found = nlm.merge(experts, base, scale=0.5, weights={"t0": 1, "t1": 2})["w"]
    assert found.tolist() == [3, 2.5, 2, 1.5, 1]


def test_ties_by_hand():
    experts = states([4.0, -3, 0.5, 0, 1], [2.0, 1, -4, 0.1, 3])
    # trimmed to two of five: [4, -3, 0, 0, 0] and [0, 0, -4, 0, 3]; no entry is contested
    for dialect in DIALECTS:
        found = nlm.merge(experts, BASE, "ties", density=0.4, dialect=dialect)["w"]
        assert found.tolist() == [4, -3, -4, 0, 3]
    # untrimmed: the third and second entries are contested, the larger sum wins
    found = nlm.merge(experts, BASE, "ties", density=1.0, scale=2.0)["w"]
    torch.testing.assert_close(found, torch.tensor([6, -6, -8, 0.2, 4]))


def _peft_ties(task_tensors, weights, density):
    """The published recipe of PEFT's ``ties``, once more in numpy."""
    pruned = []
    for tensor in task_tensors:
        flat = tensor.ravel().copy()
        kept = np.argsort(-np.abs(flat), kind="stable")[: int(density * flat.size)]
        mask = np.zeros(flat.size, bool)
        mask[kept] = True
        pruned.append(np.where(mask, flat, 0).reshape(tensor.shape))
    stacked = np.stack(pruned)
    majority = np.where(stacked.sum(0) >= 0, 1, -1)
    agree = np.sign(stacked) == majority
    weighted = stacked * np.asarray(weights).reshape(-1, *[1] * (stacked.ndim - 1))
    return (weighted * agree).sum(0) / np.clip(agree.sum(0), 1, None)


def _mergekit_ties(deltas, weights, density):
    """The published recipe of mergekit's ``ties`` (normalize true), once more in numpy."""
    total, mixed = 0.0, []
    for delta in deltas:
        flat = delta.ravel()
        kept = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
        mask = np.zeros(flat.size)
        mask[kept] = 1
        mixed.append(delta * mask.reshape(delta.shape))
    shape = (-1, *[1] * (deltas[0].ndim))
    weighted = np.stack(mixed) * np.asarray(weights).reshape(shape)
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    agree = np.sign(weighted) == sign
    total = (agree * np.asarray(weights).reshape(shape)).sum(0)
    return (weighted * agree).sum(0) / np.where(total == 0, 1, total)


@pytest.mark.parametrize(
    ("dialect", "oracle"), [("peft", _peft_ties), ("mergekit", _mergekit_ties)]
)
@pytest.mark.parametrize("density", [0.1, 0.37, 1.0])
def test_ties_dialects_per_tensor(dialect, oracle, density):
    models = [mlp(seed).state_dict() for seed in range(4)]
    base, experts = models[0], {f"t{k}": model for k, model in enumerate(models[1:])}
    weights = {"t0": 1.0, "t1": 0.5, "t2": 2.0}
    merged = nlm.merge(
        experts, base, "ties", density=density, scale=0.7, weights=weights, dialect=dialect
    )
    for name, start in base.items():
        deltas = [(model[name] - start).numpy() for model in experts.values()]
        expected = start.numpy() + 0.7 * oracle(deltas, list(weights.values()), density)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_global_ties_trims_over_all_tensors():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    expert = {"a": torch.tensor([8.0, 7, 6, 5]), "b": torch.tensor([4.0, 3, 2, 1])}
    whole = nlm.merge({"t": expert}, base, "ties", density=0.5)
    assert whole["a"].tolist() == [8, 7, 6, 5] and whole["b"].tolist() == [0, 0, 0, 0]
    each = nlm.merge({"t": expert}, base, "ties", density=0.5, dialect="mergekit")
    assert each["b"].tolist() == [4, 3, 0, 0]


def test_tall_masks_by_hand():
    experts = states([1.0, 0, 2, 0, 0], [0.0, 3, -1, 0, 0])
    merged = nlm.merge(experts, BASE, "tall_mask", mask_threshold={"t0": 0.5, "t1": 0.5})
    assert merged["w"].tolist() == [1, 3, 1, 0, 0]
    # |tau_t| > lambda |tau_t - sum tau|
    assert merged.masks["t0"]["w"].tolist() == [0b00101]
    assert merged.mask("t0", "w").tolist() == [True, False, True, False, False]
    assert merged.for_task("t0")["w"].tolist() == [1, 0, 1, 0, 0]
    assert merged.for_task("t1")["w"].tolist() == [0, 3, 0, 0, 0]


def test_heads_are_kept_apart():
    experts = {"five": mlp(0, classes=5), "seven": mlp(1, classes=7)}
    base = mlp(2, classes=3)
    merged = nlm.merge(experts, base, "task_arithmetic", scale=0.5, heads=("4",))
    assert "4.weight" not in merged and set(merged.heads["seven"]) == {"4.weight", "4.bias"}
    model = merged.model(experts["five"])
    x = vectors(6)
    assert model(x, task="five").shape == (6, 5) and model(x, task="seven").shape == (6, 7)
    plain = model.for_task("seven")
    assert torch.equal(plain(x), model(x, task="seven")) and plain[4].out_features == 7
    with pytest.raises(ValueError, match="the task is one of five, seven, got 'six'"):
        model(x, task="six")


def test_statistics_are_averaged_and_integers_copied():
    models = [convnet(seed).state_dict() for seed in range(3)]
    models[0]["1.num_batches_tracked"] += 7
    merged = nlm.merge({"a": models[1], "b": models[2]}, models[0], scale=30.0)
    mean = (models[1]["1.running_var"] + models[2]["1.running_var"]) / 2
    torch.testing.assert_close(merged["1.running_var"], mean)
    assert int(merged["1.num_batches_tracked"]) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(dtype):
    experts = {
        k: {n: t.to(dtype) for n, t in mlp(s).state_dict().items()} for s, k in enumerate("ab")
    }
    base = {n: t.to(dtype) for n, t in mlp(2).state_dict().items()}
    for method in METHODS:
        merged = nlm.merge(experts, base, method, **merge_options(method, experts))
        assert all(tensor.dtype == dtype for tensor in merged.for_task("a").values())


def test_inputs_are_not_changed():
    experts = {"a": mlp(0), "b": mlp(1)}
    base = mlp(2).state_dict()
    before = {name: tensor.clone() for name, tensor in base.items()}
    for method in METHODS:
        options = merge_options(method, experts)
        merged = nlm.merge(experts, base, method, **options)
        merged["0.weight"].zero_()
        headed = nlm.merge(experts, base, method, heads=("4",), **options)
        for tensor in headed.tensors().values():
            tensor.zero_()
    assert all(torch.equal(base[name], before[name]) for name in base)
    assert experts["a"][0].weight.any() and experts["a"][4].weight.any()


def test_the_dtype_is_the_bases():
    experts = {"a": mlp(0).half(), "b": mlp(1).half()}
    for method in METHODS:
        merged = nlm.merge(experts, mlp(2), method, **merge_options(method, experts))
        assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def test_a_result_that_is_not_finite_is_refused():
    experts = {"a": mlp(0).half(), "b": mlp(1).half()}
    for scale in (1e7, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"merged weights are finite, got .* in '0.weight'"):
            nlm.merge(experts, mlp(2).half(), scale=scale)


def test_a_task_may_be_called_base():
    merged = nlm.merge({"base": mlp(0), "b": mlp(1)}, mlp(2), scale=0.0)
    assert torch.equal(merged["0.weight"], mlp(2)[0].weight)
    with pytest.raises(ValueError, match="the same shapes"):
        nlm.merge({"base": mlp(0)}, mlp(2, width=8))


def test_tasks_are_named_by_strings():
    with pytest.raises(TypeError, match="a task's name is a string, got int 0"):
        nlm.merge({0: mlp(0), 1: mlp(1)}, mlp(2))


def test_one_pattern_of_heads_is_no_list_of_letters():
    merged = nlm.merge({"a": mlp(0), "b": mlp(1)}, method="linear", heads="4")
    assert set(merged.heads["a"]) == {"4.weight", "4.bias"}


def _with(change):
    state = dict(mlp(1).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("expert", "error", "message"),
    [
        (
            _with(lambda s: s.pop("0.bias")),
            ValueError,
            "got '0.bias' missing and none extra in 'b'",
        ),
        (_with(lambda s: s.update(x=torch.ones(1))), ValueError, "none missing and 'x' extra"),
        (mlp(1, width=8), ValueError, "the models have the same shapes"),
        (convnet(), ValueError, "the models have the same entries"),
        (mlp(1).to("meta"), ValueError, "on one device in all models, got cpu and meta"),
        (_with(lambda s: s.update({"0.bias": torch.ones(24).int()})), TypeError, "got torch.int32"),
        (_with(lambda s: s["0.bias"].fill_(float("nan"))), ValueError, "24 NaN or inf of 24 in"),
    ],
)
def test_bad_experts(expert, error, message):
    with pytest.raises(error, match=message):
        nlm.merge({"a": mlp(0), "b": expert}, mlp(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "the method is one of .* got 'magic'"),
        ({"base": None}, "starts from a base, got none"),
        ({"method": "ties", "density": 0.0}, r"a density lies in \(0, 1\], got 0.0"),
        ({"method": "ties", "dialect": "old"}, "the TIES dialect is one of"),
        ({"method": "tall_mask", "mask_threshold": -1}, "a mask threshold is positive, got -1"),
        ({"method": "tall_mask", "mask_threshold": {"a": 1}}, "got none for 'b'"),
        ({"weights": {"a": 1}}, "one weight per expert"),
        ({"heads": ("4", "head")}, "a pattern of heads matches an entry of an expert, got 'head'"),
        ({"method": "ties", "heads": ("*",)}, r"got none beside the heads \*"),
        ({"method": "linear", "scale": 0.5}, "scale is an option of .* got 0.5 for 'linear'"),
        ({"method": "tall_mask", "scale": 0.5}, "scale is an option of task_arithmetic, ties"),
        ({"method": "consensus", "agreement": 3}, r"an agreement lies in \[1, 2\], .* got 3"),
        ({"method": "consensus", "agreement": 0}, "an agreement lies in .* got 0"),
        ({"method": "consensus", "mask_threshold": 0}, "a mask threshold is positive, got 0"),
        ({"agreement": 1}, "agreement is an option of consensus, got 1 for 'task_arithmetic'"),
        ({"method": "dare"}, "what is dropped at random has a seed, got none"),
        ({"method": "dare", "seed": 0, "drop": 1.0}, r"the share to drop lies in .* got 1.0"),
        ({"method": "dare", "seed": 0, "rescale": "l2"}, "the rescaling is one of .* got 'l2'"),
        (
            {"seed": 0},
            "seed is an option of dare, .*, della_linear, got 0 for 'task_arithmetic'",
        ),
        (
            {"density": 0.5},
            "density is an option of ties, breadcrumbs, .*, got 0.5 for 'task_arithmetic'",
        ),
        ({"method": "linear", "weights": {"a": 1, "b": -1}}, "do not sum to zero"),
        ({"method": "fisher", "weights": {"a": 1, "b": -1}}, "do not sum to zero"),
        ({"method": "uniform_soup", "weights": {"a": 1, "b": 2}}, "weights is an option of linear"),
        ({"method": "breadcrumbs", "density": 1.2}, r"a density lies in \(0, 1\], got 1.2"),
        ({"method": "breadcrumbs_ties", "gamma": 1.0}, r"too large lies in \[0, 1\), got 1.0"),
        ({"method": "della"}, "what is dropped at random has a seed, got none"),
        ({"method": "della", "seed": 0, "epsilon": 0.3}, r"lie in \(0, 1\), got density 0.2 and"),
        ({"method": "della_linear", "seed": 0, "epsilon": -0.1}, r"0.2 and epsilon -0.1"),
        ({"method": "sce", "select": 0.0}, r"that is selected lies in \(0, 1\], got 0.0"),
        ({"method": "fisher"}, "Fisher information of every expert, got none for 'a', 'b'"),
        ({"method": "fisher", "fishers": {"a": {}, "b": {}}}, "got none for '0.weight' .* of 'a'"),
        ({"method": "fisher", "fishers": {}, "floor": 0.0}, "floor .* is positive, got 0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nlm.merge({"a": mlp(0), "b": mlp(1)}, **{"base": mlp(2), **options})
    with pytest.raises(ValueError, match="at least one expert"):
        nlm.merge({}, mlp(2))
