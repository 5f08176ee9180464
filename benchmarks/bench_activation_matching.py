"""Activation matching beside what it cannot do without: two forward passes and the co-moments.

Layers of BERT-base (width 768, 128 tokens a sample) and of a ViT (width 384, 197 tokens); B is a
permuted copy of A with noise of half a standard deviation. The bound is the forward passes of both
models over the same batches, and one float32 GEMM (MKL) per batch and module that shows a group;
measured in turns with ``nlm.align(method="activations")``, its proof included. Beside it: other
precisions of the products, and one position of every eight; with the mean matched correlation over
the groups, and the share of units that are matched as in float32.

    python benchmarks/bench_activation_matching.py [--samples N] [--layers N] [--variants NAME ...]
"""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _bench import RESULTS, facts, machine, time_in_turns, write
from torch import Tensor, nn

import nlm
from nlm.align import AlignmentResult
from nlm.align.variants import stream_sites, streams

BATCH, NOISE = 16, 0.5
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bf16x3": {"precision": "bf16x3"},
    "bf16": {"precision": "bf16"},
    "float32, 1 of 8 positions": {"precision": "float32", "stride": 8},
    "bf16x3, 1 of 8 positions": {"precision": "bf16x3", "stride": 8},
}


def bert(layers: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=8000, num_hidden_layers=layers)
    return BertModel(config, add_pooling_layer=False).eval()


def vit(layers: int) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=6, intermediate_size=1536
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def texts(count: int, make: torch.Generator) -> Tensor:
    return torch.randint(8000, (count, 128), generator=make)


def images(count: int, make: torch.Generator) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=make)


KINDS: dict[str, tuple[Callable[[int], nn.Module], Callable[..., Tensor]]] = {
    "BERT-base": (bert, texts),
    "ViT of width 384": (vit, images),
}


def shown(model: nn.Module, spec: nlm.PermutationSpec, batch: Tensor) -> dict[str, Tensor]:
    """module -> what it shows of a batch, [positions, channels]."""
    found: dict[str, Tensor] = {}
    handles = []
    places = [*spec.observation_sites().values()]
    places += [name for stream in streams(spec) for name in stream_sites(spec, stream)]
    for name in dict.fromkeys(places):

        def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            found[name] = output.movedim(spec.sites[name].dim, -1).flatten(0, -2).contiguous()

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return found


def agreement(one: AlignmentResult, other: AlignmentResult) -> float:
    """The share of units that two alignments match with the same one."""
    pairs = [(index, other.permutation[name]) for name, index in one.permutation.items()]
    same = sum(int((mine == theirs).sum()) for mine, theirs in pairs)
    return same / sum(mine.numel() for mine, _ in pairs)


def measure(
    kind: str, layers: int, samples: int, seconds: float, variants: list[str]
) -> list[dict[str, Any]]:
    build, draw = KINDS[kind]
    torch.manual_seed(0)
    a, b = build(layers), build(layers)
    make = torch.Generator().manual_seed(0)
    data = list(draw(samples, make).split(BATCH))
    spec = nlm.trace(a, data[0][:1])
    noise = b.state_dict()
    noisy = {
        name: x + NOISE * noise[name] if x.is_floating_point() else x
        for name, x in a.state_dict().items()
    }
    b.load_state_dict(spec.apply(spec.random(0), noisy))
    seen = shown(a, spec, data[0])
    results: dict[str, AlignmentResult] = {}

    def forwards() -> None:
        with torch.no_grad():
            for batch in data:
                a(batch)
                b(batch)

    def products() -> None:
        for _ in data:
            for values in seen.values():
                values.T @ values

    def align(name: str) -> Callable[[], None]:
        def run() -> None:
            results[name] = nlm.align(a, b, spec, "activations", data=data, **VARIANTS[name])

        return run

    calls = {"forwards": forwards, "products": products, **{n: align(n) for n in variants}}
    medians = time_in_turns(calls, seconds)
    bound = medians["forwards"] + medians["products"]
    return [
        {
            "workload": f"{kind}, {layers} layers, {samples} samples",
            "variant": name,
            "residual": inspect.signature(nlm.align).parameters["residual"].default,
            "threads": torch.get_num_threads(),
            "forwards_s": medians["forwards"],
            "products_s": medians["products"],
            "align_s": medians[name],
            "of_bound": medians[name] / bound,
            "over_forwards": medians[name] / medians["forwards"] - 1,
            "correlation": mean(results[name].report.correlation.values()),
            "same_as_float32": agreement(results["float32"], results[name]),
        }
        for name in results
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", default="", help="only kinds whose name contains this")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=100.0, help="time for each kind")
    path = RESULTS / machine() / "activation_matching.json"
    parser.add_argument("--json", type=Path, default=path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for kind in KINDS:
        if options.kind in kind:
            for row in measure(
                kind, options.layers, options.samples, options.seconds, options.variants
            ):
                rows.append(row)
                print(
                    f"{row['workload']:<42} {row['variant']:<26} {row['of_bound']:.2f} of the "
                    f"bound, {row['over_forwards']:+.0%} on the forward passes, "
                    f"correlation {row['correlation']:.4f}, "
                    f"{row['same_as_float32']:.1%} as in float32",
                    flush=True,
                )
    write(options.json, {**facts(), "rows": rows})


if __name__ == "__main__":
    main()
