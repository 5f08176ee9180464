"""Small networks with structure (heads, groups, experts, sums) and their specifications by hand."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlm.symmetry import AxisGroup, PermutationSpec, Site, parse


def specification(
    groups: str,
    params: dict[str, list[str]],
    sites: dict[str, tuple[int, str]] | None = None,
) -> PermutationSpec:
    """From "h:3 d:2<h" and the texts of layouts; a group with "!" is fixed."""
    found = {}
    for text in groups.split():
        head, _, parents = text.partition("<")
        name, size = head.split(":")
        above = tuple(filter(None, parents.split(",")))
        found[name] = AxisGroup(name, int(size.rstrip("!")), above, fixed=size.endswith("!"))
    return PermutationSpec(
        found,
        {name: tuple(map(parse, dims)) for name, dims in params.items()},
        {name: Site(dim, parse(layout)) for name, (dim, layout) in (sites or {}).items()},
    )


class Attention(nn.Module):
    """Residual attention and feed-forward on [n, t, 6]; ``order`` says how q, k and v are fused."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.embed = nn.Linear(6, 24)
        self.norm = nn.LayerNorm(24)
        self.qkv = nn.Linear(24, 3 * 4 * 5)
        self.out = nn.Linear(4 * 5, 24)
        self.up, self.act, self.down = nn.Linear(24, 30), nn.GELU(), nn.Linear(30, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        shape = {"thirds": (3, 4, 5), "heads": (4, 3, 5)}[self.order]
        qkv = self.qkv(self.norm(x)).unflatten(-1, shape)
        q, k, v = qkv.movedim(-3 if self.order == "thirds" else -2, 0).transpose(2, 3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(self.act(self.up(x))))


def attention(order: str, fused: str) -> tuple[nn.Module, PermutationSpec, Tensor]:
    spec = specification(
        "s:3! r:24 h:4 d:5<h e:5<h f:30",
        {
            "embed.weight": ["r:24", "6"],
            "embed.bias": ["r:24"],
            "norm.weight": ["r:24"],
            "norm.bias": ["r:24"],
            "qkv.weight": [fused, "r:24"],
            "qkv.bias": [fused],
            "out.weight": ["r:24", "h:4 x e:5"],
            "out.bias": ["r:24"],
            "up.weight": ["f:30", "r:24"],
            "up.bias": ["f:30"],
            "down.weight": ["r:24", "f:30"],
            "down.bias": ["r:24"],
            "head.weight": ["5", "r:24"],
            "head.bias": ["5"],
        },
        {"embed": (-1, "r:24"), "qkv": (-1, fused), "act": (-1, "f:30")},
    )
    return Attention(order), spec, torch.randn(64, 7, 6)


class GroupedQueries(nn.Module):
    """Attention in which 3 queries share a key and a value, on [n, t, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 3, 4)).movedim(1, 3)  # [n, kv, rep, t, d]
        k, v = (part(x).unflatten(-1, (2, 1, 4)).movedim(1, 3) for part in (self.k, self.v))
        return self.o(torch.tanh(q @ k.mT @ v).movedim(3, 1).flatten(2))


def grouped_queries() -> tuple[nn.Module, PermutationSpec, Tensor]:
    queries, values = "kv:2 x rep:3 x d:4", "kv:2 x e:4"
    spec = specification(
        "kv:2 rep:3<kv d:4<kv e:4<kv",
        {
            "q.weight": [queries, "12"],
            "q.bias": [queries],
            "k.weight": ["kv:2 x d:4", "12"],
            "k.bias": ["kv:2 x d:4"],
            "v.weight": [values, "12"],
            "v.bias": [values],
            "o.weight": ["5", "kv:2 x rep:3 x e:4"],
            "o.bias": ["5"],
        },
        {"q": (-1, queries), "k": (-1, "kv:2 x d:4"), "v": (-1, values)},
    )
    return GroupedQueries(), spec, torch.randn(256, 5, 12)


def group_norm() -> tuple[nn.Module, PermutationSpec, Tensor]:
    """Channels in groups, on both axes of the second convolution."""
    channels = "g:4 x c:6"
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.GroupNorm(4, 24), nn.ReLU(),
        nn.Conv2d(24, 24, 3), nn.GroupNorm(4, 24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip
    spec = specification(
        "g:4 c:6<g p:4 q:6<p",
        {
            "0.weight": [channels, "3", "3", "3"],
            "0.bias": [channels],
            "1.weight": [channels],
            "1.bias": [channels],
            "3.weight": ["p:4 x q:6", channels, "3", "3"],
            "3.bias": ["p:4 x q:6"],
            "4.weight": ["p:4 x q:6"],
            "4.bias": ["p:4 x q:6"],
            "8.weight": ["5", "p:4 x q:6 x 4"],
            "8.bias": ["5"],
        },
        {
            "2": (1, channels),
            "5": (1, "p:4 x q:6"),
            "6": (1, "p:4 x q:6"),
            "7": (1, "p:4 x q:6 x 4"),
        },
    )
    return model, spec, torch.randn(64, 3, 9, 9)


class Experts(nn.Module):
    """A soft mixture of experts whose weights are stacked, on [n, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 4)
        self.up = nn.Parameter(torch.randn(4, 7, 12))
        self.down = nn.Parameter(torch.randn(4, 5, 7))
        self.hidden = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("efd,nd->nef", self.up, x).relu().flatten(1)
        hidden = self.hidden(hidden).unflatten(1, (4, 7))
        return torch.einsum("ne,ecf,nef->nc", self.gate(x).softmax(-1), self.down, hidden)


def experts() -> tuple[nn.Module, PermutationSpec, Tensor]:
    spec = specification(
        "e:4 f:7<e",
        {
            "gate.weight": ["e:4", "12"],
            "gate.bias": ["e:4"],
            "up": ["e:4", "f:7", "12"],
            "down": ["e:4", "5", "f:7"],
        },
        {"gate": (1, "e:4"), "hidden": (1, "e:4 x f:7")},
    )
    return Experts(), spec, torch.randn(256, 12)


def grouped_convolution() -> tuple[nn.Module, PermutationSpec, Tensor]:
    """Both channel axes of the second convolution are inside its groups."""
    model = nn.Sequential(
        nn.Conv2d(6, 24, 1), nn.ReLU(), nn.Conv2d(24, 32, 3, groups=4), nn.ReLU(),
        nn.Conv2d(32, 6, 1),
    )  # fmt: skip
    spec = specification(
        "g:4 i:6<g o:8<g",
        {
            "0.weight": ["g:4 x i:6", "6", "1", "1"],
            "0.bias": ["g:4 x i:6"],
            "2.weight": ["g:4 x o:8", "i:6", "3", "3"],
            "2.bias": ["g:4 x o:8"],
            "4.weight": ["6", "g:4 x o:8", "1", "1"],
            "4.bias": ["6"],
        },
        {"1": (1, "g:4 x i:6"), "3": (1, "g:4 x o:8")},
    )
    return model, spec, torch.randn(64, 6, 5, 5)


class Dense(nn.Module):
    """Each convolution reads what all before it wrote, on [n, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(15, 10, 3, padding=1)
        self.three, self.act = nn.Conv2d(25, 8, 3, padding=1), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.one(x).relu()], 1)
        x = self.act(torch.cat([x, self.two(x).relu()], 1))
        return self.three(x)


def dense() -> tuple[nn.Module, PermutationSpec, Tensor]:
    spec = specification(
        "a:12 b:10",
        {
            "one.weight": ["a:12", "3", "3", "3"],
            "one.bias": ["a:12"],
            "two.weight": ["b:10", "(3 + a:12)", "3", "3"],
            "two.bias": ["b:10"],
            "three.weight": ["8", "(3 + a:12 + b:10)", "3", "3"],
            "three.bias": ["8"],
        },
        {"act": (1, "(3 + a:12 + b:10)")},
    )
    return Dense(), spec, torch.randn(64, 3, 8, 8)


class Recurrent(nn.Module):
    """A state that a square weight maps to itself, on [n, t, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.step = nn.Linear(6, 24), nn.Linear(24, 24, bias=False)
        self.act, self.head = nn.Tanh(), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = self.enter(x[:, 0])
        for number in range(1, x.shape[1]):
            state = torch.tanh(self.enter(x[:, number]) + self.step(state))
        return self.head(self.act(state))


def recurrent() -> tuple[nn.Module, PermutationSpec, Tensor]:
    spec = specification(
        "r:24",
        {
            "enter.weight": ["r:24", "6"],
            "enter.bias": ["r:24"],
            "step.weight": ["r:24", "r:24"],
            "head.weight": ["5", "r:24"],
            "head.bias": ["5"],
        },
        {"act": (1, "r:24")},
    )
    return Recurrent(), spec, torch.randn(256, 4, 6)


STRUCTURED: dict[str, Callable[[], tuple[nn.Module, PermutationSpec, Tensor]]] = {
    "attention, fused as a sum": lambda: attention("thirds", "(h:4 x d:5 + h:4 x d:5 + h:4 x e:5)"),
    "attention, fused as a family": lambda: attention(
        "thirds", "s:3 x s<h:4 | h:4 | h:4> x s<d:5 | d:5 | e:5>"
    ),
    "attention, fused in each head": lambda: attention("heads", "h:4 x s:3 x s<d:5 | d:5 | e:5>"),
    "grouped queries": grouped_queries,
    "group norm": group_norm,
    "experts": experts,
    "grouped convolution": grouped_convolution,
    "dense": dense,
    "recurrent": recurrent,
}
