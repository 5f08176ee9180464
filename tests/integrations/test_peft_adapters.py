"""LoRA adapters of another base, by real peft: a permuted base computes the same with them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from symmetry.mixtures import Mixture, softmax
from symmetry.test_stacks import written
from torch import Tensor, nn

from nlm.align import AlignmentReport, AlignmentResult
from nlm.align.orthogonal import OrthogonalAlignment
from nlm.gauge import Gauge
from nlm.integrations.peft import align_adapter, use_as_default
from nlm.symmetry import PermutationSpec, pretrained

pytest.importorskip("peft", reason="a host, of the extra [hosts]")

import peft
from integrations._llamas import llama
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

pytestmark = pytest.mark.host

IDS = torch.arange(14).view(2, 7)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
        architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def base_llama() -> nn.Module:
    model = llama(0, scale=0.2)
    model.config.architectures = ["LlamaForCausalLM"]
    return model


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PermutationSpec]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        makers: list[Callable[[], nn.Module]] = [base_llama, bert, gpt2]
        return {make.__name__: pretrained.trace_config(make().config) for make in makers}


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "ranks by pattern": (
        base_llama,
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    ),
    "embeddings and a head": (
        base_llama,
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_dora": True},
    ),
    "trained tokens": (
        base_llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}},
    ),
    "biases and what is saved whole": (
        bert,
        {
            "target_modules": ["query", "value", "dense"], "bias": "all", "lora_bias": True,
            "modules_to_save": ["classifier"],
        },
    ),
    "weights in the other order": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ),
}  # fmt: skip


def trained(model: nn.Module, folder: Path, seed: int = 0, **settings) -> nn.Module:
    """The model with an adapter of random numbers, which is saved too."""
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=make)
                shift = parameter if "magnitude" in name or "lora" not in name else 0.0
                parameter.copy_(shift + 0.1 * drawn)
    adapted.save_pretrained(folder)
    return adapted.eval()


def computed(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_permuted_base_computes_the_same_with_the_moved_adapter(
    specs: dict[str, PermutationSpec], tmp_path: Path, name: str
) -> None:
    make, settings = ADAPTERS[name]
    spec, base = specs[make.__name__], make()
    there = trained(base, tmp_path / "b", **settings)
    permutation = spec.random(3)
    moved = align_adapter(tmp_path / "b", permutation, spec, tmp_path / "a", base_model="base_a")
    other = make()
    other.load_state_dict(spec.apply(permutation, base.state_dict()))
    here = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "a").eval()
    torch.testing.assert_close(computed(here), computed(there), rtol=2e-5, atol=2e-5)
    unmoved = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "b").eval()
    assert float((computed(unmoved) - computed(there)).abs().max()) > 0.01
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base_a"
    state = peft.get_peft_model_state_dict(there)
    again = align_adapter(state, permutation, spec, fan_in_fan_out="fan_in_fan_out" in settings)
    assert list(again) == list(state)
    assert all(torch.equal(again[key], moved[key]) for key in moved)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["linear", "cat", "ties", "ties_svd", "magnitude_prune"])
def test_adapters_of_two_bases_are_merged_on_one(
    specs: dict[str, PermutationSpec], tmp_path: Path, how: str
) -> None:
    """The alignment is found by the bases' weights; the host's merge of what was never moved."""
    import nlm

    spec, base = specs["base_llama"], base_llama()
    spec.verify(base, (), {"input_ids": IDS}, seeds=1) if not spec.proven else None
    settings = {"target_modules": LINEAR}
    trained(base, tmp_path / "a", 1, **settings)
    trained(base, tmp_path / "b", 2, **settings)
    planted = spec.random(4)
    other = spec.apply(planted, base.state_dict())
    align_adapter(tmp_path / "b", planted, spec, tmp_path / "on_other")
    found = nlm.align(base.state_dict(), other, spec)
    found.save(tmp_path / "found.safetensors")
    align_adapter(tmp_path / "on_other", tmp_path / "found.safetensors", spec, tmp_path / "back")
    results = []
    for second, context in ((tmp_path / "back", True), (tmp_path / "b", False)):
        model = peft.PeftModel.from_pretrained(base_llama(), tmp_path / "a", adapter_name="a")
        model.load_adapter(second, adapter_name="b")
        arguments = (["a", "b"], [0.6, 0.4], "both", how)
        if context:
            with use_as_default():
                model.add_weighted_adapter(*arguments, density=0.5)
        else:
            model.add_weighted_adapter(*arguments, density=0.5)
        model.set_adapter("both")
        results.append(computed(model.eval()))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_specification_is_found_in_the_base_that_an_adapter_names(
    specs: dict[str, PermutationSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NLM_CACHE", str(tmp_path / "cache"))
    spec, base = specs["gpt2"], gpt2()
    base.save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    trained(base, tmp_path / "b", target_modules=["c_attn"], fan_in_fan_out=True)
    permutation = spec.random(3)
    found = align_adapter(tmp_path / "b", permutation)
    expected = align_adapter(tmp_path / "b", permutation, spec)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_experts_in_a_list_and_what_lies_between_them() -> None:
    """What is added to a weight is moved as the weight is; experts are exchanged with theirs."""
    spec, state = written(), Mixture(softmax).state_dict()
    adapter: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(state.items()):
        if name.endswith("weight"):
            torch.manual_seed(number)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{module}.lora_A.weight"] = torch.randn(2, weight.shape[1])
            adapter[f"{module}.lora_B.weight"] = torch.randn(len(weight), 2)

    def merged(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(weights)
        for name in (name for name in weights if name.endswith("weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"]
            out[name] = weights[name] + b @ a
        return out

    permutation = spec.random(1)
    moved = merged(spec.apply(permutation, state), align_adapter(adapter, permutation, spec))
    expected = spec.apply(permutation, merged(state, adapter))
    for name, tensor in expected.items():
        torch.testing.assert_close(moved[name], tensor)
    del adapter["base_model.model.experts.2.0.lora_A.weight"]
    with pytest.raises(ValueError, match=r"experts that may be .* got none for 'experts\.2\.0\.w"):
        align_adapter(adapter, permutation, spec)


def test_convolutions_are_moved(tmp_path: Path) -> None:
    import nlm

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
    x = torch.randn(2, 3, 6, 6)
    spec = nlm.trace(network, x)
    settings = {"target_modules": ["0", "2"], "use_dora": True}
    there = trained(network, tmp_path / "b", **settings)
    permutation = spec.random(1)
    align_adapter(tmp_path / "b", permutation, spec, tmp_path / "a")
    other = copy.deepcopy(network)
    other.load_state_dict(spec.apply(permutation, network.state_dict()))
    here = peft.PeftModel.from_pretrained(other, tmp_path / "a").eval()
    torch.testing.assert_close(here(x), there(x), rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_moved_is_said(specs: dict[str, PermutationSpec], tmp_path: Path) -> None:
    spec = specs["base_llama"]
    model = trained(base_llama(), tmp_path / "b", target_modules=["q_proj"])
    state, none = peft.get_peft_model_state_dict(model), spec.identity()
    key = next(iter(state))
    rule = r"nlm\.integrations\.peft: "
    with pytest.raises(ValueError, match=rule + r".* got 'lora_C' in 'base_model\.m\.lora_C\.w"):
        align_adapter({"base_model.m.lora_C.weight": torch.ones(2, 2)}, none, spec)
    with pytest.raises(ValueError, match=rule + r"an adapter's .* and no 'model\.head\.weight'"):
        align_adapter({"base_model.model.model.head.lora_A.weight": torch.ones(2, 2)}, none, spec)
    with pytest.raises(ValueError, match=r"must have the shape of its layout .* got \[4, 33\]"):
        align_adapter({key: torch.ones(4, 33)}, none, spec)
    with pytest.raises(ValueError, match=rule + "an adapter that names no base model needs a spec"):
        align_adapter(state, none)
    with pytest.raises(ValueError, match=rule + "an adapter is written to a folder with its conf"):
        align_adapter(state, none, spec, tmp_path / "c")
    found = AlignmentResult(none, AlignmentReport("weights", [1.0], {}, 0.0))
    turned = OrthogonalAlignment(none, found.report, {}, Gauge(spec, {}))
    with pytest.raises(ValueError, match=rule + "an alignment is a permutation alone"):
        align_adapter(state, turned, spec)
    with pytest.raises(FileExistsError, match=rule + "an adapter is overwritten only with force"):
        align_adapter(tmp_path / "b", none, spec, tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=rule + r"an adapter is a folder with adapter_conf"):
        align_adapter(tmp_path, none, spec)
    file = tmp_path / "b" / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, sentence in {
        ("peft_type", "IA3"): "is of the type LORA, got 'IA3'",
        ("init_lora_weights", "pissa_niter_4"): "began by 'pissa_niter_4'",
        ("layer_replication", ((0, 1),)): "got layer_replication=",
    }.items():
        file.write_text(json.dumps(config | dict([change])))
        with pytest.raises(ValueError, match=sentence):
            align_adapter(tmp_path / "b", none, spec, tmp_path / "c")
    assert not (tmp_path / "c").exists()
