"""The gauge of a traced model: what is found, what folding and rotating keep, what is refused."""

import copy
import itertools
import json
from functools import cache

import pytest
import torch
from gauge._transformers import PRE_NORM, beit, bert, gpt, logits, made, t5
from torch import Tensor, nn

import nlm
from nlm.gauge import Gauge, find


@cache
def traced(build) -> tuple[nn.Module, Tensor | dict[str, Tensor], Gauge]:
    """A network that nobody changes, its inputs and its gauge."""
    network, inputs = made(build)
    spec = nlm.trace(network, inputs)
    return network, inputs, find(network, inputs, spec)


def change(network: nn.Module, gauge: Gauge, inputs, *steps) -> float:
    """The relative change of the outputs, in float64, after some changes of the state dict."""
    network = copy.deepcopy(network).double()
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs = inputs.double()
    expected = logits(network, inputs)
    state = network.state_dict()
    for step in steps:
        state = step(state)
    other = gauge.untie(network)
    other.load_state_dict(state)
    return float((logits(other, inputs) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", PRE_NORM)
def test_folded_and_rotated_models_compute_the_same(name):
    network, inputs, gauge = traced(PRE_NORM[name])
    allowed = 1e-12 if name != "llama" else 1e-6  # its norm computes in float32
    assert change(network, gauge, inputs, gauge.fold) < allowed
    rotation = gauge.random(3)
    turn = lambda state: gauge.apply(rotation, state)  # noqa: E731
    assert change(network, gauge, inputs, gauge.fold, turn) < allowed
    spec = gauge.spec
    order = spec.random(5)
    move = lambda state: spec.apply(order, state)  # noqa: E731
    assert change(network, gauge, inputs, gauge.fold, move, turn) < allowed
    assert change(network, gauge, inputs, turn) > 1e-3  # gains do not rotate
    [stream] = gauge.streams
    assert (rotation[stream] - torch.eye(len(rotation[stream]))).abs().max() > 0.5


@pytest.mark.parametrize("name", PRE_NORM)
def test_norms_are_plain_and_free_biases_gone(name):
    network, _, gauge = traced(PRE_NORM[name])
    state = gauge.fold(network.state_dict())
    [stream] = gauge.streams.values()
    assert len(stream.norms) == 5  # two a layer and the last one
    for norm in stream.norms:
        assert bool((state[norm.gain] == 1).all())
        if norm.bias and all(read.bias for read in norm.reads):
            assert bool((state[norm.bias] == 0).all())
    assert stream.centred == stream.keeps_ones == (name != "llama")
    if stream.centred:
        for group in gauge.streams:
            for entry, dim in gauge.spec.carriers(group):
                if state[entry].dim() > 1 and not entry.endswith("head.weight"):
                    assert float(state[entry].mean(dim).abs().max()) < 1e-6
    assert set(state) == set(network.state_dict())
    again = gauge.fold(state)
    assert all(torch.allclose(again[each], state[each], atol=1e-6) for each in state)


def test_what_rotates_in_each_model():
    """Values everywhere; queries with keys where no rotary position stands between."""
    found = {name: traced(build)[2] for name, build in PRE_NORM.items()}
    inside = {name: len(gauge.inner) for name, gauge in found.items()}
    assert inside == {"gpt": 4, "tied gpt": 4, "gpt2": 4, "llama": 2, "vit": 4}
    assert {name for name, gauge in found.items() if gauge.untied} == {"tied gpt", "gpt2"}
    for name, gauge in found.items():
        free = [shift for shift in gauge.shifts if shift.into is None]
        assert len(free) == len(gauge.shifts) - len(free) == (0 if name == "llama" else 2)


def test_experts_are_folded_by_their_own_gains():
    network, inputs, gauge = traced(PRE_NORM["gpt"])
    expert = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rotation = gauge.random(1)
    turn = lambda state: gauge.apply(rotation, state)  # noqa: E731
    assert change(expert, gauge, inputs, gauge.fold, turn) < 1e-12


def test_an_untied_model_says_so():
    network, inputs, gauge = traced(PRE_NORM["gpt2"])
    other = gauge.untie(network)
    assert not other.config.tie_word_embeddings and network.config.tie_word_embeddings
    assert other.lm_head.weight is not other.transformer.wte.weight
    assert torch.equal(logits(other, inputs), logits(network, inputs))


def test_a_gauge_survives_as_text():
    _, _, gauge = traced(PRE_NORM["gpt2"])
    assert Gauge.from_mapping(json.loads(json.dumps(gauge.to_mapping()))) == gauge


def one_parameter():
    network, inputs = gpt()
    network.another = network.head.bias
    return network, inputs


def one_memory():
    network, inputs = gpt()
    network.another = nn.Parameter(torch.empty(40))
    network.another.data = network.head.bias.data
    return network, inputs


@pytest.mark.parametrize("two_names", [one_parameter, one_memory])
def test_a_parameter_of_two_names_keeps_one_value(two_names):
    network, inputs, gauge = traced(two_names)
    [names] = gauge.shared
    assert not gauge.untied and set(names) == {"head.bias", "another"}
    folded = gauge.fold(network.state_dict())
    assert torch.equal(folded["another"], folded["head.bias"])
    assert change(network, gauge, inputs, gauge.fold) < 1e-12
    assert not torch.equal(folded["another"], network.another)


def test_the_gains_of_a_layer_scale_go_into_the_weights_before_them():
    network, inputs, gauge = traced(beit)
    [stream] = gauge.streams.values()
    assert len(stream.scales) == 4  # two a layer
    rotation = gauge.random(3)
    turn = lambda state: gauge.apply(rotation, state)  # noqa: E731
    assert change(network, gauge, inputs, gauge.fold) < 1e-12
    assert change(network, gauge, inputs, gauge.fold, turn) < 1e-12
    state = turn(gauge.fold(network.state_dict()))
    assert all(bool((state[scale.gain] == 1).all()) for scale in stream.scales)
    assert Gauge.from_mapping(json.loads(json.dumps(gauge.to_mapping()))) == gauge


def test_an_encoder_and_a_decoder_have_one_stream(tmp_path):
    """T5: scaled outputs, one embedding for both, of which the head is taken apart."""
    network, inputs, gauge = traced(t5)
    [stream] = gauge.streams.values()
    assert not stream.keeps_ones and gauge.untied == (("shared.weight", "lm_head.weight"),)
    rotation = gauge.random(3)
    turn = lambda state: gauge.apply(rotation, state)  # noqa: E731
    assert change(network, gauge, inputs, gauge.fold, turn) < 1e-6  # its norm computes in float32
    other = gauge.untie(network)
    other.load_state_dict(turn(gauge.fold(network.state_dict())))
    other.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    assert torch.allclose(logits(again, inputs), logits(network, inputs), atol=1e-4)


def refused(build) -> str:
    network, inputs = made(build)
    spec = nlm.trace(network, inputs)
    with pytest.raises(nlm.SymmetryError, match=r"^nlm\.gauge: .*got ") as caught:
        find(network, inputs, spec)
    return str(caught.value)


def test_a_post_norm_model_is_refused():
    assert "pre-norm" in refused(bert) and "permutations" in refused(bert)


class Gated(nn.Module):
    """Reads its stream through a norm, but an activation stands on the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(40, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 7)

    def forward(self, tokens):
        x = torch.relu(self.embedding(tokens))
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x)


def test_an_activation_on_the_stream_is_refused():
    assert "nothing but sums and weights" in refused(lambda: (Gated(), torch.randint(40, (4, 6))))


def test_a_gain_on_the_embedding_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens) * self.gain

    def build():
        network, inputs = gpt()
        network.embedding = Scaled(40, 24)
        network.embedding.gain = nn.Parameter(torch.ones(24))
        return network, inputs

    assert "read by weights alone" in refused(build)


class WrittenOut(nn.Module):
    """A LayerNorm by hand: nobody calls it one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.gain * (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()) + self.bias


def test_a_norm_that_is_written_out_is_understood():
    def build():
        network, inputs = gpt()
        for block in network.blocks:
            block.norm1, block.norm2 = WrittenOut(24), WrittenOut(24)
        return network, inputs

    network, inputs, gauge = traced(build)
    [stream] = gauge.streams.values()
    assert stream.keeps_ones and not stream.centred and len(stream.norms) == 5
    rotation = gauge.random(1)
    turn = lambda state: gauge.apply(rotation, state)  # noqa: E731
    assert change(network, gauge, inputs, gauge.fold, turn) < 1e-12


def test_rotations_are_checked():
    _, _, gauge = traced(PRE_NORM["gpt"])
    [stream] = gauge.streams
    state = made(PRE_NORM["gpt"])[0].state_dict()
    q = gauge.random()[stream]
    free = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]
    for wrong in ({"g99": q}, {stream: q[:5, :5]}, {stream: 2 * q}, {stream: free}):
        with pytest.raises(ValueError, match=r"^nlm\.gauge: .*got "):
            gauge.apply(wrong, state)
    for one, other in itertools.pairwise([gauge.random(1), gauge.random(1)]):
        assert all(torch.equal(one[group], other[group]) for group in gauge.groups)
