"""Tiny Llamas of one foundation, on disk, with tokenizers."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS = 2


def llama(seed: int, start: nn.Module | None = None, scale: float = 0.02) -> nn.Module:
    """A foundation, or one fine-tuned from it: noise on every parameter."""
    make = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config) if start is None else copy.deepcopy(start)
    with torch.no_grad():
        for parameter in model.parameters():
            if start is None:
                parameter.fill_(parameter.dim() == 1)
            parameter += scale * torch.randn(parameter.shape, generator=make)
    return model.eval()


def save(model: nn.Module, folder: Path) -> Path:
    """Weights, configuration and a tokenizer of all words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model.save_pretrained(folder)
    last = model.config.vocab_size - 1
    words = {f"w{i}": i for i in range(last)} | {"<unk>": last}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder
