"""A set-up of the zoo: a small network with random weights, its arguments and keyword arguments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SetUp = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]

SDPA = {"attn_implementation": "sdpa"}
EAGER = {"attn_implementation": "eager"}
ENCODER = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
GROUPED_QUERIES = {**ENCODER, "hidden_size": 32, "num_key_value_heads": 2, **SDPA}
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    **SDPA,
}
SEQUENCE_TO_SEQUENCE = {
    "vocab_size": 50,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 32,
    **SDPA,
}


def transformer(name: str, inputs: Callable[[], dict[str, Any]], **options: Any):
    """A set-up of a class of transformers, whose configuration takes the options."""

    def set_up() -> SetUp:
        import transformers

        network = getattr(transformers, name)
        return network(network.config_class(**options)), (), inputs()

    return set_up


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 50, (batch, length))


def images(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def text() -> dict[str, Any]:
    return {"input_ids": tokens()}


def masked_text() -> dict[str, Any]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def prompt() -> dict[str, Any]:
    return {"input_ids": tokens(), "use_cache": False}


def text_pair() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=5), "use_cache": False}


def picture() -> dict[str, Any]:
    return {"pixel_values": images()}


def without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}
