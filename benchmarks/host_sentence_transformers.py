"""``SentenceTransformer.merge`` by the host's methods and by nlm's, each a whole process.

Writes a foundation and two experts (BERT encoders of random numbers, float32), which both load,
merge and save in turns: time, peak memory, and the entries in which the results differ.

    python benchmarks/host_sentence_transformers.py [--rows METHOD ...] [--repeat N]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from _llamas import MODELS
from _whole_processes import Command, Host, arguments, compared, main

METHODS = ("ties", "dare_ties", "task_arithmetic")
SIZES = {"tiny": (32, 1), "46M": (768, 6)}  # units, layers


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Encoders with a tokenizer of whole words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    width, layers = SIZES[options.size]
    config = BertConfig(
        vocab_size=4096, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 16, intermediate_size=4 * width,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(4096)}, unk_token="w0"))
    torch.manual_seed(0)
    model = BertModel(config)
    base = {name: x.clone() for name, x in model.state_dict().items()}
    for number, name in enumerate(MODELS):
        make = torch.Generator().manual_seed(number)
        state = {
            key: x + 0.002 * torch.randn(x.shape, generator=make) if number else x
            for key, x in base.items()
        }
        model.load_state_dict(state)
        parts = folder / f"{name}_parts"
        model.save_pretrained(parts)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
        tokenizer.save_pretrained(parts)
        encoder = [Transformer(str(parts)), Pooling(width)]
        SentenceTransformer(modules=encoder, device="cpu").save(str(folder / name))
    return {"parameters": sum(x.numel() for x in base.values())}


def commands(method: str, folder: Path) -> dict[str, Command]:
    found = {}
    for program in ("sentence_transformers", "nlm"):
        out = folder / f"out_{program}"
        given = [program, method, str(folder), str(out)]
        found[program] = Command("_sentence_transformers", given, out / "model.safetensors")
    return found


def start(folder: Path) -> Command:
    return Command("_sentence_transformers", ["start"], folder)


HOST = Host(
    "sentence_transformers", "sentence-transformers", METHODS, prepare, commands, start, compared
)

if __name__ == "__main__":
    parser = arguments(HOST, __doc__)
    parser.add_argument("--size", choices=SIZES, default="46M")
    main(HOST, parser.parse_args())
