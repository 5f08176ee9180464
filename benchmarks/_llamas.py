"""A foundation and two experts, Llamas of random numbers, as hosts read them."""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from nlm.symmetry import pretrained

#: Units of the stream, units of the feed-forward layers, layers.
SIZES = {
    "tiny": (32, 48, 2), "61M": (512, 1792, 15), "130M": (768, 2560, 15), "180M": (896, 3072, 15),
    "252M": (1024, 3584, 16),
}  # fmt: skip
MODELS = ("base", "one", "two")


def write_models(folder: Path, size: str) -> int:
    """The three models in float32; the number of parameters of each."""
    from transformers import LlamaConfig

    width, inner, layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64), architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    shapes = {
        name: x.shape
        for name, x in pretrained.build_model(config, device="meta").state_dict().items()
    }
    base: dict[str, torch.Tensor] = {}
    for number, model in enumerate(MODELS):
        make = torch.Generator().manual_seed(number)
        state = {name: 0.02 * torch.randn(shape, generator=make) for name, shape in shapes.items()}
        base = base or state
        if state is not base:
            state = {name: base[name].add(noise, alpha=0.1) for name, noise in state.items()}
        config.save_pretrained(folder / model)
        save_file(state, folder / model / "model.safetensors", {"format": "pt"})
    return sum(shape.numel() for shape in shapes.values())


def sized(parser: argparse.ArgumentParser, default: str) -> argparse.ArgumentParser:
    """With the option that :func:`prepare` reads."""
    parser.add_argument("--size", choices=SIZES, default=default)
    return parser


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """The models, and their number of parameters."""
    return {"parameters": write_models(folder, options.size)}
