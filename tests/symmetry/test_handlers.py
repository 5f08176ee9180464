"""Handlers: without one groups are lost and nothing else; users' own; forms that they must know."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nlm
from nlm.symmetry.axes import unify
from nlm.symmetry.discover import interpret, operation_name
from nlm.symmetry.graph import export
from nlm.symmetry.handlers import HANDLERS, Array, handler
from nlm.symmetry.layout import references
from nlm.symmetry.spec import PermutationSpec


@contextmanager
def handlers_as_they_were() -> Iterator[None]:
    kept = dict(HANDLERS)
    try:
        yield
    finally:
        HANDLERS.clear()
        HANDLERS.update(kept)


def moved(spec: PermutationSpec, model: nn.Module) -> int:
    """The number of parameter elements that some group moves."""
    return sum(
        tensor.numel()
        for name, tensor in model.named_parameters()
        if any(ref.group in spec.free for layout in spec.params[name] for ref in references(layout))
    )


# --- models that use many operations --------------------------------------------------------------


class Transformer(nn.Module):
    """Fused projections, heads, a gate, a table of positions, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(11, 12), nn.Parameter(torch.randn(9, 12))
        self.qkv, self.join = nn.Linear(12, 36), nn.Linear(12, 12)
        self.first, self.second = nn.LayerNorm(12), nn.RMSNorm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(10, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions[: tokens.shape[1]]
        heads = self.qkv(self.first(x)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        mixed = torch.matmul((q @ k.transpose(-1, -2)).softmax(-1), v)
        x = x + self.join(mixed.transpose(1, 2).reshape(x.shape))
        values, gate = self.up(self.second(x)).chunk(2, -1)
        x = x + self.down(values * F.silu(gate))
        return F.linear(x, self.words.weight)


class Convolutions(nn.Module):
    """Groups, concatenation, the three norms, pooling, a transposed convolution, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.depth = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.batch, self.group = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.prelu = nn.PReLU(12)
        self.back = nn.ConvTranspose2d(20, 6, 2, stride=2)
        self.leave = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.batch(self.enter(x)).relu()
        b = self.group(self.depth(F.pad(a, (1, 1, 1, 1))))
        joined = torch.cat([self.prelu(self.grouped(b)), a], 1)
        pooled = F.adaptive_avg_pool2d(F.max_pool2d(self.back(joined), 2), 2)
        return self.leave(pooled.flatten(1))


class Recurrent(nn.Module):
    """Two layers in both directions, then one in one direction, and its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 6)
        self.lstm = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.leave = nn.GRU(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(self.enter(x).tanh())
        h, last = self.gru(h.transpose(0, 1))
        return self.leave(h.mean(0) + last.squeeze(0))


class Experts(nn.Module):
    """Stacked experts looked up by the router, and a shared one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router = nn.Linear(5, 8), nn.Linear(8, 4)
        self.up, self.down = (nn.Parameter(torch.randn(4, 8, 6)) for _ in range(2))
        self.shared, self.leave = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).tanh()
        weight, chosen = self.router(h).softmax(-1).topk(2, -1)
        hidden = F.gelu(torch.einsum("bd,bkdf->bkf", h, self.up[chosen]))
        routed = torch.einsum("bkf,bkdf->bkd", hidden, self.down[chosen])
        mixed = (routed * weight.unsqueeze(-1)).sum(1)
        return self.leave(h + mixed + torch.tanh(self.shared(h)))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "transformer": lambda: (Transformer(), torch.randint(11, (2, 7))),
    "convolutions": lambda: (Convolutions(), torch.randn(2, 2, 6, 6)),
    "recurrent": lambda: (Recurrent(), torch.randn(2, 3, 3)),
    "experts": lambda: (Experts(), torch.randn(20, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_without_a_handler_groups_are_lost_and_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    graph = export(model, (inputs,), {}, None)
    whole = interpret(graph, model)
    whole.verify(model, inputs)
    nodes = [node for node in graph.nodes.nodes if node.op == "call_function"]
    used = {operation_name(node.target) for node in nodes} & HANDLERS.keys()
    assert len(used) > 5
    lost = 0
    for removed in [*([operation] for operation in sorted(used)), sorted(used)]:
        with handlers_as_they_were():
            for operation in removed:
                del HANDLERS[operation]
            spec = interpret(graph, model)
        if spec.free:
            spec.verify(model, inputs, seeds=1)
        assert moved(spec, model) <= moved(whole, model), removed
        assert spec.permutation_count <= whole.permutation_count, removed
        lost += spec.permutation_count < whole.permutation_count
    assert lost


# --- a user's operation ---------------------------------------------------------------------------


@torch.library.custom_op("nlm_tests::unit_norm", mutates_args=())
def unit_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True) * weight


@unit_norm.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 5)
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.before = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(unit_norm(self.enter(self.before(x).tanh()), self.weight))


def traced_with(function: Callable[..., Array] | None) -> PermutationSpec:
    with handlers_as_they_were():
        if function is not None:
            handler("nlm_tests.unit_norm")(function)
        return nlm.trace(Normed(), torch.randn(4, 6))


def understood(step, x, weight):
    unify(x.axes[-1], weight.axes[0])
    step.record(x.axes[:-1])
    return Array(x.axes)


def test_an_operation_without_a_handler_pins_and_is_reported() -> None:
    spec = traced_with(None)
    assert spec.opaque_ops == {"nlm_tests.unit_norm.default": 1}
    assert [str(layout) for layout in spec.params["enter.weight"]] == ["8", "g0:6"]
    assert spec.pinned["weight:0"] == "nlm_tests.unit_norm.default"


def test_a_users_handler_frees_what_its_operation_allows() -> None:
    spec = traced_with(understood)
    assert spec.opaque_ops == {}
    assert str(spec.params["weight"][0]) == str(spec.params["enter.weight"][0]) != "8"
    assert len(spec.free) == 2
    assert spec.proven


def raises(step, x, weight):
    raise KeyError("an error of the handler")


def transposed(step, x, weight):
    return Array(x.axes[::-1])


def too_many(step, x, weight):
    return Array(x.axes), Array(x.axes)


def no_array(step, x, weight):
    return None


@pytest.mark.parametrize("function", [raises, transposed, too_many, no_array])
def test_a_handler_that_fails_costs_groups_and_is_reported(function) -> None:
    spec = traced_with(function)
    assert spec.opaque_ops == {"nlm_tests.unit_norm.default": 1}
    assert len(spec.free) == 1
    assert spec.proven


def test_a_wrong_handler_is_found_out(caplog) -> None:
    spec = traced_with(lambda step, x, weight: Array(x.axes))  # forgets the weight
    assert "must not change the outputs" in caplog.text
    assert "refuted by the proof" in spec.pinned.values()
    assert len(spec.free) == 1
    assert spec.proven


# --- control flow ---------------------------------------------------------------------------------


class Flow(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 5)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.middle(self.enter(self.before(x).tanh())))


def branch(h: Tensor) -> Tensor:
    return torch.cond(h.sum() > 0, lambda z: z.cumsum(-1), lambda z: z.sin(), (h,))


def loop(h: Tensor) -> Tensor:
    from torch._higher_order_ops import while_loop

    start = (torch.zeros((), dtype=torch.int64), h)
    return while_loop(lambda i, z: i < 3, lambda i, z: (i + 1, z.roll(1, -1)), start)[1]


def selected(h: Tensor) -> Tensor:
    return h[h[:, 0] > 0].sum(0, keepdim=True) + h


def nonzero(h: Tensor) -> Tensor:
    return h + h.flatten()[(h > 0).nonzero()[:, 0]].sum()


@pytest.mark.parametrize("middle", [branch, loop, selected, nonzero])
def test_control_flow_pins_or_is_a_clear_error(middle: Callable[[Tensor], Tensor]) -> None:
    model, inputs = Flow(middle), torch.randn(4, 6)
    try:
        spec = nlm.trace(model, inputs)
    except ValueError as error:
        assert str(error).startswith("nlm.trace: ")
        return
    assert not any(why == "refuted by the proof" for why in spec.pinned.values())
    assert str(spec.params["leave.weight"][1]) == "8"
    assert spec.opaque_ops


# --- values that repeat, with parameters that do not ----------------------------------------------


class Repeated(nn.Module):
    """Every unit four times, with a parameter for each of the copies."""

    def __init__(self, layer: Callable[[Tensor, nn.ParameterList], Tensor], *shapes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.layer, self.leave = nn.Linear(6, 4), layer, nn.Linear(16, 5)
        self.p = nn.ParameterList(torch.rand(shape) + 0.5 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.enter(x).tanh().repeat_interleave(4, 1), self.p)
        return self.leave(h) + self.leave(h.sin())


REPEATED = {
    "layer norm": (lambda h, p: F.layer_norm(h, [16], *p), (16,), (16,)),
    "rms norm": (lambda h, p: F.rms_norm(h, [16], p[0]), (16,)),
    "batch norm": (lambda h, p: F.batch_norm(h, *p), (16,), (16,), (16,), (16,)),
    "group norm": (lambda h, p: F.group_norm(h, 8, *p), (16,), (16,)),
    "prelu": (lambda h, p: F.prelu(h, p[0]), (16,)),
    "depthwise": (lambda h, p: F.conv1d(h[..., None], p[0], groups=16)[..., 0], (16, 1, 1)),
    "bias": (
        lambda h, p: F.conv1d(h[..., None], torch.ones(16, 16, 1).to(h), p[0])[..., 0],
        (16,),
    ),
}


@pytest.mark.parametrize("name", REPEATED)
def test_equal_values_that_are_scaled_differently_are_told_apart(name: str) -> None:
    model, inputs = Repeated(*REPEATED[name]), torch.randn(4, 6)
    spec = nlm.trace(model, inputs)
    assert not any(why == "refuted by the proof" for why in spec.pinned.values())
    assert str(spec.params["p.0"][0]) == str(spec.params["leave.weight"][1])


# --- recurrence -----------------------------------------------------------------------------------


class OverUnits(nn.Module):
    """A recurrent layer whose sequence is the units of another layer."""

    def __init__(self, layer: nn.RNNBase, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.layer, self.heads = nn.Linear(6, 8 * heads), layer, heads
        self.leave = nn.Linear(8 * heads * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        units = self.enter(x).tanh().view(len(x) * self.heads, 8, 1)
        batch_first = self.layer.batch_first
        h = self.layer(units if batch_first else units.transpose(0, 1))[0]
        return self.leave((h if batch_first else h.transpose(0, 1)).reshape(len(x), -1))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_sequence_stays_in_order(kind, batch_first: bool, heads: int) -> None:
    model = OverUnits(kind(1, 2, batch_first=batch_first), heads)
    spec = nlm.trace(model, torch.randn(4, 6))
    assert not any(why == "refuted by the proof" for why in spec.pinned.values())
    standing = {ref.group for ref in references(spec.params["enter.weight"][0])}
    assert not any(spec.groups[group].size == 8 for group in standing & spec.free.keys())


# --- operations that look like others -------------------------------------------------------------

OTHERS: dict[str, tuple] = {
    "inner product": (lambda h, p: torch.inner(h, p[0]), (8, 8)),
    "inner product of vectors": (lambda h, p: torch.inner(h, p[0])[:, None], (8,)),
    "differences from values": (lambda h, p: h.t().diff(dim=0, prepend=p[0]).t(), (1, 4)),
    "states for each unit": (
        lambda h, p: torch.gru(
            h.t().unsqueeze(-1), p[0], list(p[1:]), True, 1, 0.0, False, False, False
        )[0].sum(-1).t(),
        (1, 4, 2), (6, 1), (6, 2), (6,), (6,),
    ),
    "states for each head": (
        lambda h, p: torch.gru(
            h.unsqueeze(-1), p[0], list(p[1:]), True, 1, 0.0, False, False, False
        )[0].sum(-1),
        (1, 8, 2), (6, 1), (6, 2), (6,), (6,),
    ),
}  # fmt: skip


class Other(nn.Module):
    def __init__(self, middle: Callable[[Tensor, nn.ParameterList], Tensor], *shapes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.middle = nn.Linear(6, 8), middle
        self.p = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.leave = nn.Linear(middle(torch.randn(4, 8), self.p).shape[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.middle(self.enter(x).tanh(), self.p))


@pytest.mark.parametrize("name", OTHERS)
def test_operations_that_look_like_others(name: str) -> None:
    spec = nlm.trace(Other(*OTHERS[name]), torch.randn(4, 6))
    assert not any(why == "refuted by the proof" for why in spec.pinned.values())
