"""The specifications that come with the package: ``PermutationSpec.load("bert-base")``.

They were made from configurations alone, by ``python -m nlm.symmetry.shipped``, and a test makes
them again: they cannot go stale. Like all that has seen no weights they are not proven;
:meth:`nlm.PermutationSpec.verify` and ``nlm.align`` with data do that.
"""

import json
from pathlib import Path
from typing import Any

from nlm.checkpoint import atomic_path

FOLDER = Path(__file__).parent / "specs"
INDEX = FOLDER / "index.json"

#: name -> a class of transformers and what its configuration says beside the defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("BertForMaskedLM", {}),
    "clip-vit-b-32": ("CLIPModel", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "llama-2-7b": ("LlamaForCausalLM", {}),
    "qwen2-0.5b": (
        "Qwen2ForCausalLM",
        {
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
    ),
    "resnet-50": ("ResNetForImageClassification", {}),
    "t5-small": ("T5ForConditionalGeneration", {}),
    "vit-b-16": ("ViTForImageClassification", {}),
}  # fmt: skip


def path(name: str) -> Path | None:
    """The file of a name, or None where there is no such specification."""
    return FOLDER / f"{name}.json" if name in MODELS else None


def find(fingerprint: str) -> Path | None:
    """The file of a model's fingerprint, or None."""
    names = json.loads(INDEX.read_text())
    return path(names[fingerprint]) if fingerprint in names else None


def config(name: str) -> Any:
    """The configuration that a specification was made from."""
    import transformers

    model_class, settings = MODELS[name]
    kind = getattr(transformers, model_class).config_class
    return kind(**settings, architectures=[model_class])


def main() -> None:
    """Makes all specifications again."""
    from nlm.symmetry import pretrained
    from nlm.symmetry.text import headline

    index = {}
    for name in MODELS:
        spec = pretrained.trace_config(config(name), cache=False)
        spec.save(FOLDER / f"{name}.json", force=True)
        index[pretrained.fingerprint_of(config(name))] = name
        print(f"{name}: {headline(spec)}")
    with atomic_path(INDEX, force=True) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
