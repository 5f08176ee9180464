"""Passes that stop and go on: replies, errors, what they share and what they do not."""

import threading
from contextlib import nullcontext

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from correct._architectures import NETWORKS, pair
from torch import nn

import nlm
from nlm.correct.lockstep import copy_of, lockstep, pause, standing


def test_a_pass_is_a_generator():
    seen = []

    def call(name):
        for number in range(3):
            seen.append((name, pause((name, number))))

    with lockstep([lambda: call("a"), lambda: call("b"), lambda: None]) as (a, b, nothing):
        assert [a.advance(), b.advance(), nothing.advance()] == [("a", 0), ("b", 0), None]
        assert [a.advance(5), a.advance(6), b.advance(7)] == [("a", 1), ("a", 2), ("b", 1)]
        assert a.advance(8) is None and a.advance() is None
    assert seen == [("a", 5), ("a", 6), ("b", 7), ("a", 8)]


def test_errors_and_ends():
    ended = []

    def call(error):
        try:
            pause(1)
            raise error
        finally:
            ended.append(error)

    before = threading.active_count()
    with pytest.raises(KeyError, match="one"):
        with lockstep([lambda: call(KeyError("one")), lambda: call(KeyError("two"))]) as (one, two):
            assert [one.advance(), two.advance()] == [1, 1]
            one.advance()
    assert [str(error) for error in ended] == ["'one'", "'two'"]
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "settings", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), nullcontext]
)
def test_settings_of_the_thread_are_taken_over(settings):
    def of_here():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            (torch.is_autocast_enabled("cpu")),
        )

    with settings():
        with lockstep([lambda: pause(of_here())]) as (one,):
            assert one.advance() == of_here()


def test_copies_share_tensors_and_nothing_else():
    model = convnet()
    model.note = []
    own = copy_of(model)
    assert own[0].weight is model[0].weight and own[1].running_mean is model[1].running_mean
    own.note.append(1)
    own[0].register_forward_hook(lambda *_: None)
    assert not model.note and not model[0]._forward_hooks
    multi = nlm.merge({"a": mlp(1), "b": mlp(2)}, mlp(0), heads=("4",)).model(mlp(1))
    own = copy_of(multi)
    assert own.states is multi.states and own.network is not multi.network
    assert own.lock is not multi.lock
    assert torch.equal(own(vectors(3), task="b"), multi(vectors(3), task="b"))


@pytest.mark.parametrize("kind", [nlm.Tact, nlm.Repair])
@pytest.mark.parametrize("multi", [False, True])
def test_lockstep_is_recomputation_to_the_bit(kind, multi):
    own = {"a": convnet(1), "b": convnet(2)}
    model = convnet(0)
    if multi:
        model = nlm.merge(own, model, scale=0.5, heads=("10",)).model(own["a"])
    data = {"a": [images(20)], "b": [images(23, 1) * 2]}
    fits = [kind.fit(model, own, data, micro_batch=8, recompute=r) for r in (False, True)]
    for point in fits[0].points:
        for one, other in zip(*(fit.correction(point) for fit in fits), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["resnet", "vision transformer", "encoder", "bert"])
def test_refit_in_lockstep_is_refit_by_recomputation(name):
    model, expert, x = pair(NETWORKS[name])
    x = x.double() if x.is_floating_point() else x
    own = {"a": expert.double(), "b": model.double()}
    data = {"a": [x], "b": [x[:7]]}
    fits = [
        nlm.refit(model, own, data, micro_batch=size, recompute=recompute).state_dict()
        for size, recompute in ((5, False), (5, True), (None, False))
    ]
    for entry, weight in fits[0].items():
        for other in fits[1:]:
            torch.testing.assert_close(other[entry], weight, rtol=1e-9, atol=1e-9)
    assert any(not torch.equal(weight, model.state_dict()[n]) for n, weight in fits[0].items())


def test_what_a_module_keeps_is_its_own_micro_batchs():
    class Keeps(nn.Module):
        """Reads at its end what it kept at its start."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.head = nn.Linear(12, 2)

        def forward(self, x):
            self.kept = x
            return self.head(self.second(self.first(x).relu() * self.kept.mean(1, True)).relu())

    torch.manual_seed(0)
    model, own, data = Keeps(), {"a": Keeps()}, {"a": [vectors(40)]}
    whole, parts = (nlm.Tact.fit(model, own, data, micro_batch=size) for size in (None, 16))
    torch.testing.assert_close(parts.correction("second"), whole.correction("second"))


def test_each_micro_batch_takes_one_pass():
    runs = []

    def forward(model, batch, **kwargs):
        runs.append(model)
        return model(batch)

    nlm.Tact.fit(mlp(0), {"a": mlp(1)}, {"a": [vectors(40)]}, micro_batch=10, forward=forward)
    assert len(runs) == 2 + 4 + 4  # points, expert, merged model
    runs.clear()
    nlm.refit(mlp(0), {"a": mlp(1)}, {"a": [vectors(40)]}, micro_batch=10, forward=forward)
    assert len(runs) == 1 + 4 + 4  # steps, expert, merged model


def test_weights_of_a_task_are_made_once():
    own = {"a": mlp(1), "b": mlp(2)}
    merged = nlm.merge(own, mlp(0), method="tall_mask")
    model = standing(merged.model(mlp(1)))
    states = [copy_of(model).states.for_task("b") for _ in range(2)]
    assert all(states[0][name] is states[1][name] for name in states[0])
    assert torch.equal(model(vectors(3), task="b"), merged.model(mlp(1))(vectors(3), task="b"))


def test_what_progress_raises_ends_all_passes():
    def stop(point, done, total):
        raise KeyboardInterrupt

    model, before = mlp(0), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        nlm.Repair.fit(model, {"a": mlp(1)}, {"a": [vectors(40)]}, micro_batch=10, progress=stop)
    assert threading.active_count() == before
    assert not any(module._forward_hooks for module in model.modules())
