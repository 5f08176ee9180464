"""``add_weighted_adapter`` by PEFT's functions and by nlm's, each a whole process.

Writes a Llama of random numbers and two LoRA adapters of rank 64 on its queries and values, which
both load, merge and save in turns: time, peak memory, and the entries in which the results differ.

    python benchmarks/host_peft.py [--rows METHOD ...] [--repeat N]
"""

import argparse
from pathlib import Path

import torch
from _llamas import prepare as write_base
from _llamas import sized
from _whole_processes import Command, Host, arguments, compared, main

METHODS = ("ties", "magnitude_prune", "dare_ties", "ties_svd")
RANK = 64


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """The base, and adapters whose two factors are both random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    about = write_base(folder, options)
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(folder / f"adapter_{name}")
    return about


def commands(method: str, folder: Path) -> dict[str, Command]:
    found = {}
    for program in ("peft", "nlm"):
        out = folder / f"out_{program}" / "both"
        given = [program, method, str(folder), str(out.parent)]
        found[program] = Command("_peft", given, out / "adapter_model.safetensors")
    return found


def start(folder: Path) -> Command:
    return Command("_peft", ["start"], folder)


HOST = Host("peft", "peft", METHODS, prepare, commands, start, compared)

if __name__ == "__main__":
    main(HOST, sized(arguments(HOST, __doc__), "61M").parse_args())
