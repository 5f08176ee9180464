"""The corrected model as one module: it compiles, exports and goes to ONNX, with equal outputs."""

import copy

import onnx
import pytest
import torch
import transformers
from _networks import images
from correct._architectures import PreNorm, called, pair
from onnx.reference import ReferenceEvaluator
from torch import nn

import nlm

IDS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1])


@pytest.fixture(params=["before_activation", "residual"], scope="module")
def corrected(request):
    model, expert, x = pair(
        lambda: (nn.Sequential(PreNorm(), nn.Linear(12, 4)), torch.randn(12, 5, 12))
    )
    data = {"a": [x], "b": [x * 0.7 + 0.2]}
    return nlm.Tact.fit(model, dict.fromkeys(data, expert), data, points=request.param), x


def test_inlined_modules_compute_the_same(corrected):
    tact, x = corrected
    with torch.no_grad():
        one, mixed = tact.inline("b"), tact.inline()
        torch.testing.assert_close(one(x), tact(x, task="b"))
        torch.testing.assert_close(mixed(x, task=IDS), tact(x, task=IDS))
        torch.testing.assert_close(copy.deepcopy(one)(x), one(x))
    assert not any(module._forward_hooks for module in tact.model.modules())


def test_compiled(corrected):
    tact, x = corrected
    with torch.no_grad():
        compiled = torch.compile(tact.inline(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, task=IDS), tact(x, task=IDS))
        torch.testing.assert_close(compiled(x, task=1 - IDS), tact(x, task=1 - IDS))


@pytest.mark.parametrize("points", ["after_activation", "residual", None])
def test_compiled_as_it_is_it_computes_the_same(points):
    """Slower than inlined where functions are points: these are not compiled."""

    class Net(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.first, self.second, self.head = (nn.Linear(12, n) for n in (12, 12, 3))

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.head(x + torch.relu(self.second(x)))

    own = {task: Net(seed).eval() for seed, task in enumerate("ab", 1)}
    data = {task: [torch.randn(40, 12)] for task in own}
    tact = nlm.Tact.fit(Net(0).eval(), own, data, points=points)
    x, ids = torch.randn(6, 12), torch.tensor([0, 1, 1, 0, 0, 1])
    with torch.no_grad():
        compiled = torch.compile(tact, backend="eager")
        for task in ("a", "b", ids):
            torch.testing.assert_close(compiled(x, task=task), tact(x, task=task))


def test_one_graph_of_the_model_itself_is_refused_with_the_way_out(corrected):
    tact, x = corrected
    compiled = torch.compile(tact, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"fullgraph=True is the module .* that inline\(\) gives"):
        compiled(x, task=IDS)


@pytest.mark.parametrize("corrected", ["residual"], indirect=True)
def test_exported(corrected, tmp_path):
    tact, x = corrected
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            tact.inline(), (x,), {"task": IDS},
            dynamic_shapes={"args": ({0: batch},), "task": {0: batch}},
        )  # fmt: skip
        torch.export.save(program, tmp_path / "model.pt2")
        again = torch.export.load(tmp_path / "model.pt2").module()
        for rows in (slice(None), slice(5)):
            found = again(x[rows], task=IDS[rows])
            torch.testing.assert_close(found, tact(x[rows], task=IDS[rows]))


def test_onnx(tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 6),
            nn.ReLU(),
            nn.Linear(6, 2),
        )

    torch.manual_seed(0)
    own = {"a": build(), "b": build()}
    tact = nlm.Tact.fit(build(), own, {"a": [images(40)], "b": [images(40, 1) * 2]})
    x, ids = images(6, 3), torch.tensor([0, 1, 1, 0, 0, 1])
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(tact.inline(), (x,), path, kwargs={"task": ids}, dynamo=True, verbose=False)
    model = onnx.load(path)
    names = [each.name for each in model.graph.input]
    feed = dict(zip(names, (x.numpy(), ids.numpy()), strict=True))
    (found,) = ReferenceEvaluator(model).run(None, feed)
    torch.testing.assert_close(
        torch.from_numpy(found), called(tact, x, task=ids), rtol=1e-4, atol=1e-4
    )


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config), (torch.randn(12, 3, 16, 16),)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), (torch.randn(12, 3, 16, 16),)


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    mask = torch.ones(12, 6, dtype=torch.int64)
    mask[::2, 4:] = 0
    model = transformers.BertForSequenceClassification(config)
    return model, (torch.randint(50, (12, 6)), mask)


@pytest.mark.nightly
@pytest.mark.parametrize("build", [resnet, vit, bert])
def test_served_models_in_batches_of_any_size(build, tmp_path):
    """Fitted, read from its file, and exported by ids; folded for a task."""
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    names = ("pixel_values",) if len(inputs) == 1 else ("input_ids", "attention_mask")
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.abs().mean())
    data = {
        "a": [dict(zip(names, inputs, strict=True))],
        "b": [dict(zip(names, inputs, strict=True))],
    }
    fitted = nlm.Tact.fit(model, {"a": expert, "b": model}, data)
    fitted.save(tmp_path / "tact.safetensors")
    tact = nlm.Tact.load(tmp_path / "tact.safetensors", model)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"args": tuple({0: batch} for _ in inputs), "task": {0: batch}}
    path = str(tmp_path / "model.onnx")
    few = [each[:5] for each in inputs]
    with torch.no_grad():
        right = fitted(*few, task=IDS[:5]).logits
        torch.testing.assert_close(tact.fold("a")(*inputs).logits, tact(*inputs, task="a").logits)
        assert (tact(*inputs, task="a").logits - model(*inputs).logits).abs().max() > 1e-4
        program = torch.export.export(tact.inline(), inputs, {"task": IDS}, dynamic_shapes=shapes)
        torch.testing.assert_close(program.module()(*few, task=IDS[:5]).logits, right)
        torch.onnx.export(
            tact.inline(), inputs, path, kwargs={"task": IDS}, dynamo=True, verbose=False,
            dynamic_shapes=shapes,
        )  # fmt: skip
    served = onnx.load(path)
    onnx.checker.check_model(served)
    if build is bert:
        return  # onnx's evaluator has no GatherElements of more than 64 entries, which masks need
    entries = (each.name for each in served.graph.input)
    values = (each.numpy() for each in (*few, IDS[:5]))
    found = ReferenceEvaluator(served).run(None, dict(zip(entries, values, strict=True)))[0]
    torch.testing.assert_close(torch.from_numpy(found), right, rtol=1e-3, atol=1e-4)


def test_gradients_flow_through_a_mixed_batch(corrected):
    tact, x = corrected
    x = x.clone().requires_grad_()
    grads = [
        torch.autograd.grad(f(x, task=IDS).square().sum(), x)[0] for f in (tact, tact.inline())
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
