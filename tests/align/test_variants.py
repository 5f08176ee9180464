"""Activation matching of transformers: variants, padding, some positions, a short proof."""

import copy

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import Tensor, nn

import nlm
from nlm.align import activation_matching, without_heads
from nlm.align.variants import stream_sites, streams
from nlm.statistics import tokens_except
from nlm.symmetry import PermutationSpec


def made(family: str, **more) -> nn.Module:
    """A small network whose vectors are no ones and zeros."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=16, **more,
    )  # fmt: skip
    kind = "ForCausalLM" if family == "Llama" else "ForSequenceClassification"
    model = getattr(transformers, family + kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def tokens(count: int = 64) -> Tensor:
    return torch.randint(3, 40, (count, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, PermutationSpec]:
    """Four heads that share two key heads, rotary positions."""
    model = made("Llama", num_key_value_heads=2, use_cache=False)
    return model, nlm.trace(model, tokens(2))


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, PermutationSpec]:
    model = made("Bert")
    return model, nlm.trace(model, tokens(2))


def moved(model: nn.Module, spec: PermutationSpec, groups: list[str], noise: float = 0.0):
    """A copy with some groups permuted, and the permutation that undoes it."""
    planted = {name: spec.random(3)[name] for name in groups}
    other = copy.deepcopy(model)
    torch.manual_seed(2)
    state = {n: t + noise * t.std() * torch.randn_like(t) for n, t in model.state_dict().items()}
    other.load_state_dict(spec.apply(planted, state))
    return other, spec.inverse(planted)


def is_found(spec: PermutationSpec, found, wanted, groups) -> bool:
    return all(torch.equal(found.permutation[name], wanted[name]) for name in groups)


def logits(model: nn.Module, state=None) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(model, state or model.state_dict(), tokens(4)).logits


def test_heads_that_share_keys_under_rotary_positions(llama):
    model, spec = llama
    outer = {parent for group in spec.free.values() for parent in group.parents}
    units = {name for name, group in spec.free.items() if group.parents}
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert "x 8" in str(spec.params[layer][0])  # what a rotation turns stays in order
    other, wanted = moved(model, spec, list(spec.free))
    for heads in ("matched", "monotonic", "identity"):
        found = nlm.align(model, other, spec, "activations", data=[tokens()], heads=heads)
        assert set(found.permutation) == set(spec.groups)
        assert (is_found(spec, found, wanted, [*outer, *units])) == (heads == "matched")
        still = {"matched": [], "monotonic": outer, "identity": outer | units}[heads]
        assert is_found(spec, found, spec.identity(), still)
        assert set(found.report.correlation) == set(spec.free) - set(still)
        there = logits(other, spec.apply(found.permutation, other.state_dict()))
        torch.testing.assert_close(there, logits(other), rtol=1e-4, atol=1e-4)
    other, wanted = moved(model, spec, sorted(units - outer))
    found = nlm.align(model, other, spec, "activations", data=[tokens()], heads="monotonic")
    assert is_found(spec, found, wanted, spec.free)


class Block(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Residual(nn.Module):
    """Two residual blocks of convolutions without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Linear(6, 3)
        self.blocks = nn.Sequential(
            *(Block(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1)) for _ in range(2))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.relu(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("residual", ["last", "first", "all", "identity"])
def test_the_residual_stream(bert, residual):
    model, spec = bert
    [stream] = streams(spec)
    other, wanted = moved(model, spec, list(spec.free))
    found = nlm.align(model, other, spec, "activations", data=[tokens()], residual=residual)
    others = [name for name in spec.free if name != stream]
    assert is_found(spec, found, wanted, others)
    wanted = spec.identity() if residual == "identity" else wanted
    assert is_found(spec, found, wanted, [stream])
    assert (stream in found.report.correlation) == (residual != "identity")


def test_where_streams_are_seen(bert, llama):
    assert stream_sites(bert[1], streams(bert[1])[0]) == [
        "bert.embeddings.LayerNorm",
        *(
            f"bert.encoder.layer.{layer}.{part}.LayerNorm"
            for layer in range(2)
            for part in ("attention.output", "output")
        ),
    ]
    [stream] = streams(llama[1])
    assert stream_sites(llama[1], stream)[0] == "model.layers.0.input_layernorm"
    assert not streams(nlm.trace(mlp(), vectors(4)))
    assert not streams(nlm.trace(convnet(), images(4)))
    spec = nlm.trace(Residual().eval(), images(4))
    [stream] = streams(spec)
    assert stream_sites(spec, stream) == ["relu", "blocks.0", "blocks", "blocks.1"]


def test_heads_ignored_are_for_comparison_alone(bert, llama):
    model, spec = bert
    flat = without_heads(spec)
    other, _ = moved(model, spec, list(spec.free), noise=3.0)
    with pytest.raises(nlm.SymmetryError):
        nlm.align(model, other, flat, "activations", data=[tokens()])
    exact, free = (activation_matching(model, other, each, [tokens()]) for each in (spec, flat))
    units = [name for name, group in spec.free.items() if group.parents]
    assert all(flat.groups[name].size == 32 for name in units)
    worth = [sum(found.report.correlation[name] for name in units) for found in (exact, free)]
    assert worth[0] < worth[1]
    broken = logits(other, flat.apply(free.permutation, other.state_dict()))
    assert (broken - logits(other)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="heads are ignored where units stand behind them"):
        without_heads(llama[1])


def test_unknown_variants_are_named(bert):
    model, spec = bert
    with pytest.raises(ValueError, match=r"heads are one of matched, monotonic, .* got 'ignore'"):
        nlm.align(model, model, spec, "activations", data=[tokens()], heads="ignore")
    with pytest.raises(ValueError, match="one of identity, first, last, all, got 'sep'"):
        nlm.align(model, model, spec, "activations", data=[tokens()], residual="sep")


def test_padding_is_left_out_of_batches_by_name(bert):
    model, spec = bert
    other, wanted = moved(model, spec, list(spec.free), noise=0.1)
    seen = torch.arange(9) < 4 + torch.arange(64)[:, None] % 6
    batch = {"input_ids": tokens(), "attention_mask": seen.long()}
    found = nlm.align(model, other, spec, "activations", data=[batch])
    pooled = [name for name, group in spec.groups.items() if "pooler" in group.origin]
    assert {found.report.samples[name] for name in pooled} == {64}
    others = set(found.report.samples) - set(pooled)
    assert {found.report.samples[name] for name in others} == {int(seen.sum())}
    assert is_found(spec, found, wanted, spec.free)
    everywhere = nlm.align(model, other, spec, "activations", data=[batch], mask=lambda batch: None)
    assert max(everywhere.report.samples.values()) == 64 * 9
    special = nlm.align(model, other, spec, "activations", data=[batch], mask=tokens_except([3, 4]))
    kept = seen & (tokens() > 4)
    assert max(special.report.samples.values()) == int(kept.sum())


@pytest.mark.parametrize("method", ["activations", "orthogonal"])
def test_a_part_of_the_positions_finds_the_same(llama, method):
    model, spec = llama
    other, wanted = moved(model, spec, list(spec.free), noise=0.2)
    data = [tokens(), tokens().flip(1)]
    whole, part = (
        nlm.align(model, other, spec, method, data=data, stride=stride) for stride in (1, 4)
    )
    assert {4 * n for n in part.report.samples.values()} == set(whole.report.samples.values())
    for name, correlation in whole.report.correlation.items():
        assert part.report.correlation[name] == pytest.approx(correlation, abs=0.05)
    if method == "activations":
        assert is_found(spec, part, wanted, spec.free)


class Counted(nn.Sequential):
    """Counts its runs, those of its copies too, and is scaled by a function of its input."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.runs += 1
        return super().forward(x) * (x.abs().sum(1, keepdim=True) > 0)


def test_a_proven_specification_is_only_confirmed():
    a, b = (Counted(*mlp(seed)) for seed in range(2))
    spec = nlm.trace(a, vectors(8))
    proof = spec.verified
    by_activations = {"method": "activations", "data": [vectors(64)]}
    for options in (by_activations, {"example_inputs": vectors(2)}):
        Counted.runs = 0
        nlm.align(a, b, spec, **options)
        assert Counted.runs == 4 + 2 * ("data" in options) and spec.verified is proof


def test_what_two_samples_cannot_confirm_is_proven_again():
    a, b = (Counted(*mlp(seed)) for seed in range(2))
    spec = nlm.trace(a, vectors(8))
    proof = spec.verified
    x = vectors(64)
    x[:2] = 0  # two samples for which all outputs are 0
    nlm.align(a, b, spec, "activations", data=[x])
    assert spec.proven and spec.verified is not proof
