"""The merged model: it owns its network and weights, survives threads, moves, copies and files."""

import copy
import pickle
import threading

import pytest
import torch
from _networks import convnet, images, merge_options, mlp, vectors
from torch import nn

import nlm
from nlm._multitask import with_state
from nlm.merge import METHODS


def merged(method: str = "task_arithmetic", build=mlp, head: str = "4"):
    """Two experts and their merge."""
    experts = {"a": build(0), "b.c": build(1)}
    options = merge_options(method, experts)
    return experts, nlm.merge(experts, build(2), method, heads=(head,), **options)


def same(ours: nn.Module, theirs: nn.Module, tasks=("a", "b.c")) -> bool:
    return all(torch.equal(ours(vectors(), task=t), theirs(vectors(), task=t)) for t in tasks)


def test_threads_do_not_meet_and_the_expert_stays_as_it_is():
    experts, result = merged()
    before = copy.deepcopy(experts["a"].state_dict())
    model, x = result.model(experts["a"]), vectors(2000)
    expected = {task: model(x, task=task) for task in model.tasks}
    wrong = []

    def work(task: str) -> None:
        for _ in range(60):
            if not torch.equal(model(x, task=task), expected[task]):
                wrong.append(task)

    threads = [threading.Thread(target=work, args=(task,)) for task in model.tasks * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for name, tensor in experts["a"].state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_network_holds_no_weights():
    experts, result = merged()
    model = result.model(experts["a"])
    assert model.network is not experts["a"] and not list(model.parameters())
    assert all(buffer.is_meta for buffer in model.network.buffers())
    assert not model.training and not model.network.training


@pytest.mark.parametrize("method", ["task_arithmetic", "tall_mask"])
def test_its_state_dict_is_the_merged_weights(method):
    experts, result = merged(method)
    model = result.model(experts["a"])
    state = model.state_dict()
    assert torch.equal(state["shared.0.weight"], result["0.weight"])
    assert torch.equal(state["heads.b%2Ec.4.bias"], experts["b.c"][4].bias)
    other = nlm.merge({"a": mlp(5), "b.c": mlp(6)}, mlp(7), method, heads=("4",))
    before = {name: tensor.clone() for name, tensor in other.tensors().items()}
    loaded = other.model(mlp(8))
    nn.ModuleList([loaded]).load_state_dict({f"0.{n}": t for n, t in state.items()})
    assert same(loaded, model)
    assert all(torch.equal(tensor, before[n]) for n, tensor in other.tensors().items())
    with pytest.raises(RuntimeError, match=r'Missing key.*"shared.0.weight"'):
        loaded.load_state_dict({n: t for n, t in state.items() if n != "shared.0.weight"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"x"'):
        loaded.load_state_dict({**state, "x": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"has the shape of the one it replaces, got \[1\]"):
        loaded.load_state_dict({**state, "shared.0.weight": torch.ones(1)})


@pytest.mark.parametrize("method", METHODS)
def test_moving_it_moves_the_weights(method):
    experts, result = merged(method)
    model = result.model(experts["a"])
    expected = model(vectors(), task="a")
    wide = nn.ModuleList([model]).double()[0](vectors().double(), task="a")
    assert wide.dtype == torch.float64 and result["0.weight"].dtype == torch.float32
    torch.testing.assert_close(wide.float(), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_have_a_lock_of_their_own(copied):
    experts, result = merged("tall_mask")
    model = result.model(experts["a"])
    with model.lock:
        other = copied(model)
        thread = threading.Thread(target=other, args=(vectors(),), kwargs={"task": "a"})
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    assert same(other, model)


def test_it_compiles_in_one_piece():
    for method in ("task_arithmetic", "tall_mask"):
        experts, result = merged(method)
        model = result.model(experts["a"])
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert same(compiled, model)


def test_a_forward_pass_in_training_mode_leaves_the_statistics():
    experts, result = merged(build=convnet, head="10")
    model = result.model(experts["a"]).train()
    before = result["1.running_mean"].clone()
    model(images(), task="a")
    assert torch.equal(result["1.running_mean"], before)
    assert int(result["1.num_batches_tracked"]) == 0


def test_changed_weights_are_seen_through_masks():
    _, result = merged("tall_mask")
    first = result.for_task("a")["0.weight"]
    assert result.for_task("a")["0.weight"] is first
    result["0.weight"].add_(1)
    mask = result.mask("a", "0.weight")
    assert torch.equal(result.for_task("a")["0.weight"][mask], first[mask] + 1)
    result["0.weight"] = torch.zeros_like(first)
    assert not result.for_task("a")["0.weight"][mask].any()


class Rotary(nn.Module):
    """Tied weights, a recurrent layer, a buffer that is not saved, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)
        self.register_buffer("angles", torch.randn(6), persistent=False)

    def forward(self, ids):
        return self.head(self.norm(self.lstm(self.embed(ids) * self.angles)[0]))


def test_tied_weights_and_buffers_that_are_not_saved():
    experts = {"a": Rotary().eval(), "b": Rotary().eval()}
    experts["b"].angles.copy_(experts["a"].angles)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        model = nlm.merge({"a": experts["a"]}, method="linear").model(experts["b"])
        torch.testing.assert_close(model(ids, task="a"), experts["a"](ids))
        both = nlm.merge(experts, method="linear").model(experts["a"])
        plain = both.for_task("b")
        torch.testing.assert_close(both(ids, task="b"), plain(ids))
    assert plain.head.weight is plain.embed.weight and not plain.norm.bias.requires_grad
    assert list(plain.state_dict()) == list(experts["a"].state_dict())
    names = {name for name, _ in experts["a"].named_parameters()}
    assert {name for name, _ in plain.named_parameters()} == names
    untied = nlm.merge(experts, method="linear", heads=("head",)).model(experts["a"])
    plain = untied.for_task("b")
    assert torch.equal(plain.head.weight, experts["b"].head.weight)
    assert not torch.equal(plain.embed.weight, plain.head.weight)


def test_with_state_tells_the_sizes():
    def build(size: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 2 * size, 3, groups=2), nn.BatchNorm2d(2 * size),
            nn.ConvTranspose2d(2 * size, 4, 3, groups=2), nn.GroupNorm(2, 4),
            nn.Embedding(size, 3), nn.LayerNorm(size), nn.Linear(size, 3),
        )  # fmt: skip

    filled = with_state(build(3), build(5).state_dict())
    assert [repr(module) for module in filled] == [repr(module) for module in build(5)]


def test_weights_of_another_network_are_named():
    _, result = merged()
    with pytest.raises(ValueError, match=r"got 1.weight, .* missing and 2.weight, 2.bias extra"):
        result.model(convnet())(images(), task="a")


@pytest.mark.parametrize("method", METHODS)
def test_a_file_gives_everything_back(tmp_path, method):
    experts, result = merged(method)
    path = tmp_path / "merged.safetensors"
    result.save(path)
    found = nlm.Merged.load(path)
    assert found.tasks == ("a", "b.c") and set(found) == set(result)
    assert same(found.model(mlp(9)), result.model(experts["a"]))
    with pytest.raises(FileExistsError, match="only with force"):
        result.save(path)
    result.save(path, force=True)
    tact = nlm.Tact.fit(result.model(mlp(9)), experts, {t: [vectors()] for t in experts})
    tact.save(tmp_path / "tact.safetensors")
    assert same(nlm.Tact.load(tmp_path / "tact.safetensors", found.model(mlp(9))), tact)
    with pytest.raises(ValueError, match="a file of Merged is read, got Tact in"):
        nlm.Merged.load(tmp_path / "tact.safetensors")


def test_a_merge_without_heads_has_a_file_too(tmp_path):
    result = nlm.merge({"a": mlp(0), "b": mlp(1)}, method="linear")
    result.save(tmp_path / "m")
    assert nlm.Merged.load(tmp_path / "m").tasks == ("a", "b")
