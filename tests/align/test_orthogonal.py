"""Orthogonal matching: what was rotated, permuted and folded comes back, and is saved."""

import copy

import pytest
import torch
from gauge._transformers import PRE_NORM, bert, logits, made
from torch import nn

import nlm
from nlm.align import OrthogonalAlignment
from nlm.gauge import Gauge, find


def data_like(inputs: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    if inputs.is_floating_point():
        return [torch.randn(48, *inputs.shape[1:], dtype=torch.float64) for _ in range(2)]
    return [torch.randint(3, 40, (48, inputs.shape[1])) for _ in range(2)]


def scrambled(network: nn.Module, gauge: Gauge, gain: float = 1.0) -> nn.Module:
    """A copy of the same function: units and heads exchanged, stream and heads rotated.

    ``gain``: stands in its norms, which a stock class has, and its inverse in what reads them.
    """
    spec = gauge.spec
    state = spec.apply(spec.random(3), gauge.fold(network.state_dict()))
    state = gauge.apply(gauge.random(4), state)
    other = gauge.untie(network)
    for stream in gauge.streams.values():
        for norm in stream.norms:
            state[norm.gain] *= gain
            if norm.bias:
                state[norm.bias] *= gain
            for read in norm.reads:
                state[read.weight] /= gain
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("name", PRE_NORM)
def test_a_scrambled_copy_comes_back(name, tmp_path):
    network, inputs = made(PRE_NORM[name])
    network = network.double()
    data = data_like(inputs)
    spec = nlm.trace(network, data[0][:4])
    gauge = find(network, data[0][:4], spec)
    other = scrambled(network, gauge, gain=1.7)
    allowed = 1e-8 if name != "llama" else 1e-3  # its norm computes in float32
    assert (logits(other, data[0]) - logits(network, data[0])).abs().max() < allowed

    found = nlm.align(network, other, spec, "orthogonal", data=data)
    assert isinstance(found, OrthogonalAlignment) and found.gauge.groups == gauge.groups
    there, back = found.fold(network.state_dict()), found.apply(other.state_dict())
    assert all((there[each] - back[each]).abs().max() < allowed for each in there)
    assert not found.report.by_weights and set(found.report.correlation) == set(spec.free)
    assert all(abs(value - 1) < 1e-3 for value in found.report.correlation.values())

    merged = nlm.merge({"a": there, "b": back}, method="linear")
    middle = found.gauge.untie(network)
    middle.load_state_dict(merged)
    assert (logits(middle, data[0]) - logits(network, data[0])).abs().max() < allowed

    found.save(tmp_path / "alignment.safetensors")
    again = OrthogonalAlignment.load(tmp_path / "alignment.safetensors")
    for held in ("permutation", "rotation"):
        kept, loaded = getattr(found, held), getattr(again, held)
        assert kept.keys() == loaded.keys()
        assert all(torch.equal(kept[each], loaded[each]) for each in kept)
    for each, tensor in again.apply(other.state_dict()).items():
        # the last bits of a product may depend on where its factors lie in memory
        assert (tensor - back[each]).abs().max() <= 1e-13 * back[each].abs().max()

    lost = OrthogonalAlignment(dict(found.permutation), found.report, found.rotation, found.gauge)
    group = next(iter(lost.permutation))
    del lost.permutation[group]
    lost.save(tmp_path / "lost.safetensors")
    with pytest.raises(ValueError, match=f"index array for every group, got none for {group}"):
        OrthogonalAlignment.load(tmp_path / "lost.safetensors")


def test_the_aligned_model_of_another_seed_is_the_same_function():
    """An expert too: its own gains are folded, its function stays, its mean with A is closer."""
    network, inputs = made(PRE_NORM["gpt"])
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
    network, other = network.double(), other.double()
    data = data_like(inputs)
    spec = nlm.trace(network, inputs)
    moved = scrambled(other, find(network, inputs, spec))
    found = nlm.align(network, moved, spec, "orthogonal", data=data)
    back = copy.deepcopy(other)
    back.load_state_dict(found.apply(moved.state_dict()))
    assert (logits(back, data[0]) - logits(other, data[0])).abs().max() < 1e-9

    def distance(state) -> float:
        there = found.fold(network.state_dict())
        return sum(float((state[each] - there[each]).square().sum()) for each in there) ** 0.5

    plain = found.fold(moved.state_dict())
    assert distance(back.state_dict()) < 0.7 * distance(plain)


def test_what_orthogonal_matching_needs():
    network, inputs = made(PRE_NORM["gpt"])
    spec = nlm.trace(network, inputs)
    with pytest.raises(ValueError, match="method 'orthogonal' needs two modules and data"):
        nlm.align(network, network, spec, "orthogonal")
    with pytest.raises(ValueError, match="are found with example_inputs"):
        nlm.align(
            network, network, spec, "orthogonal", data=[inputs],
            forward=lambda model, batch: model(batch),
        )  # fmt: skip
    network, inputs = made(bert)
    spec = nlm.trace(network, inputs)
    with pytest.raises(nlm.SymmetryError, match="pre-norm"):
        nlm.align(network, network, spec, "orthogonal", data=[inputs])
