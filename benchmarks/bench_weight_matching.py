"""Weight matching beside ``rebasin`` 0.0.47: time to the same objective, and memory.

Models of full size with random weights: pairs drawn apart, and permuted copies with noise of half a
standard deviation. Both sides descend from the identity over the same groups until nothing is
gained. ``rebasin`` runs its own loop on its own wrappers of the layers; the groups are handed to
it, because its tracer finds none in BERT and takes the flattened features of VGG16 for one group of
25088. The tracer also lists parameters several times, and each is multiplied again: in a ViT the
first feed-forward layer eight times, the second four times. "rebasin" has each once, "rebasin as
traced" so many times. Groups inside others (heads) are beyond it: "all groups" is nlm's alone. Each
measurement has a process of its own.

    python benchmarks/bench_weight_matching.py [--workload PART] [--providers NAME ...]
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _bench import RESULTS, facts, machine, write
from _state_dicts import random_state, specification, vit_base
from torch import Tensor, nn

from nlm._state_dict import is_statistic
from nlm.align import weight_matching
from nlm.symmetry import PermutationSpec, shipped
from nlm.symmetry.layout import Ref

State = Mapping[str, Tensor]
CONVOLUTIONS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
PAIRS = ("random pair", "noisy copy")


def vgg16() -> PermutationSpec:
    """VGG16 of 32 x 32 images and 1000 classes: one position is left for the linear layers."""
    widths = [*CONVOLUTIONS, 4096, 4096]
    names = ["3", *(f"g{i}:{width}" for i, width in enumerate(widths)), "1000"]
    params = {}
    for i in range(16):
        kernel = ["3", "3"] if i < len(CONVOLUTIONS) else []
        params |= {f"{i}.weight": [names[i + 1], names[i], *kernel], f"{i}.bias": [names[i + 1]]}
    return specification({f"g{i}": (width, ()) for i, width in enumerate(widths)}, params)


def shipped_specification(name: str) -> PermutationSpec:
    path = shipped.path(name)
    assert path is not None
    return PermutationSpec.load(path)


def feed_forward(spec: PermutationSpec) -> PermutationSpec:
    return spec.restrict([name for name, group in spec.free.items() if group.size == 3072])


WORKLOADS: dict[str, Callable[[], PermutationSpec]] = {
    "VGG16": vgg16,
    "ResNet-50": lambda: shipped_specification("resnet-50"),
    "ViT-B/16, feed-forward": lambda: feed_forward(vit_base()),
    "BERT-base, feed-forward": lambda: feed_forward(shipped_specification("bert-base")),
    "ViT-B/16, all groups": vit_base,
    "BERT-base, all groups": lambda: shipped_specification("bert-base"),
}


def pair(spec: PermutationSpec, kind: str) -> tuple[State, State]:
    make = torch.Generator().manual_seed(0)
    a, b = (random_state(spec, torch.float32, make) for _ in range(2))
    if kind == "random pair":
        return a, b
    return a, spec.apply(spec.random(0), {name: a[name] + 0.5 * b[name] for name in a})


def objective(
    spec: PermutationSpec, a: State, b: State, permutation: Mapping[str, Tensor]
) -> float:
    aligned = spec.apply(permutation, b)
    return math.fsum(
        float(torch.dot(a[name].flatten().double(), aligned[name].flatten().double()))
        for name, layouts in spec.params.items()
        if not is_statistic(name) and any(isinstance(layout, Ref) for layout in layouts)
    )


class Rebasin:
    """The loop of ``rebasin`` on the groups of a specification."""

    def __init__(self, a: State, b: State, spec: PermutationSpec, as_traced: bool) -> None:
        from rebasin.modules import DefaultModule, OneDimModule, Permutation
        from rebasin.permutation_coordinate_descent import PermutationCoordinateDescent

        self.groups = {name: Permutation(torch.arange(g.size)) for name, g in spec.free.items()}
        infos: dict[int, list[Any]] = {id(group): [] for group in self.groups.values()}
        for name in spec.params:
            stem = name.removesuffix("weight")
            if stem == name or a[name].dim() not in (1, 2, 4):
                continue
            sides = []
            for state in (a, b):
                sides.append(nn.Module())
                sides[-1].weight = nn.Parameter(state[name].clone(), False)
                bias = state.get(f"{stem}bias")
                sides[-1].bias = None if bias is None else nn.Parameter(bias.clone(), False)
            node = SimpleNamespace(input_shape=[], output_shape=[])
            own = [
                self.groups.get(layout.group) if isinstance(layout, Ref) else None
                for layout in spec.params[name]
            ]
            if len(own) == 1:
                module = OneDimModule(*sides, node)
                module.output_permutation = own[0]
            else:
                module = DefaultModule(*sides, node)
                module.output_permutation, module.input_permutation = own[:2]
            for group, places in module.permutation_to_info:
                for place in places:
                    infos[id(group)] += [place] * ((8, 4)[place.axis] if as_traced else 1)
        self.descent = PermutationCoordinateDescent.__new__(PermutationCoordinateDescent)
        self.descent.device_b, self.descent.logging_level = None, 40
        graph = [(group, infos[id(group)]) for group in self.groups.values()]
        self.descent.pinit = SimpleNamespace(model_graph=SimpleNamespace(permutation_to_info=graph))

    def run(self, most: float) -> tuple[int, bool]:
        """Sweeps until nothing is gained, or for so many seconds; whether it came to an end."""
        torch.manual_seed(0)
        begin, sweeps, goes_on = time.perf_counter(), 0, True
        while goes_on and time.perf_counter() - begin < most:
            goes_on = self.descent._calculate_permutations_step(None)
            sweeps += 1
        return sweeps, not goes_on


def measure(workload: str, kind: str, provider: str, most: float) -> dict[str, Any]:
    """One run: seconds, sweeps, the last objective, and the peak memory of this process.

    ``trace``: (seconds, objective) after every sweep of nlm.
    """
    spec = WORKLOADS[workload]()
    a, b = pair(spec, kind)
    small = {"w": torch.ones(4, 4)}
    weight_matching(small, small, specification({"g": (4, ())}, {"w": ["g:4", "4"]}))
    held = sum(tensor.nbytes for state in (a, b) for tensor in state.values())
    trace: list[tuple[float, float]] = []
    is_peer, as_traced = provider.startswith("rebasin"), provider.endswith("as traced")
    peer = Rebasin(a, b, spec, as_traced) if is_peer else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = peak_bytes()
    begin = time.perf_counter()

    def progress(sweep: int, value: float) -> None:
        trace.append((time.perf_counter() - begin, value))
        if trace[-1][0] >= most:
            raise TimeoutError

    if peer is not None:
        sweeps, complete = peer.run(most)
        seconds = time.perf_counter() - begin
        permutation = {name: group.perm_indices for name, group in peer.groups.items()}
    else:
        order = provider.partition(" ")[2] or "random"
        try:
            weight_matching(a, b, spec, order=order, progress=progress)
        except TimeoutError:
            pass
        seconds, sweeps = time.perf_counter() - begin, len(trace)
        complete, permutation = trace[-1][0] < most, None
    added = peak_bytes() - before
    return {
        "workload": f"{workload}, {kind}",
        "provider": provider,
        "groups": len(spec.free),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "sweeps": sweeps,
        "complete": complete,
        "objective": objective(spec, a, b, permutation) if permutation else trace[-1][1],
        "state_bytes": held,
        "added_bytes": added,
        "trace": trace,
    }


def peak_bytes() -> int:
    """The most memory that this process has held (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def in_a_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{', '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", default="", help="only workloads whose name contains this")
    parser.add_argument("--providers", nargs="+", default=["rebasin", "nlm random"])
    parser.add_argument(
        "--most", type=float, default=600.0, help="seconds after which a run is ended"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "weight_matching.json")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        *which, most = options.measure
        print(json.dumps(measure(*which, float(most))))
        return
    rows = []
    for workload in WORKLOADS:
        for kind in PAIRS:
            if options.workload not in f"{workload}, {kind}":
                continue
            last = None
            for provider in options.providers:
                if provider.startswith("rebasin") and "all groups" in workload:
                    continue
                row = in_a_process(workload, kind, provider, str(options.most))
                if provider.startswith("rebasin"):
                    last = row["objective"]
                elif last is not None:
                    there = [s for s, value in row["trace"] if value >= last * (1 - 1e-6)]
                    row["seconds_to_equal"] = there[0] if there else None
                rows.append(row)
                print(line(row), flush=True)
    write(options.json, {**facts(), "rows": rows})


def line(row: Mapping[str, Any]) -> str:
    equal = row.get("seconds_to_equal")
    return (
        f"{row['workload']:<38} {row['provider']:<17} {row['groups']:3} groups "
        f"{row['seconds']:8.2f} s {row['sweeps']:3} sweeps{' ' if row['complete'] else '+'} "
        f"objective {row['objective']:14.4f} "
        f"{'' if equal is None else f'as good in {equal:.2f} s '}"
        f"memory +{row['added_bytes'] / row['state_bytes']:.2f} of the state dicts"
    )


if __name__ == "__main__":
    main()
