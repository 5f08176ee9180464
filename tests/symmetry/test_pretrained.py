"""Models from a configuration alone: what is built, what they are given, what is kept."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

from nlm import PermutationSpec
from nlm.symmetry import cache, pretrained

TEXT = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
BART = {
    "vocab_size": 50, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
WAVES = {
    **TEXT, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
MODELS = {
    "BertForMaskedLM": (TEXT, {"input_ids", "attention_mask"}),
    "GPT2LMHeadModel": ({"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4,
                         "n_positions": 8, "bos_token_id": 1, "eos_token_id": 2},
                        {"input_ids", "use_cache"}),
    "LlamaForCausalLM": (TEXT, {"input_ids", "use_cache"}),
    "MixtralForCausalLM": ({**TEXT, "num_key_value_heads": 2, "num_local_experts": 4},
                           {"input_ids", "use_cache"}),
    "BartForConditionalGeneration": (BART, {"input_ids", "decoder_input_ids", "use_cache"}),
    "ViTForImageClassification": (IMAGE, {"pixel_values"}),
    "ResNetForImageClassification": ({"embedding_size": 8, "hidden_sizes": [8, 16],
                                      "depths": [1, 1]}, {"pixel_values"}),
    "CLIPModel": ({"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 20},
                  {"input_ids", "attention_mask", "pixel_values"}),
    "WhisperForConditionalGeneration": ({**BART, "num_mel_bins": 8, "max_source_positions": 16,
                                         "max_target_positions": 16},
                                        {"input_features", "decoder_input_ids", "use_cache"}),
    "Wav2Vec2ForCTC": (WAVES, {"input_values"}),
    "ASTForAudioClassification": ({**IMAGE, "max_length": 32, "num_mel_bins": 16},
                                  {"input_values"}),
    "VideoMAEForVideoClassification": ({**IMAGE, "num_frames": 4}, {"pixel_values"}),
}  # fmt: skip


def config_of(name: str, **settings: object) -> transformers.PretrainedConfig:
    """The tiny configuration of a class, which names the class."""
    kind = getattr(transformers, name).config_class
    return kind(**(MODELS[name][0] | settings), architectures=[name])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs_on_the_inputs_made_for_it(name: str) -> None:
    model = pretrained.build_model(config_of(name))
    assert type(model).__name__ == name and not model.training
    inputs = pretrained.make_inputs(model)
    assert inputs.keys() == MODELS[name][1]
    with torch.no_grad():
        assert model(**inputs)[0].isfinite().all()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    unreal = pretrained.build_model(config_of(name), device="meta")
    assert {key: tensor.shape for key, tensor in unreal.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in unreal.parameters())
    assert all(
        value.is_meta
        for value in pretrained.make_inputs(unreal).values()
        if isinstance(value, torch.Tensor)
    )


def test_a_configuration_is_read_from_where_it_lies(tmp_path: Path) -> None:
    config = config_of("BertForMaskedLM")
    config.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json", config):
        model = pretrained.build_model(source, device="meta")
        assert type(model).__name__ == "BertForMaskedLM"
    for chosen in ("BertForSequenceClassification", transformers.BertForSequenceClassification):
        model = pretrained.build_model(config, chosen, "meta")
        assert type(model) is transformers.BertForSequenceClassification
    config.architectures = None
    assert type(pretrained.build_model(config, device="meta")) is transformers.BertModel


def test_random_weights_are_the_same_and_leave_the_seed_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = pretrained.build_model(config_of("BertForMaskedLM"))
    assert torch.equal(torch.rand(2), expected)
    second = pretrained.build_model(config_of("BertForMaskedLM"))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_weights_are_read_where_there_are_some(tmp_path: Path) -> None:
    config = config_of("BertForMaskedLM")
    config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is proven on weights"):
        pretrained.load_model(str(tmp_path))
    torch.manual_seed(5)
    saved = transformers.BertForMaskedLM(config)
    assert not torch.equal(
        pretrained.load_model(str(tmp_path), random=True).state_dict()["cls.predictions.bias"],
        saved.state_dict()["bert.embeddings.word_embeddings.weight"],
    )
    saved.half().save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        loaded = pretrained.load_model(str(source))
        assert not loaded.training
        for name, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor.float()), name


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "nothing is downloaded"),
        ({"config.json": "{"}, "a folder with config.json"),
        ({"config.json": "{}"}, "model_type"),
        ({"config.json": '{"model_type": "no-such-model"}'}, "model_type"),
    ],
)
def test_what_is_no_configuration_is_one_sentence(
    files: dict[str, str], words: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=words) as caught:
        pretrained.read_config(str(tmp_path))
    assert str(caught.value).startswith("nlm.trace_config: ") and "\n" not in str(caught.value)


def test_an_unknown_class_or_input_is_named() -> None:
    with pytest.raises(ValueError, match="'NoSuchModel'"):
        pretrained.build_model(config_of("BertForMaskedLM"), "NoSuchModel")
    config = transformers.TimeSeriesTransformerConfig(prediction_length=4, d_model=8)
    model = pretrained.build_model(config, "TimeSeriesTransformerModel", "meta")
    with pytest.raises(ValueError, match=r"give example_inputs, got .*past_values"):
        pretrained.make_inputs(model)


def test_a_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install nlm\[hf\]"):
        pretrained.build_model("anything")


def test_the_fingerprint_is_of_what_is_computed() -> None:
    def mark(name: str = "BertForMaskedLM", outputs: list[str] | None = None, **settings) -> str:
        model = pretrained.build_model(config_of(name, **settings), device="meta")
        return cache.fingerprint(model, pretrained.make_inputs(model), outputs)

    same = mark()
    assert same == mark(hidden_dropout_prob=0.3, name_or_path="elsewhere", dtype="bfloat16")
    changed = [
        mark(hidden_act="relu"),
        mark(layer_norm_eps=1e-3),
        mark(num_attention_heads=2),
        mark(outputs=["logits"]),
        mark(num_hidden_layers=3),
    ]
    assert len({same, *changed}) == 6


@pytest.mark.parametrize(
    ("name", "groups", "permutations"),
    [
        ("BertForMaskedLM", 9, 21),
        ("LlamaForCausalLM", 7, 13),
        ("MixtralForCausalLM", 11, 21),
        ("ViTForImageClassification", 9, 21),
        ("CLIPModel", 19, 43),
    ],
)
def test_a_configuration_is_enough(name: str, groups: int, permutations: int) -> None:
    spec = pretrained.trace_config(config_of(name))
    assert (len(spec.free), spec.permutation_count) == (groups, permutations)
    assert not spec.proven and not spec.opaque_ops
    model = pretrained.build_model(config_of(name))
    spec.verify(model, (), pretrained.make_inputs(model), seeds=1)
    assert spec.proven


def test_what_was_found_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("BertForMaskedLM")
    first = pretrained.trace_config(config)
    [file] = own_cache.iterdir()
    monkeypatch.setattr(pretrained, "trace", None)  # a call of it would fail
    again = pretrained.trace_config(config)
    assert again.digest() == first.digest() and again.outputs == first.outputs
    assert list(own_cache.iterdir()) == [file]
    monkeypatch.undo()
    monkeypatch.setenv("NLM_CACHE", str(own_cache))
    whole = file.read_text()
    for damaged in ("", whole[: len(whole) // 2], whole.replace('"size": 24', '"size": 12'), "{}"):
        file.write_text(damaged)
        with pytest.warns(UserWarning, match="the model is traced again"):
            assert pretrained.trace_config(config).digest() == first.digest()
        assert file.read_text() == whole
    pretrained.trace_config(config, outputs=["logits"])
    pretrained.trace_config(config_of("BertForMaskedLM", hidden_act="relu"))
    assert len(list(own_cache.iterdir())) == 3


def test_no_cache_reads_and_writes_nothing(own_cache: Path) -> None:
    pretrained.trace_config(config_of("BertForMaskedLM"), cache=False)
    assert not own_cache.exists()


def test_a_shipped_specification_needs_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "trace", None)  # a call of it would fail
    config = transformers.T5Config(
        architectures=["T5ForConditionalGeneration"], name_or_path="somewhere/t5-small"
    )
    spec = pretrained.trace_config(config)
    assert spec.digest() == PermutationSpec.load("t5-small").digest()


def test_inputs_may_be_given() -> None:
    config = config_of("BertForMaskedLM")
    inputs = {"inputs_embeds": torch.zeros(1, 3, 24, device="meta")}
    spec = pretrained.trace_config(config, example_inputs=inputs, cache=False)
    assert spec.pinned["bert.embeddings.LayerNorm.weight:0"] == "input"


def test_inputs_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("ViTForImageClassification")
    monkeypatch.setitem(pretrained._SHAPES, "pixel_values", lambda config: (2, 3, 40, 32))
    words = r"example_inputs replace pixel_values \[2, 3, 40, 32\]"
    with pytest.raises(ValueError, match=words):
        pretrained.trace_config(config, cache=False)
