"""Tiny models of transformers, in folders: two foundations, one a permuted copy, and experts."""

import copy
from pathlib import Path

import torch
from torch import nn

from nlm.symmetry.pretrained import make_inputs, trace_config
from nlm.symmetry.transfer import transferred

TEXT = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 40}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 8}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**TEXT, max_position_embeddings=16))


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**TEXT, max_position_embeddings=20))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_positions=16, n_embd=24, n_layer=2, n_head=4, n_inner=40,
                   bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=16)
    return LlamaForCausalLM(config)


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=16, head_dim=6)
    return MistralForCausalLM(config)


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**TEXT, num_key_value_heads=2, max_position_embeddings=16)
    return Qwen2ForCausalLM(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {name: size for name, size in TEXT.items() if name != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, **IMAGE, num_labels=5))


def clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {name: size for name, size in TEXT.items() if name != "vocab_size"}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **IMAGE, projection_dim=10))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4,
                 decoder_start_token_id=0)
    )  # fmt: skip


def disturbed(model: nn.Module, seed: int, size: float) -> nn.Module:
    """A copy whose parameters are moved by noise."""
    other = copy.deepcopy(model)
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=make))
    return other


def foundation(make, seed: int = 0) -> nn.Module:
    """A model whose weights are large enough to count, with norms and biases that say something."""
    torch.manual_seed(seed)
    return disturbed(make().eval(), seed, 0.15)


def permuted(model: nn.Module, folder: Path, seed: int = 1, like: Path | None = None) -> nn.Module:
    """A copy that computes the same with its units in another order.

    ``like``: the folder of a model with the same trunk, whose permutation of that seed it is.
    """
    spec = trace_config(str(folder))
    trunk = spec if like is None else trace_config(str(like))
    permutation = transferred(trunk.random(seed), trunk, spec)
    other = copy.deepcopy(model)
    other.load_state_dict(spec.apply(permutation, model.state_dict()))
    return other


def inputs(model: nn.Module, samples: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs that differ, of the kinds that the model reads."""
    torch.manual_seed(seed)
    made = {}
    for name, each in make_inputs(model).items():
        if isinstance(each, torch.Tensor):
            shape = (samples, *each.shape[1:])
            if name == "attention_mask":
                made[name] = torch.ones(shape, dtype=torch.int64)
            elif each.is_floating_point():
                made[name] = torch.randn(shape)
            else:
                made[name] = torch.randint(4, 60, shape)
    return made


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], **more) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch, **more)
    return found.logits if hasattr(found, "logits") else found.image_embeds


def write_tokenizer(folder: Path) -> None:
    """One for the words w2 to w59, apart by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(2, 60))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
