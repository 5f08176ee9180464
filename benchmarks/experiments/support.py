"""Which families of models can be aligned, merged, corrected and folded? Tried on each.

    python benchmarks/experiments/support.py [--json FILE] [NAME ...]

Every network of ``tests/symmetry/zoo`` (small, random weights; those of transformers are its own
classes) goes the whole way:

- align: it is traced, a random permutation of all that may move is planted, and weight matching
  has to find it: every entry comes back bit by bit ("exact"), or the outputs do ("function");
- merge: linear and TIES merges with a perturbed copy load into it, strictly, and run;
- TACT: fitted for two perturbed copies as experts; the corrected outputs are finite and not those
  of the merged model;
- fold: the folded module computes what the corrected one does, or it says which points cannot.
"""

import argparse
import copy
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nlm
from nlm.symmetry.outputs import named_tensors

RESULTS = Path(__file__).parent / "results"
NOISE = 0.05


def called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        found = named_tensors(model(*args, **kwargs))
    return [each for each in found.values() if each.is_floating_point()]


def near(some: list[Tensor], others: list[Tensor], most: float = 1e-3) -> bool:
    return all(
        float((a - b).abs().max()) <= most * max(1.0, float(b.abs().max()))
        for a, b in zip(some, others, strict=True)
        if b.numel()
    )


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    other, made = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point():
                spread = parameter.std() if parameter.numel() > 1 else parameter.abs()
                noise = torch.randn(parameter.shape, generator=made)
                parameter.add_(NOISE * spread.nan_to_num() * noise)
    return other


def aligned(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    spec = nlm.trace(model, args, kwargs)
    if not spec.free:
        return "nothing may move"
    state = model.state_dict()
    moved = spec.apply(spec.random(1), state)
    found = nlm.align(state, moved, spec, restarts=2)
    back = spec.apply(found.permutation, moved)
    if all(torch.equal(back[name], tensor) for name, tensor in state.items()):
        return "exact"
    other = copy.deepcopy(model)
    other.load_state_dict(back)
    same = near(called(other, args, kwargs), called(model, args, kwargs))
    return "function" if same else "no: another function"


def merged(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    experts = {"a": perturbed(model, 1), "b": perturbed(model, 2)}
    for method in ("linear", "ties"):
        found = nlm.merge(experts, base=model, method=method)
        other = copy.deepcopy(model)
        other.load_state_dict(dict(found), strict=True)
        if not all(each.isfinite().all() for each in called(other, args, kwargs)):
            return "no: not finite"
    return "yes"


def fitted(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nlm.Tact:
    def run(network: nn.Module, _: Tensor) -> Any:
        return network(*args, **kwargs)

    size = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)).shape[0]
    data = [torch.zeros(size)]
    experts = {"a": perturbed(model, 1), "b": perturbed(model, 2)}
    return nlm.Tact.fit(
        copy.deepcopy(model), experts, {"a": data, "b": data}, forward=run, micro_batch=size
    )


def corrected(tact: nlm.Tact, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    with torch.no_grad():
        found = named_tensors(tact(*args, **kwargs, task="a"))
    outputs = [each for each in found.values() if each.is_floating_point()]
    if not all(each.isfinite().all() for each in outputs):
        return "no: not finite"
    plain = called(tact.model, args, kwargs)
    moved = not all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
    return f"{len(tact.points)} points" if moved else "no: nothing changes"


def folded(tact: nlm.Tact, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    cannot = tact.unfoldable()
    with torch.no_grad():
        expected = [
            each
            for each in named_tensors(tact(*args, **kwargs, task="a")).values()
            if each.is_floating_point()
        ]
    made = tact.inline("a") if cannot else tact.fold("a")
    if not near(called(made, args, kwargs), expected):
        return "no: another function"
    return f"inline ({len(cannot)} of {len(tact.points)} points)" if cannot else "yes"


def tried(step: Callable[[], str]) -> str:
    """What a step finds; an error of nlm's as the reason, any other as a fault."""
    try:
        return step()
    except Exception as error:
        said = " ".join(str(error).split())
        own = said.startswith("nlm")
        if not own:
            traceback.print_exc()
        return f"{'no' if own else 'FAULT'}: {said if own else type(error).__name__ + ': ' + said}"


def row(room: str, name: str, make: Callable[[], Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    start = time.perf_counter()
    model, args, kwargs = make()
    model.eval()
    found = {"room": room, "name": name, "class": type(model).__name__}
    found["align"] = tried(lambda: aligned(model, args, kwargs))
    found["merge"] = tried(lambda: merged(model, args, kwargs))
    tact: list[nlm.Tact] = []

    def fit() -> str:
        tact.append(fitted(model, args, kwargs))
        return corrected(tact[0], args, kwargs)

    found["tact"] = tried(fit)
    found["fold"] = tried(lambda: folded(tact[0], args, kwargs)) if tact else "-"
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def networks() -> list[tuple[str, str, Callable[[], Any]]]:
    """(room, name, maker) of the zoo, in its order."""
    import symmetry.zoo as zoo

    rooms = ("_dense", "_recurrent", "_convolutional", "_blocks", "_ideas", "_mixing", "_encoders",
             "_decoders", "_translators", "_vision_transformers", "_vision", "_speech",
             "_others")  # fmt: skip
    return [
        (room.strip("_").replace("_", " "), name, make)
        for room in rooms
        for name, make in getattr(zoo, room).ZOO.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path, default=RESULTS / "support.json")
    options = parser.parse_args()
    rows = []
    for room, name, make in networks():
        if options.names and name not in options.names:
            continue
        rows.append(row(room, name, make))
        print(json.dumps(rows[-1]), flush=True)
    faults = sum(str(value).startswith("FAULT") for each in rows for value in each.values())
    report = {"versions": nlm.info()["versions"], "faults": faults, "rows": rows}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(rows)} networks, {faults} faults")


if __name__ == "__main__":
    import sys

    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root / "tests"), str(root / "benchmarks" / "experiments")]
    main()
