"""A permutation planted in a traced model comes back: the whole way without a table."""

import copy

import pytest
import torch
from torch import Tensor, nn

import nlm

Case = tuple[nn.Module, Tensor, dict[str, bool]]


def encoder_layer() -> Case:
    return nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), torch.randn(64, 7, 24), {}


def bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32,
    )  # fmt: skip
    return BertForSequenceClassification(config), torch.randint(0, 50, (64, 9)), {}


def decoder(family: str, **more) -> Case:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=32, **more,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    return model, torch.randint(0, 50, (64, 9)), {"use_cache": False}


def mixtral() -> Case:
    return decoder("Mixtral", num_local_experts=4, experts_implementation="batched_mm")


class Grouped(nn.Module):
    """Attention with two queries for each key and value, without positions: queries of a key and
    the units of both stand side by side where queries are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.q = nn.Linear(7, 10), nn.Linear(10, 24)
        self.k, self.v, self.after = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).tanh()
        q = self.q(x).unflatten(-1, (3, 2, 4))
        k, v = (linear(x).unflatten(-1, (3, 4)) for linear in (self.k, self.v))
        score = torch.einsum("btgqd,bsgd->bgqts", q, k).softmax(-1)
        return self.after(torch.einsum("bgqts,bsgd->btgqd", score, v).flatten(2))


def grouped() -> Case:
    return Grouped(), torch.randn(64, 6, 7), {}


def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config), torch.randn(64, 3, 16, 16), {}


def resnet() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=24, hidden_sizes=[48, 64], depths=[2, 2], layer_type="bottleneck",
        num_labels=5,
    )  # fmt: skip
    return ResNetForImageClassification(config), torch.randn(64, 3, 32, 32), {}


def perturbed(state: dict[str, Tensor], vectors: float, others: float) -> dict[str, Tensor]:
    """A state dict with noise: vectors of an untrained model are all ones or zeros."""
    return {
        name: tensor
        + (vectors if tensor.dim() == 1 else others * tensor.std()) * torch.randn_like(tensor)
        if tensor.is_floating_point() and "running_var" not in name
        else tensor
        for name, tensor in state.items()
    }


# how a model is made, and whether its modules show all groups
CASES = {
    "encoder layer": (encoder_layer, False),
    "bert": (bert, True),
    "llama": (lambda: decoder("Llama"), True),
    "mixtral": (mixtral, False),
    "grouped queries": (grouped, True),
    "vit": (vit, True),
    "resnet": (resnet, True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_planted_permutation_comes_back(case):
    build, is_shown = CASES[case]
    torch.manual_seed(0)
    model, inputs, options = build()
    model.eval().load_state_dict(perturbed(model.state_dict(), 0.05, 0.0))
    spec = nlm.trace(model, inputs[:2], options)
    planted = spec.random(3)
    other = copy.deepcopy(model)
    other.load_state_dict(spec.apply(planted, perturbed(model.state_dict(), 0.002, 0.05)))

    def recovered(method: str, **more) -> bool:
        result = nlm.align(model, other, spec, method, **more)
        assert bool(result.report.by_weights) == (method == "activations" and not is_shown)
        whole = spec.compose(planted, result.permutation)
        return all(torch.equal(whole[group], still) for group, still in spec.identity().items())

    assert any(group.parents for group in spec.free.values()) or case == "resnet"
    assert recovered("weights")
    before_activation = {
        str(site.layout).partition(":")[0]: name
        for name, site in spec.sites.items()
        if name.endswith("normalization")
    }  # of a convolutional network, in which some units never fire
    seen = {
        "data": [inputs],
        "forward": lambda model, batch: model(batch, **options),
        "observe": before_activation,
    }
    assert recovered("activations", **seen)
