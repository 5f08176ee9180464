"""Units move differently in every head, expert or part only where nothing mixes these.

Every case stands between two linear layers, or routes to stacked experts. What discovery finds must
hold, for smaller and larger batches too; the number of independent permutations is known by hand.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nlm

HEADS, INNER, EXPERTS = 4, 6, 4
WIDTH = HEADS * INNER

Middle = Callable[["Between", Tensor], Tensor]


class Between(nn.Module):
    """``leave(middle(self, enter(x)))``; ``weights`` are further parameters."""

    def __init__(self, middle: Middle, shape: tuple[int, ...], weights: list[tuple[int, ...]]):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.middle, self.shape = nn.Linear(6, WIDTH), middle, shape
        self.weights = nn.ParameterList(torch.randn(each) for each in weights)
        with torch.no_grad():
            width = self.features(torch.randn(3, 6)).shape[-1]
        self.leave = nn.Linear(width, 5)

    def features(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x)).view(len(x), *self.shape)
        return self.middle(self, h).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.features(x))


def count(model: nn.Module) -> int:
    """The independent permutations that are found; they hold for batches of any size."""
    spec = nlm.trace(model.eval(), torch.randn(3, 6))
    for batch in (1, 5):
        spec.verify(model, torch.randn(batch, 6))
    return spec.permutation_count


def convolved(h: Tensor, dim: int) -> Tensor:
    kernel = torch.tensor([[[1.0, 2.0, 1.0]]]).to(h)
    rows = h.movedim(dim, -1).flatten(0, 1)[:, None]
    return F.conv1d(rows, kernel, padding=1)[:, 0].unflatten(0, (len(h), -1)).movedim(-1, dim)


def pairs(h: Tensor, dim: int) -> Tensor:
    return h.movedim(dim, -1).unflatten(-1, (2, -1)).flip(-2).flatten(-2).movedim(-1, dim) * h


def attention(h: Tensor, dim: int, causal: bool = False) -> Tensor:
    h = h.transpose(1, dim)
    return F.scaled_dot_product_attention(h, h, h, is_causal=causal)


def gram(h: Tensor, dim: int) -> Tensor:
    return h.transpose(1, dim) @ h.transpose(1, dim).transpose(1, 2)


# Mixes positions along a dimension of [batch, heads, inner]; how many permutations there may be at
# most, along heads and along inner units.
MIXING: dict[str, tuple[int, int, Callable[[Tensor, int], Tensor]]] = {
    "cumsum": (1, 1, lambda h, dim: h.cumsum(dim)),
    "cummax": (1, 1, lambda h, dim: h.cummax(dim).values),
    "counted": (1, 1, lambda h, dim: h * (h > 0).cumsum(dim)),
    "flip": (1, 1, lambda h, dim: h + h.flip(dim)),
    "roll": (1, 1, lambda h, dim: h * h.roll(1, dim)),
    "swap": (2, 3, lambda h, dim: torch.stack(h.unbind(dim)[::-1], dim) + h),
    "reversed index": (
        1,
        1,
        lambda h, dim: h.index_select(dim, torch.arange(h.shape[dim] - 1, -1, -1)) + h,
    ),
    "argsort": (1, 1, lambda h, dim: h * h.argsort(dim)),
    "sort": (1 + INNER, 1 + HEADS, lambda h, dim: h.sort(dim).values),
    "softmax": (1 + INNER, 1 + HEADS, lambda h, dim: h.softmax(dim)),
    "normalize": (1 + INNER, 1 + HEADS, lambda h, dim: F.normalize(h, dim=dim)),
    "convolution": (1, 1, convolved),
    "max pool": (1, 1, lambda h, dim: F.max_pool1d(h.movedim(dim, -1), 3, 1, 1).movedim(-1, dim)),
    "gram": (2, 2, gram),
    "distances": (2, 2, lambda h, dim: torch.cdist(h.transpose(1, dim), h.transpose(1, dim))),
    "attention": (2, 2, attention),
    "causal attention": (1, 1, lambda h, dim: attention(h, dim, causal=True)),
    "cosine": (1, 1, lambda h, dim: F.cosine_similarity(h, h.flip(dim), dim=3 - dim)),
    "largest": (
        1 + INNER,
        1 + HEADS,
        lambda h, dim: h + h.gather(dim, h.argmax(dim, keepdim=True)),
    ),
}


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_heads_moves_alike_in_all_of_them(name: str, dim: int) -> None:
    *most, mix = MIXING[name]
    model = Between(lambda trap, h: mix(h, dim), (HEADS, INNER), [])
    assert count(model) <= most[dim - 1]


@pytest.mark.parametrize("dim", [1, 2])
def test_halves_that_are_exchanged_are_mixed(dim: int) -> None:
    model = Between(lambda trap, h: pairs(h, dim), (HEADS, INNER), [])
    assert count(model) == {1: 1 + 2, 2: 1 + 4}[dim]


def test_elements_that_are_repeated_in_two_ways_are_mixed() -> None:
    def middle(trap: Between, h: Tensor) -> Tensor:
        return h.repeat_interleave(2, 2) + h.repeat(1, 1, 2)

    assert count(Between(middle, (HEADS, INNER), [])) == 1


def test_units_inside_heads_that_nothing_mixes_move_in_each() -> None:
    model = Between(lambda trap, h: h.softmax(2), (HEADS, INNER), [])
    assert count(model) == 1 + HEADS


# --- experts --------------------------------------------------------------------------------------


def route(trap: Between, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of the two best experts, their numbers, and what their first layers give."""
    weight, chosen = (h @ trap.weights[0]).softmax(-1).topk(2, -1)
    return weight, chosen, torch.einsum("bd,bkdf->bkf", h, trap.weights[1][chosen]).tanh()


def down(trap: Between, hidden: Tensor, chosen: Tensor) -> Tensor:
    return torch.einsum("bkf,bkfo->bo", hidden, trap.weights[2][chosen])


def mixture(trap: Between, h: Tensor) -> Tensor:
    weight, chosen, hidden = route(trap, h)
    return down(trap, hidden * weight[..., None], chosen)


def between_choices(mix: Callable[[Tensor], Tensor]) -> Middle:
    def middle(trap: Between, h: Tensor) -> Tensor:
        _, chosen, hidden = route(trap, h)
        return down(trap, mix(hidden), chosen)

    return middle


def other_numbers(change: Callable[[Tensor], Tensor]) -> Middle:
    def middle(trap: Between, h: Tensor) -> Tensor:
        _, chosen, hidden = route(trap, h)
        return down(trap, hidden, change(chosen))

    return middle


def crossed(trap: Between, h: Tensor) -> Tensor:
    _, chosen, _ = route(trap, h)
    first, second = chosen.unbind(1)
    hidden = torch.einsum("bd,bdf->bf", h, trap.weights[1][first]).tanh()
    return torch.einsum("bf,bfo->bo", hidden, trap.weights[2][second])


def likeness(trap: Between, h: Tensor) -> Tensor:
    *_, hidden = route(trap, h)
    return h + torch.einsum("bkf,ckf->bc", hidden, hidden).sum(1, keepdim=True)


# The permutations of: what enters, the experts, their units, what leaves.
ROUTED: dict[str, tuple[int, Middle]] = {
    "mixture": (1 + 1 + EXPERTS + 1, mixture),
    "choices summed up": (4, between_choices(lambda hidden: hidden.cumsum(1))),
    "choices sorted": (4, between_choices(lambda hidden: hidden.sort(1).values)),
    "choices exchanged": (4, between_choices(lambda hidden: hidden.flip(1))),
    "softmax over choices": (4, between_choices(lambda hidden: hidden.softmax(1))),
    "samples exchanged": (4, between_choices(lambda hidden: hidden.roll(1, 0))),
    "samples centred": (4, between_choices(lambda hidden: hidden - 0.5 * hidden.mean(0))),
    "experts exchanged": (4, other_numbers(lambda chosen: chosen.flip(1))),
    "numbers sorted": (3, other_numbers(lambda chosen: chosen.sort(-1).values)),
    "numbers counted on": (3, other_numbers(lambda chosen: (chosen + 1) % EXPERTS)),
    "numbers padded": (3, other_numbers(lambda chosen: F.pad(chosen[:, :1], (0, 1), value=2))),
    "two experts in a row": (4, crossed),
    "likeness of samples": (3, likeness),
}


@pytest.mark.parametrize("name", ROUTED)
def test_experts_have_orders_of_their_own_where_nothing_mixes_them(name: str) -> None:
    most, middle = ROUTED[name]
    shapes = [(WIDTH, EXPERTS), (EXPERTS, WIDTH, 7), (EXPERTS, 7, 9)]
    assert count(Between(middle, (WIDTH,), shapes)) <= most
    if name == "mixture":
        assert count(Between(middle, (WIDTH,), shapes)) == most


# --- stacks ---------------------------------------------------------------------------------------

# Three layers' outputs stacked: how many permutations there are, besides what enters: of their
# units together or in each, and of the layers themselves.
STACKED: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "side by side": (4, lambda z: z.tanh()),
    "gram": (2, lambda z: z @ z.transpose(1, 2)),
    "attention": (2, lambda z: F.scaled_dot_product_attention(z, z, z)),
    "exchanged": (2, lambda z: z * z.flip(1)),
    "differences": (2, lambda z: (z[:, :, None] - z[:, None]).abs().sum(-1)),
    "three of them": (2, lambda z: torch.einsum("bif,bjf,bkf->bijk", z, z, z)),
    "the second": (1, lambda z: z[:, 1]),
    "summed": (9, lambda z: z.sum(1)),  # the layers in another order for each unit
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers_keep_their_own_orders_where_they_do_not_meet(name: str) -> None:
    most, mix = STACKED[name]

    def middle(trap: Between, h: Tensor) -> Tensor:
        return mix(torch.stack([h @ weight for weight in trap.weights], 1))

    assert count(Between(middle, (WIDTH,), [(WIDTH, 8)] * 3)) <= 1 + most
