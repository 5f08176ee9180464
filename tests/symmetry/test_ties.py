"""Where values may be equal the place decides which is taken: what is taken numbers nothing."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.symmetry.discover import discover


class Chosen(nn.Module):
    """Rows of a table, by the number of the largest of some units."""

    def __init__(self, choose: Callable[[Tensor], Tensor], rows: int = 6) -> None:
        super().__init__()
        self.a, self.rows = nn.Linear(4, 6), nn.Parameter(torch.randn(rows, 3))
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[self.choose(self.a(x))]


TYING = {
    "relu": torch.relu,
    "sign": torch.sign,
    "comparison": lambda x: (x > 0).float(),
    "relu and more": lambda x: torch.relu(x) + 1,
    "relu of a sum": lambda x: torch.relu(x).cumsum(0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "mask": lambda x: x.masked_fill(x < 0, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "larger of two": lambda x: torch.max(x, torch.zeros(1)),
    "rounded quotient": lambda x: torch.div(x, 10, rounding_mode="floor"),
    "looked up twice": lambda x: x[:, torch.tensor([0, 0, 1, 1, 2, 2])],
    "rounded inside": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255),
}


@pytest.mark.parametrize("name", TYING)
def test_places_among_equal_values_number_nothing(name: str) -> None:
    model = Chosen(lambda x: TYING[name](x).argmax(-1)).eval()
    spec = discover(model, (torch.randn(8, 4),), {})
    assert str(spec.params["rows"][0]) == "6" and not spec.free


@pytest.mark.parametrize("keep", [torch.tanh, lambda x: x.softmax(-1), lambda x: 2 * x])
def test_places_among_different_values_number_the_units(keep: Callable[[Tensor], Tensor]) -> None:
    spec = discover(Chosen(lambda x: keep(x).argmax(-1)).eval(), (torch.randn(8, 4),), {})
    assert str(spec.params["rows"][0]) == "g0:6"


def test_repeated_units_number_nothing() -> None:
    model = Chosen(lambda x: x.repeat(1, 2).argmax(-1), rows=12).eval()
    assert not discover(model, (torch.randn(8, 4),), {}).free


class Voting(nn.Module):
    """Rows of a table, by the number of the module whose result is the largest."""

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.rows, self.keep = nn.Parameter(torch.randn(3, 2)), keep

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.cat([self.keep(head(x)) for head in self.heads], -1)
        return self.rows[votes.argmax(-1)]


def test_modules_of_which_results_may_be_equal_are_not_exchanged() -> None:
    for keep, found in ((torch.tanh, 1), (torch.relu, 0)):
        spec = discover(Voting(keep).eval(), (torch.randn(8, 4),), {})
        assert len(spec.free) == found and bool(spec.stacks) == bool(found)


class Numbered(nn.Module):
    """A number that the code reads out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rows = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        number = self.a(x)[0].argmax().item()
        torch._check(0 <= number)
        torch._check(number < 6)
        return self.rows[number] * x.sum()


def test_numbers_that_leave_the_graph_stay() -> None:
    spec = discover(Numbered().eval(), (torch.randn(8, 4),), {})
    assert str(spec.params["a.weight"][0]) == "6"


class Scattering(nn.Module):
    """Five units write into three places: where two meet, one stays."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.values, self.scores = nn.Linear(4, 5), nn.Linear(4, 15)
        self.leave = nn.Parameter(torch.randn(3, 2))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        places = self.scores(x).view(-1, 5, 3).argmax(-1)
        return self.write(x.new_zeros(len(x), 3), places, self.values(x)) @ self.leave


def test_units_that_write_over_one_another_stay() -> None:
    over = Scattering(lambda target, places, values: target.scatter(1, places, values))
    spec = discover(over.eval(), (torch.randn(8, 4),), {})
    assert str(spec.params["values.weight"][0]) == "5"
    add = Scattering(lambda target, places, values: target.scatter_add(1, places, values))
    spec = discover(add.eval(), (torch.randn(8, 4),), {})
    assert str(spec.params["values.weight"][0]) != "5"


class Putting(nn.Module):
    """Rows are put in places that depend on how many weights are positive."""

    def __init__(self, accumulate: bool) -> None:
        super().__init__()
        self.w, self.rows = nn.Parameter(torch.randn(20, 8)), nn.Parameter(torch.randn(20, 5))
        self.accumulate = accumulate

    def forward(self, x: Tensor) -> Tensor:
        places = (self.w > 0).sum(-1)
        put = x.new_zeros(9, 5).index_put((places,), self.rows, accumulate=self.accumulate)
        return x.sum() * put


def test_rows_that_are_put_over_one_another_stay() -> None:
    for accumulate in (False, True):
        spec = discover(Putting(accumulate).eval(), (torch.randn(8, 4),), {})
        assert str(spec.params["rows"][0]) == ("g0:20" if accumulate else "f0:20")


def test_samples_that_belong_to_channels_are_not_understood() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
            self.samples = nn.Parameter(torch.rand(1, 8, 2))

        def forward(self, x: Tensor) -> Tensor:
            pooled = F.fractional_max_pool2d(
                self.enter(x), 2, output_size=(5, 5), _random_samples=self.samples
            )
            return self.leave(pooled.mean((2, 3)))

    spec = discover(Pooling().eval(), (torch.randn(1, 3, 14, 14),), {})
    assert str(spec.params["samples"][1]) == "8" and str(spec.params["enter.weight"][0]) == "8"
