"""Networks that look symmetric and are not: fewer groups or a clear error, never a wrong group.

Every trap stands between two linear layers: ``leave(middle(enter(x)))``. The number of groups that
it may leave free is known by hand; what is found must hold for inputs of other sizes too.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nlm
from nlm.symmetry.layout import references

UNITS = 8
SHUFFLED = torch.tensor([3, 1, 0, 2, 7, 6, 4, 5])


class Trap(nn.Module):
    """``leave(middle(self, enter(x)))``, with further parameters for the middle."""

    def __init__(self, middle: Callable[["Trap", Tensor], Tensor], *shapes: tuple[int, ...]):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, UNITS)
        self.middle = middle
        self.more = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.register_buffer("order", SHUFFLED.clone())
        self.register_buffer("count", torch.zeros(UNITS))
        with torch.no_grad():
            width = middle(self, torch.randn(3, UNITS)).shape[-1]
        self.leave = nn.Linear(width, 5)
        self.count.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.middle(self, torch.tanh(self.enter(x))))


def write_constant(trap: Trap, h: Tensor) -> Tensor:
    mask = torch.zeros(UNITS)
    mask[2] = 1.0
    return h * mask


def write_slice(trap: Trap, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, :3] = 0.0
    return h


def write_view(trap: Trap, h: Tensor) -> Tensor:
    h = h.clone()
    h.view(-1, 2, UNITS // 2)[:, 0, 1:].mul_(3.0)
    return h


def write_transposed(trap: Trap, h: Tensor) -> Tensor:
    h = h.clone()
    h.t()[1].add_(1.0)
    return h


def write_every_second(trap: Trap, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, ::2] += 1.0
    return h


def write_indexed(trap: Trap, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, [0, 3]] = 0.5
    return h


def fill_diagonal(trap: Trap, h: Tensor) -> Tensor:
    return h @ trap.more[0].clone().fill_diagonal_(0.0)


def own_number(trap: Trap, h: Tensor) -> Tensor:
    return h + h.argmax(-1, keepdim=True).to(h.dtype)


def next_expert(trap: Trap, h: Tensor) -> Tensor:
    chosen = (h @ trap.more[0]).argmax(-1)
    return h * trap.more[1][(chosen + 1) % 4]


def counted(trap: Trap, h: Tensor) -> Tensor:
    return sum(h[:, i : i + 1] * (i + 1) * trap.more[0][i] for i in range(UNITS))


def causal(trap: Trap, h: Tensor) -> Tensor:
    score = h[:, :, None] * h[:, None, :]
    hidden = torch.ones(UNITS, UNITS, dtype=torch.bool).triu(1)
    return score.masked_fill(hidden, -1e9).softmax(-1) @ trap.more[0]


def mutated_buffer(trap: Trap, h: Tensor) -> Tensor:
    trap.count.add_(torch.arange(UNITS))
    return h + trap.count


# How many groups there are at most, what stands in the middle, and the shapes of its parameters.
TRAPS: dict[str, tuple] = {
    "constant written in place": (0, write_constant),
    "slice written in place": (2, write_slice),
    "view written in place": (2, write_view),
    "transposed view written in place": (2, write_transposed),
    "every second unit written in place": (2, write_every_second),
    "indexed units written in place": (2, write_indexed),
    "cumsum": (0, lambda trap, h: h.cumsum(-1)),
    "cumprod": (0, lambda trap, h: h.cumprod(-1)),
    "flip": (0, lambda trap, h: h + h.flip(-1)),
    "roll": (0, lambda trap, h: h + h.roll(1, -1)),
    "roll over all": (0, lambda trap, h: h + h.roll(1)),
    "difference": (0, lambda trap, h: h.diff(dim=-1)),
    "buffer of indices": (0, lambda trap, h: h + h[:, trap.order]),
    "constant indices": (0, lambda trap, h: h + h[:, SHUFFLED.tolist()]),
    "gather by constant": (0, lambda trap, h: h + h.gather(-1, trap.order.expand(len(h), -1))),
    "index_select": (0, lambda trap, h: h + h.index_select(-1, trap.order)),
    "scatter by constant": (
        0,
        lambda trap, h: h + torch.zeros_like(h).scatter(-1, trap.order.expand(len(h), -1), h),
    ),
    "numbers of the units": (0, lambda trap, h: h * torch.arange(UNITS)),
    "linspace": (0, lambda trap, h: h + torch.linspace(0, 1, UNITS)),
    "constant tensor": (1, lambda trap, h: h * torch.tensor([1.0, 2.0] * 4)),
    "alternating constant": (1, lambda trap, h: h * torch.tensor([1.0, 2.0]).repeat(4)),
    "comparison with numbers": (
        2,
        lambda trap, h: torch.where(torch.arange(UNITS) > 3, h, torch.zeros_like(h)),
    ),
    "fft": (0, lambda trap, h: torch.fft.rfft(h).abs()),
    "units as time": (0, lambda trap, h: F.conv1d(h[:, None], trap.more[0])[:, 0], (1, 1, 3)),
    "pooled units": (2, lambda trap, h: F.max_pool1d(h[:, None], 2)[:, 0]),
    "interpolated units": (
        0,
        lambda trap, h: F.interpolate(h[:, None], size=5, mode="linear")[:, 0],
    ),
    "reflected units": (0, lambda trap, h: F.pad(h, (2, 2), mode="reflect")),
    "unfolded units": (0, lambda trap, h: h.unfold(-1, 3, 1).sum(-1)),
    "causal over units": (1, causal, (UNITS, UNITS)),
    "identity matrix rolled": (0, lambda trap, h: h + h @ torch.eye(UNITS).to(h).roll(1, 0)),
    "repeat against interleave": (
        1,
        lambda trap, h: h.repeat(1, 2) + h.repeat_interleave(2, -1),
    ),
    "row-major against column-major": (
        1,
        lambda trap, h: h.view(-1, 2, 4).flatten(1) + h.view(-1, 4, 2).transpose(1, 2).flatten(1),
    ),
    "batch and units mixed": (0, lambda trap, h: h + h.view(UNITS, -1).t().reshape(h.shape)),
    "diagonal flipped": (
        0,
        lambda trap, h: h * trap.more[0].diagonal().flip(0),
        (UNITS, UNITS),
    ),
    "number of the largest": (0, own_number),
    "mutated buffer": (0, mutated_buffer),
    "counted in a loop": (1, counted, (UNITS, UNITS)),
    "concatenated with itself": (1, lambda trap, h: torch.cat([h, h], -1)),
    "concatenated and shifted": (
        0,
        lambda trap, h: torch.cat([h, h[:, :1]], -1) + torch.cat([h[:, :1], h], -1),
    ),
    "halves": (2, lambda trap, h: h[:, :4] * h[:, 4:]),
    "halves crossed": (2, lambda trap, h: torch.cat([h[:, 4:], h[:, :4]], -1) + h),
    "square weight": (2, lambda trap, h: h @ trap.more[0], (UNITS, UNITS)),
    "square weight and its transpose": (
        2,
        lambda trap, h: (h @ trap.more[0]).tanh() @ trap.more[0].t(),
        (UNITS, UNITS),
    ),
    "square weight plus its transpose": (
        1,
        lambda trap, h: h @ (trap.more[0] + trap.more[0].t()),
        (UNITS, UNITS),
    ),
    "square weight twice": (
        1,
        lambda trap, h: (h @ trap.more[0]).tanh() @ trap.more[0],
        (UNITS, UNITS),
    ),
    "upper triangle": (0, lambda trap, h: h @ trap.more[0].triu(), (UNITS, UNITS)),
    "diagonal filled": (1, fill_diagonal, (UNITS, UNITS)),
    "diagonal by einsum": (
        1,
        lambda trap, h: torch.einsum("bi,ii->bi", h, trap.more[0]),
        (UNITS, UNITS),
    ),
    "trace by einsum": (
        2,
        lambda trap, h: torch.einsum("bi,jj->bi", h, trap.more[0]),
        (UNITS, UNITS),
    ),
    "outer product": (1, lambda trap, h: (h[:, :, None] * h[:, None, :]).flatten(1)),
    "sorted": (1, lambda trap, h: h.sort(-1).values),
    "sorted indices": (1, lambda trap, h: h.gather(-1, h.argsort(-1))),
    "top values": (1, lambda trap, h: h.topk(3, -1).values),
    "next expert": (1, next_expert, (UNITS, 4), (4, UNITS)),
    "ones": (1, lambda trap, h: h * torch.ones(UNITS) + torch.ones(1).expand(UNITS)),
    "ones beside": (2, lambda trap, h: torch.cat([h, torch.ones(len(h), 3)], -1)),
    "expanded and numbered": (
        1,
        lambda trap, h: h.mean(-1, keepdim=True).expand(-1, UNITS) * torch.arange(UNITS),
    ),
    "rows by batch": (1, lambda trap, h: h + trap.more[0][: len(h)].mean(0), (32, UNITS)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_gives_few_groups_that_hold(name):
    most, *trap = TRAPS[name]
    model = Trap(*trap).eval()
    spec = nlm.trace(model, torch.randn(3, 6))
    assert len(spec.free) <= most
    assert spec.proven
    spec.verify(model, torch.randn(5, 6))


class TwoRouters(nn.Module):
    """Two routers choose from the same experts, whose weights are added before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)
        self.up, self.down = (nn.Parameter(torch.randn(4, 6, 8)) for _ in range(2))
        self.leave = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.first(x).argmax(-1), self.second(x).argmax(-1)
        up, down = (each[chosen[0]] + each[chosen[1]] for each in (self.up, self.down))
        hidden = torch.einsum("bd,bdf->bf", x, up).tanh()
        return self.leave(torch.einsum("bf,bdf->bd", hidden, down))


def test_experts_whose_weights_are_added_share_the_order_of_their_units():
    torch.manual_seed(0)
    model = TwoRouters()
    spec = nlm.trace(model, torch.randn(16, 6))
    spec.verify(model, torch.randn(40, 6))
    for name, dim in (("up", 2), ("down", 2)):
        for ref in references(spec.params[name][dim]):
            assert spec.groups[ref.group].parents == ()


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 8), nn.Parameter(torch.randn(32, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(tokens) + self.positions[: tokens.shape[1]]))


def test_a_table_of_positions_keeps_its_rows():
    torch.manual_seed(0)
    model = Positions()
    spec = nlm.trace(model, torch.randint(20, (2, 6)))
    assert str(spec.params["positions"][0]) == "32"
    assert str(spec.params["words.weight"][0]) == "20"
    assert len(spec.free) == 1
    spec.verify(model, torch.randint(20, (2, 31)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.leave(h if h.sum() > 0 else -h)


def test_control_flow_that_reads_data_is_a_clear_error():
    with pytest.raises(ValueError, match=r"nlm\.trace: "):
        nlm.trace(Branching(), torch.randn(3, 6))
