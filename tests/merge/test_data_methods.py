"""Soups, Fisher averaging and RegMean: methods that know more of the models than their weights."""

import socket

import numpy as np
import pytest
import torch
from _distributed import Forked, measure_together
from _networks import mlp
from torch import Tensor, nn

import nlm
from nlm.merge import fisher, gram_matrices, greedy_soup, regmean

EXPERTS = {task: mlp(seed) for seed, task in enumerate("abc")}


def inputs(seed: int, count: int = 40) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(count, 12, generator=make) @ torch.randn(12, 12, generator=make) / 3


DATA = {task: [inputs(seed)[:25], inputs(seed)[25:]] for seed, task in enumerate("abc")}


# --- soups --------------------------------------------------------------------------------------


def test_the_uniform_soup_is_the_plain_mean() -> None:
    soup = nlm.merge(EXPERTS, method="uniform_soup")
    linear = nlm.merge(EXPERTS, method="linear")
    assert all(torch.equal(soup[name], linear[name]) for name in linear)


def test_the_greedy_soup_keeps_what_does_not_harm() -> None:
    """On numbers: the mean is to be 2; alone 2.5 is best, then 0, then 5."""
    models = {name: {"w": torch.tensor([x])} for name, x in (("x", 5.0), ("y", 2.5), ("z", 0.0))}
    models["y'"] = {"w": torch.tensor([2.5])}
    soup = greedy_soup(models, lambda state: -abs(float(state["w"]) - 2))
    assert list(soup.scores) == ["y", "y'", "z", "x"] and soup.scores["x"] == -3
    assert soup.ingredients == ("y", "y'", "z")  # no better with y', and x would harm
    assert float(soup.merged["w"]) == pytest.approx(5 / 3) and soup.score == pytest.approx(-1 / 3)


def test_a_soup_of_networks_is_their_mean() -> None:
    x = inputs(7)

    def score(state) -> float:
        return -float(torch.func.functional_call(EXPERTS["a"], dict(state), x).square().mean())

    soup = greedy_soup(EXPERTS, score)
    best = {name: EXPERTS[name] for name in soup.ingredients}
    expected = nlm.merge(best, method="linear")
    assert all(torch.equal(soup.merged[name], expected[name]) for name in expected)
    assert soup.score == score(expected) >= max(soup.scores.values())


def test_soups_without_a_score() -> None:
    with pytest.raises(ValueError, match="a score is a number, got NaN for 'a'"):
        greedy_soup(EXPERTS, lambda state: float("nan"))
    with pytest.raises(ValueError, match="at least one expert, got none"):
        greedy_soup({}, lambda state: 0.0)


# --- Fisher averaging ---------------------------------------------------------------------------


def test_the_fisher_information_of_a_softmax_is_known() -> None:
    """Of logits W x + b it is the mean of p (1 - p) x^2, whatever the batches; labels are not
    used, and gradients that are switched off come back so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 4))
    model[0].bias.requires_grad_(False)
    x = inputs(1)
    found = fisher(model, [(x[:9], torch.zeros(9)), (x[9:], torch.zeros(31))])
    share = (model(x).softmax(-1) * (1 - model(x).softmax(-1))).detach().double()
    expected = share.T @ x.double().square() / len(x)
    np.testing.assert_allclose(found["0.weight"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["0.bias"], share.mean(0), rtol=1e-5)
    assert not model[0].bias.requires_grad and model[0].weight.grad is None and model.training


def test_drawn_labels_give_the_same_on_average() -> None:
    model = nn.Sequential(nn.Linear(12, 4)).eval()
    x = inputs(2, 8).repeat(150, 1)
    exact = fisher(model, [x[:8]])["0.weight"]
    drawn = fisher(model, [x], exact_classes=2, max_samples=None)["0.weight"]
    assert float((drawn - exact).norm() / exact.norm()) < 0.1
    same = fisher(model, [x[:50]], exact_classes=2, seed=3)["0.weight"]
    assert torch.equal(same, fisher(model, [x[:50]], exact_classes=2, seed=3)["0.weight"])


class Tied(nn.Module):
    """Logits per position from an embedding that is its own head, and a weight that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def test_sequences_tied_and_unused_weights() -> None:
    found = fisher(Tied(), [torch.arange(6).view(2, 3)])
    assert set(found) == {"embed.weight", "head.weight", "unused"}
    assert torch.equal(found["embed.weight"], found["head.weight"])
    assert bool((found["embed.weight"] > 0).any()) and not found["unused"].any()


def test_what_matters_to_one_expert_is_its_own() -> None:
    """sum F theta / sum F in float64, whatever the unit of F; below the floor the plain mean."""
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    fishers = {task: fisher(model, DATA[task]) for task, model in EXPERTS.items()}
    merged = nlm.merge(EXPERTS, method="fisher", fishers=fishers, weights=weights, floor=1e-6)
    for name, tensor in merged.items():
        states = [model.state_dict()[name].double().numpy() for model in EXPERTS.values()]
        importance = np.stack([fishers[task][name].double().numpy() for task in weights])
        floored = np.maximum(importance, 1e-6 * importance.mean())
        each = [w * one for w, one in zip(weights.values(), floored, strict=True)]
        expected = sum(f * x for f, x in zip(each, states, strict=True)) / sum(each)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=2e-5, atol=1e-7)
    small = {task: {n: t * 2.0**-40 for n, t in own.items()} for task, own in fishers.items()}
    same = nlm.merge(EXPERTS, method="fisher", fishers=small, weights=weights)
    none = {task: {n: torch.zeros_like(t) for n, t in own.items()} for task, own in small.items()}
    linear = nlm.merge(EXPERTS, method="linear")
    for given in ({"fishers": fishers, "floor": 1e9}, {"fishers": none}):
        plain = nlm.merge(EXPERTS, method="fisher", **given)
        for name, tensor in plain.items():
            torch.testing.assert_close(tensor, linear[name], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(same[name], merged[name], rtol=1e-6, atol=1e-7)


def test_bad_fisher_information() -> None:
    good = {name: torch.ones_like(t) for name, t in EXPERTS["a"].state_dict().items()}
    bad = {**good, "0.bias": torch.full((24,), -1.0)}
    with pytest.raises(ValueError, match=r"at least 0, got -1.0 in '0.bias' of 'b'"):
        nlm.merge(EXPERTS, method="fisher", fishers={"a": good, "b": bad, "c": good})
    bad = {**good, "0.bias": torch.full((24,), float("nan"))}
    with pytest.raises(ValueError, match=r"finite and at least 0, got nan in '0.bias' of 'b'"):
        nlm.merge(EXPERTS, method="fisher", fishers={"a": good, "b": bad, "c": good})
    bad = {**good, "0.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"got \[3\] for '0.bias' \[24\] of 'c'"):
        nlm.merge(EXPERTS, method="fisher", fishers={"a": good, "b": good, "c": bad})
    with pytest.raises(ValueError, match=r"a model gives logits \[n, ..., classes\], got \[1\]"):
        fisher(nn.Flatten(0), [torch.randn(3, 1)])
    with pytest.raises(ValueError, match=r"gradients are finite, got NaN or inf for '0.weight'"):
        fisher(mlp(0), [torch.full((1, 12), float("inf"))])


# --- RegMean ------------------------------------------------------------------------------------


def read_by(model: nn.Module, task: str) -> dict[str, np.ndarray]:
    """What each linear layer reads, float64."""
    found, x = {}, torch.cat(DATA[task])
    for number, module in enumerate(model):
        if isinstance(module, nn.Linear):
            found[f"{number}.weight"] = x.detach().double().numpy()
        x = module(x)
    return found


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.0])
def test_regmean_is_least_squares_over_all_inputs(alpha: float) -> None:
    """Solved by numpy from the inputs, stacked; biases and heads as `linear` has them."""
    merged = regmean(EXPERTS, DATA, alpha=alpha, heads="4")
    plain = nlm.merge(EXPERTS, method="linear", heads="4")
    assert set(merged) == set(plain) and set(merged.heads["a"]) == {"4.weight", "4.bias"}
    for name in plain:
        if name.endswith("bias"):
            assert torch.equal(merged[name], plain[name])
            continue
        total, wanted = 0.0, 0.0
        for task, model in EXPERTS.items():
            x = read_by(model, task)[name]
            gram = x.T @ x / len(x)
            gram = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
            total = total + gram
            wanted = wanted + gram @ model.state_dict()[name].double().numpy().T
        live = np.diag(total) > 0
        solved = np.linalg.solve(total[np.ix_(live, live)], wanted[live]).T
        np.testing.assert_allclose(merged[name].numpy()[:, live], solved, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(merged[name][:, ~live], plain[name][:, ~live], atol=1e-7)


def test_grams_stand_for_data() -> None:
    grams = {task: gram_matrices(model, DATA[task]) for task, model in EXPERTS.items()}
    x = torch.cat(DATA["a"]).double()
    np.testing.assert_allclose(grams["a"]["0.weight"], x.T @ x / len(x), rtol=1e-6, atol=1e-7)
    one, other = regmean(EXPERTS, grams=grams), regmean(EXPERTS, DATA)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not EXPERTS["a"][0]._forward_pre_hooks


def test_experts_of_one_weight_keep_it() -> None:
    same = regmean({"a": EXPERTS["a"], "b": EXPERTS["a"]}, {"a": DATA["a"], "b": DATA["b"]})
    for name, tensor in EXPERTS["a"].state_dict().items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-6, atol=1e-7)


def test_padding_and_transposed_layers() -> None:
    """transformers' Conv1D holds [inputs, outputs]; masked positions are not read."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    models = {task: nn.Sequential(Conv1D(3, 5)) for task in "ab"}
    x = {task: torch.randn(4, 6, 5) for task in "ab"}
    seen = torch.arange(6).expand(4, 6) < 4
    merged = regmean(models, {t: [v] for t, v in x.items()}, mask=lambda batch: seen, alpha=1.0)
    total, wanted = 0.0, 0.0
    for task, model in models.items():
        rows = x[task][:, :4].reshape(-1, 5).double()
        gram = rows.T @ rows / len(rows)
        total, wanted = total + gram, wanted + gram @ model[0].weight.detach().double()
    expected = torch.linalg.solve(total, wanted).float()
    torch.testing.assert_close(merged["0.weight"], expected, rtol=1e-4, atol=1e-5)


def test_bad_regression() -> None:
    for options, message in (
        ({}, "there are data or Gram matrices, got none"),
        ({"data": DATA, "grams": {}}, "there are data or Gram matrices, got both"),
        ({"data": {"a": DATA["a"]}}, r"of every expert \(a, b, c\), got a"),
        ({"data": DATA, "alpha": 1.5}, r"alpha lies in \[0, 1\], got 1.5"),
        ({"data": {task: [inputs(0, 2)] for task in EXPERTS}, "alpha": 1.0},
         "inputs that depend on one another take a smaller alpha, got 12 of '0.weight'"),
        ({"grams": {task: {"0.weight": torch.eye(3)} for task in EXPERTS}},
         r"a Gram matrix is \[inputs, inputs\], got \[3, 3\] for '0.weight' with 12 inputs"),
        ({"data": {**DATA, "b": [torch.full((3, 12), float("nan"))]}}, "activations are finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            regmean(EXPERTS, **options)
    with pytest.raises(ValueError, match="linear layers beside its heads, got none"):
        gram_matrices(mlp(0), DATA["a"], heads="*")


def test_gram_matrices_of_two_processes_are_those_of_all_data(tmp_path) -> None:
    """To 1e-12, and the same bits in both; of a layer that runs in one of them alone, too."""
    make = torch.Generator().manual_seed(0)
    parts = [[x.abs(), -x[:9].abs(), x[9:].abs()] for x in torch.randn(2, 30, 6, generator=make)]
    parts[1] = [-each.abs() for each in parts[1]]
    alone = gram_matrices(Forked(), [each for part in parts for each in part])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(measure_together, (port, str(tmp_path), parts), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() == alone.keys() == {"always.weight", "seldom.weight"}
    for name, expected in alone.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(first[name], second[name])
    apart = gram_matrices(Forked(), parts[0])["always.weight"]
    assert not torch.allclose(apart, alone["always.weight"], rtol=1e-6)  # all samples count
