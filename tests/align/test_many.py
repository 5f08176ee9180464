"""More than two models: planted permutations come back, and maps agree round cycles."""

import copy
import functools
import itertools
import json

import pytest
import torch
from _networks import mlp, vectors
from _structured import STRUCTURED
from torch import nn

import nlm
from nlm.align import JointAlignment
from nlm.checkpoint import DamagedFileError, read_kind, write_tensors
from nlm.pipeline import align_experts

STRATEGIES = ("reference", "mean", "universe")


class Residual(nn.Module):
    """Two residual blocks on [n, 3, 8, 8], with a norm in each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = (
            nn.Sequential(
                nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
                nn.Conv2d(12, 16, 3, padding=1),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.one(x)
        x = x + self.two(x)
        return self.head(torch.relu(x).mean((2, 3)))


@functools.cache
def network(kind: str):
    """A model and its proven specification."""
    torch.manual_seed(0)
    if kind == "attention":
        model, spec, inputs = STRUCTURED["attention, fused as a sum"]()
        spec.verify(model.eval(), inputs[:4])
        return model, spec
    model, inputs = (mlp(), vectors(8)) if kind == "mlp" else (Residual(), torch.randn(4, 3, 8, 8))
    return model, nlm.trace(model.eval(), inputs)


def copies(model, spec, count: int, noise: float, seed: int = 0):
    """Copies with noise of so many standard deviations on each tensor, permuted but for the first.

    Returns them and the permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    planted = [spec.identity(), *(spec.random(seed + number) for number in range(1, count))]
    states = []
    for permutation in planted:
        state = {
            name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point() and "running" not in name
            else tensor
            for name, tensor in model.state_dict().items()
        }
        states.append(spec.apply(permutation, state))
    return states, planted


def is_identity(spec, permutation) -> bool:
    return all(torch.equal(permutation[group], index) for group, index in spec.identity().items())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("kind", "count"), [("mlp", 4), ("residual", 3), ("attention", 3)])
def test_planted_permutations_come_back(kind, count, strategy):
    model, spec = network(kind)
    states, planted = copies(model, spec, count, 0.3)
    found = nlm.align_many(states, spec, strategy=strategy)
    for number in range(count):
        assert is_identity(spec, spec.compose(planted[number], found.between(0, number)))
    assert strategy == "universe" or is_identity(spec, found.permutations[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_maps_agree_round_every_cycle(strategy):
    """Of models that have nothing in common."""
    spec = nlm.trace(mlp(0), vectors(8))
    found = nlm.align_many([mlp(seed) for seed in range(3)], spec, strategy=strategy)
    for one, two, three in itertools.permutations(range(3)):
        there = spec.compose(found.between(two, one), found.between(three, two))
        assert is_identity(spec, spec.compose(there, found.between(one, three)))


@pytest.mark.parametrize(("kind", "noise"), [("mlp", 1.5), ("mlp", 3.0), ("residual", 3.0)])
def test_no_strategy_is_worse_than_the_reference(kind, noise):
    model, spec = network(kind)
    states, _ = copies(model, spec, 3, noise)
    standing = {name for group in spec.groups for name, _ in spec.carriers(group)}
    names = [name for name in standing if "running" not in name]
    ends = {}
    for strategy in STRATEGIES:
        found = nlm.align_many(states, spec, strategy=strategy)
        report = found.report
        assert report.strategy == strategy and report.method == "weights"
        moved = [spec.apply(p, state) for p, state in zip(found.permutations, states, strict=True)]
        for (m, a), (n, b) in itertools.product(enumerate(moved), repeat=2):
            product = sum(float((a[name].double() * b[name].double()).sum()) for name in names)
            assert report.products[m][n] == pytest.approx(product, rel=1e-9, abs=1e-9)
        pairs = sum(report.products[m][n] for m, n in itertools.combinations(range(3), 2))
        assert report.objective[-1] == pytest.approx(pairs, rel=1e-9)
        assert strategy == "reference" or report.objective == sorted(report.objective)
        assert bool(report.relaxed) == (strategy == "universe")
        assert len(report.alignments) == 2
        ends[strategy] = report.objective[-1]
    assert min(ends["mean"], ends["universe"]) > ends["reference"]


def test_the_reference_is_one_alignment_after_the_other():
    first, others = mlp(0), [mlp(1), mlp(2)]
    spec = nlm.trace(first, vectors(8))
    for method, options in (("weights", {}), ("activations", {"data": [vectors(64)]})):
        found = nlm.align_many([first, *others], spec, method, "reference", seed=3, **options)
        for number, other in enumerate(others):
            alone = nlm.align(first, other, spec, method, seed=3, **options)
            assert all(
                torch.equal(found.permutations[number + 1][g], alone.permutation[g])
                for g in spec.groups
            )
            assert found.report.alignments[number].objective == alone.report.objective


def test_files_hold_everything(tmp_path):
    states = [mlp(seed).state_dict() for seed in range(3)]
    spec = nlm.trace(mlp(0), vectors(8))
    found = nlm.align_many(states, spec)
    found.save(tmp_path / "joint.safetensors")
    again = JointAlignment.load(tmp_path / "joint.safetensors")
    assert again.report == found.report and again.groups == found.groups
    for one, two in zip(again.permutations, found.permutations, strict=True):
        assert all(torch.equal(one[group], two[group]) for group in spec.groups)
    with pytest.raises(FileExistsError):
        found.save(tmp_path / "joint.safetensors")
    found.save(tmp_path / "joint.safetensors", force=True)
    nlm.align(states[0], states[1], spec).save(tmp_path / "pair.safetensors")
    with pytest.raises(ValueError, match="a file of JointAlignment is read, got AlignmentResult"):
        JointAlignment.load(tmp_path / "pair.safetensors")


def test_a_size_in_a_file_takes_no_memory(tmp_path):
    path, spec = tmp_path / "joint.safetensors", nlm.trace(mlp(0), vectors(8))
    nlm.align_many([mlp(seed).state_dict() for seed in range(3)], spec).save(path)
    tensors, metadata = read_kind(path, "JointAlignment", "test")
    groups = json.loads(metadata["groups"])
    groups[0]["size"] = 1 << 50  # no machine holds an index array of it
    write_tensors(path, tensors, metadata | {"groups": json.dumps(groups)}, force=True)
    with pytest.raises(DamagedFileError, match=r"int64 of shape \[1125899906842624\], got"):
        JointAlignment.load(path)


def test_the_same_seed_gives_the_same_permutations():
    states = [mlp(seed).state_dict() for seed in range(3)]
    spec = nlm.trace(mlp(0), vectors(8))
    first, again = (nlm.align_many(states, spec, seed=5) for _ in range(2))
    for one, two in zip(first.permutations, again.permutations, strict=True):
        assert all(torch.equal(one[group], two[group]) for group in spec.groups)


def test_progress_counts_on_and_can_cancel():
    states = [mlp(seed).state_dict() for seed in range(3)]
    spec = nlm.trace(mlp(0), vectors(8))
    seen = []
    report = nlm.align_many(states, spec, progress=lambda *of: seen.append(of)).report
    first, *rest = report.objective[1:]
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    assert [value for _, value in seen] == [first, *report.relaxed[1:], *rest]

    def stop(number, objective):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nlm.align_many(states, spec, progress=stop)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_of_weights(dtype):
    model, spec = network("mlp")
    states, planted = copies(model, spec, 3, 0.1)
    states = [{name: tensor.to(dtype) for name, tensor in state.items()} for state in states]
    found = nlm.align_many(states, spec)
    for number in range(3):
        assert is_identity(spec, spec.compose(planted[number], found.between(0, number)))


def test_heads_of_other_classes_and_named_entries_are_left_out():
    states = [mlp(0).state_dict(), mlp(1).state_dict(), mlp(2, classes=7).state_dict()]
    spec = nlm.trace(mlp(0), vectors(8))
    report = nlm.align_many(states, spec, exclude="0").report
    assert set(report.excluded) == {"0.weight", "0.bias", "4.weight"}


def test_what_is_refused():
    states = [mlp(seed).state_dict() for seed in range(3)]
    spec = nlm.trace(mlp(0), vectors(8))
    with pytest.raises(ValueError, match=r"nlm\.align_many: there are at least two models, got 1"):
        nlm.align_many(states[:1], spec)
    with pytest.raises(TypeError, match=r"nlm\.align_many: the options .* got max_iter, depth$"):
        nlm.align_many(states, spec, max_iter=3, depth=1)
    with pytest.raises(ValueError, match=r"the strategy is one of universe, .* got 'cycle'"):
        nlm.align_many(states, spec, strategy="cycle")
    with pytest.raises(ValueError, match=r"is one of weights, .*, dual, got 'orthogonal'"):
        nlm.align_many(states, spec, "orthogonal")
    for method, data in (("activations", [vectors(8)]), ("dual", None)):
        with pytest.raises(ValueError, match=f"'{method}' needs modules and data, got OrderedDict"):
            nlm.align_many(states, spec, method, data=data)
    with pytest.raises(ValueError, match="at least 0 and less than 1, got 1"):
        nlm.align_many([mlp(0), mlp(1)], spec, "dual", data=[vectors(8)], dual=1)
    states[2]["0.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"got 1 NaN or inf of 288 in '0\.weight' of 'model 2'"):
        nlm.align_many(states, spec)
    del states[1]["0.weight"]
    with pytest.raises(ValueError, match=r"missing '0\.weight'"):
        nlm.align_many(states, spec)
    spec.verified = None
    with pytest.raises(nlm.SymmetryError, match="not verified"):
        nlm.align_many([mlp(seed).state_dict() for seed in range(3)], spec)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_experts_of_three_foundations_come_into_the_order_of_the_first(strategy):
    model, spec = network("mlp")
    states, _ = copies(model, spec, 3, 0.1)
    foundations = []
    for state in states:
        foundations.append(copy.deepcopy(model))
        foundations[-1].load_state_dict(state)
    experts = {str(number): (number, each) for number, each in enumerate(foundations)}
    aligned = align_experts(foundations, experts, spec, heads=("4",), strategy=strategy)
    assert (aligned.joint is None) == (strategy == "reference") == bool(aligned.results)
    assert torch.equal(aligned.foundations[0]["0.weight"], states[0]["0.weight"])
    first = model.state_dict()
    for state in (*aligned.foundations, *(each.state_dict() for each in aligned.experts.values())):
        for name, tensor in first.items():
            assert (state[name] - tensor).std() < 0.15 * tensor.std()
