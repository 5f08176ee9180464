"""Models of 1,000 layers the whole way: traced, aligned, merged, corrected; and 20,000 tensors."""

import pytest
import torch
from torch import Tensor, nn

import nlm


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.down(torch.relu(self.up(self.norm(x))))


def network(layers: int, seed: int) -> nn.Sequential:
    """A residual stream past ``layers`` linear layers, two of each block."""
    torch.manual_seed(seed)
    blocks = [Block(8, 12) for _ in range(layers // 2)]
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 5)).eval()


@pytest.mark.parametrize("layers", [40, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_thousand_layers(layers: int) -> None:
    model, x = network(layers, 0), torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    spec = nlm.trace(model, x)
    assert spec.proven and len(spec.free) == layers // 2 + 1  # of each block, and the stream
    state = model.state_dict()
    moved = spec.apply(spec.random(1), state)
    found = nlm.align(state, moved, spec)
    back = spec.apply(found.permutation, moved)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    experts = {"a": network(layers, 1), "b": network(layers, 2)}
    merged = network(layers, 3)
    merged.load_state_dict(dict(nlm.merge(experts, base=model, method="ties", density=0.3)))
    tact = nlm.Tact.fit(merged, experts, {"a": [x], "b": [2 * x]})
    assert len(tact.points) >= layers // 2
    assert torch.allclose(tact(x, task="a"), tact.fold("a")(x), rtol=1e-3, atol=1e-4)


def test_twenty_thousand_tensors() -> None:
    """Each with what its own numbers say, bit by bit."""
    make = torch.Generator().manual_seed(0)
    base, one, two = (
        {f"layers.{i}.weight": torch.randn(3, 2, generator=make) for i in range(20_000)}
        for _ in range(3)
    )
    merged = dict(nlm.merge({"a": one, "b": two}, base=base, method="task_arithmetic", scale=0.5))
    assert list(merged) == list(base)
    for i in range(0, 20_000, 997):
        name = f"layers.{i}.weight"
        alone = nlm.merge(
            {"a": {name: one[name]}, "b": {name: two[name]}}, base={name: base[name]},
            method="task_arithmetic", scale=0.5,
        )  # fmt: skip
        assert torch.equal(merged[name], dict(alone)[name])
