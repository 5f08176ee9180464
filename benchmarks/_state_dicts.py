"""State dicts of known shapes, filled at random, with their specifications written out."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlm.symmetry import AxisGroup, PermutationSpec, parse

Groups = dict[str, tuple[int, tuple[str, ...]]]


def vit_base() -> PermutationSpec:
    """ViT-B/16 of 1000 classes: 86 M parameters; queries and keys apart from values."""
    groups: Groups = {"r": (768, ())}
    params = {
        "cls_token": ["1", "1", "r:768"], "pos_embed": ["1", "197", "r:768"],
        "patch.weight": ["r:768", "3", "16", "16"], "patch.bias": ["r:768"],
        "norm.weight": ["r:768"], "norm.bias": ["r:768"],
        "head.weight": ["1000", "r:768"], "head.bias": ["1000"],
    }  # fmt: skip
    for i in range(12):
        groups |= {f"h{i}": (12, ()), f"f{i}": (3072, ())}
        groups |= {f"k{i}": (64, (f"h{i}",)), f"v{i}": (64, (f"h{i}",))}
        keys, values, hidden = f"h{i}:12 x k{i}:64", f"h{i}:12 x v{i}:64", f"f{i}:3072"
        rows = {"q": keys, "k": keys, "v": values, "fc1": hidden}
        columns = {"proj": values, "fc2": hidden}
        for name, units in rows.items():
            params |= {f"{i}.{name}.weight": [units, "r:768"], f"{i}.{name}.bias": [units]}
        for name, units in columns.items():
            params |= {f"{i}.{name}.weight": ["r:768", units], f"{i}.{name}.bias": ["r:768"]}
        for name in ("norm1", "norm2"):
            params |= {f"{i}.{name}.weight": ["r:768"], f"{i}.{name}.bias": ["r:768"]}
    return specification(groups, params)


def llama_1b() -> PermutationSpec:
    """TinyLlama's shapes: 1.1 G parameters, 4 key-value heads of 8 query heads of 64."""
    groups: Groups = {"r": (2048, ())}
    params = {name: ["32000", "r:2048"] for name in ("embed.weight", "head.weight")}
    params["norm.weight"] = ["r:2048"]
    for i in range(22):
        groups |= {f"g{i}": (4, ()), f"q{i}": (8, (f"g{i}",)), f"f{i}": (5632, ())}
        groups |= {f"v{i}": (64, (f"g{i}",))}
        params |= {
            f"{i}.q.weight": [f"g{i}:4 x q{i}:8 x 64", "r:2048"],
            f"{i}.k.weight": [f"g{i}:4 x 64", "r:2048"],
            f"{i}.v.weight": [f"g{i}:4 x v{i}:64", "r:2048"],
            f"{i}.o.weight": ["r:2048", f"g{i}:4 x q{i}:8 x v{i}:64"],
            f"{i}.gate.weight": [f"f{i}:5632", "r:2048"],
            f"{i}.up.weight": [f"f{i}:5632", "r:2048"],
            f"{i}.down.weight": ["r:2048", f"f{i}:5632"],
            f"{i}.norm1.weight": ["r:2048"],
            f"{i}.norm2.weight": ["r:2048"],
        }
    return specification(groups, params)


def random_state(
    spec: PermutationSpec, dtype: torch.dtype, make: torch.Generator
) -> dict[str, Tensor]:
    return {
        name: torch.randn([layout.size for layout in layouts], generator=make).to(dtype)
        for name, layouts in spec.params.items()
    }


def specification(groups: Groups, params: Mapping[str, list[str]]) -> PermutationSpec:
    return PermutationSpec(
        {name: AxisGroup(name, size, parents) for name, (size, parents) in groups.items()},
        {name: tuple(map(parse, texts)) for name, texts in params.items()},
    )
