"""Good files that other tools write and nlm reads: adapters, lines of text, scores, heads."""

import json
from pathlib import Path

import numpy as np
import torch
from _networks import vectors
from safetensors.torch import save_file

WIDTH = 6  # of the small network's hidden layers


class Labelled(torch.nn.Module):
    """A model whose inputs may have labels."""

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return input


def score(folder: Path) -> None:
    np.savez(folder / "s.npz", input=vectors(5, features=4).numpy(), labels=np.arange(5) % 3)


def lines(folder: Path) -> None:
    (folder / "d.jsonl").write_text('"a text"\n{"text": "another", "id": 3}\n')


def adapter(folder: Path) -> None:
    """LoRA of rank 2 on the first and the last layer."""
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "fan_in_fan_out": False, "init_lora_weights": True,
        "base_model_name_or_path": "base", "target_modules": ["0", "4"],
    }))  # fmt: skip
    shapes = {
        "0.lora_A": (2, 4),
        "0.lora_B": (WIDTH, 2),
        "4.lora_A": (2, WIDTH),
        "4.lora_B": (3, 2),
    }
    entries = {
        f"base_model.model.{name}.weight": vectors(shape[0], number, shape[1])
        for number, (name, shape) in enumerate(shapes.items())
    }
    save_file(entries, folder / "adapter_model.safetensors")


def head(folder: Path) -> None:
    save_file(
        {"4.weight": vectors(3, features=WIDTH), "4.bias": torch.ones(3)}, folder / "h.safetensors"
    )
