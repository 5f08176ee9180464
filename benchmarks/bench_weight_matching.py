"""Weight matching beside ``rebasin`` 0.0.47: time to the same objective, and memory.

Models of full size with random weights: pairs drawn apart, and permuted copies with noise of half a
standard deviation; and the demo's two foundations, MLPs trained apart. Both sides descend from the
identity over the same groups until nothing is gained. ``rebasin`` runs its own loop on its own
wrappers of the layers; the groups are handed to it, because its tracer finds none in BERT and takes
the flattened features of VGG16 for one group of 25088. The tracer also lists parameters several
times, and each is multiplied again: in a ViT the first feed-forward layer eight times, the second
four times. "rebasin" has each once, "rebasin as traced" so many times. "nlm ORDER" is one descent,
"nlm" what is called by default, which starts another where the first end is not clear. Groups
inside others (heads) are beyond the peer: "all groups" is nlm's alone. A run ends after ``--most``
seconds, then with the sweep that it is in. Each pair of models has a process of its own. Beside
them: the heads of BERT-base from their correlations on, and SciPy in a loop over all pairs of
heads.

    python benchmarks/bench_weight_matching.py [--workload PART] [--providers NAME ...]
"""

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _bench import RESULTS, SECONDS, facts, machine, time_in_turns, write
from _state_dicts import random_state, specification, vit_base
from bench_assignment import correlations
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import nlm
from nlm import demo
from nlm._names import is_statistic
from nlm.align import weight_matching
from nlm.align.activations import match_seen
from nlm.align.seen import Seen
from nlm.align.similarity import Correlation
from nlm.ops import assignment
from nlm.symmetry import PermutationSpec, parse, shipped
from nlm.symmetry.blocks import blocks
from nlm.symmetry.layout import Ref

State = Mapping[str, Tensor]
CONVOLUTIONS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
PAIRS = ("random pair", "noisy copy", "trained apart")
HEADS = "BERT-base, heads of 12 layers from correlations"


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
    "MLP of the demo": lambda: nlm.trace(foundations()[0], torch.randn(2, 1, 16, 16)),
}


def foundations() -> tuple[nn.Module, nn.Module]:
    """Trained on the demo's letters, or read from the cache."""
    return demo.load(tasks=1, settings=demo.Settings("mlp512")).foundations


def pair(spec: PermutationSpec, kind: str) -> tuple[State, State]:
    if kind == "trained apart":
        a, b = (model.state_dict() for model in foundations())
        return a, b
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


def measure(
    workload: str, kind: str, providers: Sequence[str], most: float
) -> list[dict[str, Any]]:
    """A row for each provider, one after the other on the same models."""
    spec = WORKLOADS[workload]()
    a, b = pair(spec, kind)
    small = {"w": torch.ones(4, 4)}
    weight_matching(small, small, specification({"g": (4, ())}, {"w": ["g:4", "4"]}))
    rows = []
    for provider in providers:
        if not (provider.startswith("rebasin") and "all groups" in workload):
            row = {"workload": f"{workload}, {kind}", **run(spec, a, b, provider, most)}
            rows.append(row)
    return rows


def run(spec: PermutationSpec, a: State, b: State, provider: str, most: float) -> dict[str, Any]:
    """Seconds, sweeps, the last objective, and the peak memory of this process above what it held.

    ``trace``: (seconds, objective) after every sweep of nlm.
    """
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
        order, default = provider.partition(" ")[2] or "random", provider == "nlm"
        try:
            layerwise = None if default else False
            weight_matching(a, b, spec, order=order, layerwise=layerwise, progress=progress)
        except TimeoutError:
            pass
        seconds, sweeps = time.perf_counter() - begin, len(trace)
        complete, permutation = trace[-1][0] < most, None
    added = peak_bytes() - before
    return {
        "provider": provider,
        "groups": len(spec.free),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "sweeps": sweeps,
        "complete": complete,
        "objective": objective(spec, a, b, permutation)
        if permutation
        else max(v for _, v in trace),
        "state_bytes": held,
        "added_bytes": added,
        "trace": trace,
    }


def peak_bytes() -> int:
    """The most memory that this process has held (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def in_a_process(*arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{', '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", default="", help="only workloads whose name contains this")
    parser.add_argument("--providers", nargs="+", default=["nlm random", "rebasin"])
    parser.add_argument(
        "--most", type=float, default=20.0, help="seconds after which a run is ended"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "weight_matching.json")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        workload, kind, most, *providers = options.measure
        print(json.dumps(measure(workload, kind, providers, float(most))))
        return
    rows = []
    for workload in WORKLOADS:
        for kind in PAIRS:
            own = ("demo" in workload) == (kind == "trained apart")
            if own and options.workload in f"{workload}, {kind}":
                found = in_a_process(workload, kind, str(options.most), *options.providers)
                compare(found)
                rows += found
                print(*map(line, found), sep="\n", flush=True)
    if options.workload in HEADS:
        rows += heads()
    write(options.json, {**facts(), "rows": rows})


def heads() -> list[dict[str, Any]]:
    """All 12 layers of BERT-base, from the correlations of their heads' units on.

    To the permutation and the report ("nlm"), or the two assignments without a permutation: of the
    units of every two heads, then of the heads ("nlm.ops alone", "scipy").
    """
    make, many, size = torch.Generator().manual_seed(0), 12, 64
    layers = [correlations(many * size, make).double() for _ in range(12)]
    groups: dict[str, tuple[int, tuple[str, ...]]] = {}
    comparisons = []
    for i, correlation in enumerate(layers):
        groups |= {f"h{i}": (many, ()), f"d{i}": (size, (f"h{i}",))}
        layout = parse(f"h{i}:{many} x d{i}:{size}")
        used = blocks((layout,), (layout.size,))
        comparisons.append(Correlation(correlation, layout, used))
    spec = specification(groups, {})
    seen = Seen(comparisons, dict.fromkeys(groups, 1))

    def by_nlm() -> float:
        return match_seen({}, {}, spec, seen).report.objective[-1]

    def by_assignments() -> float:
        total = 0.0
        for layer in layers:
            pairs = layer.view(many, size, many, size).transpose(1, 2)
            columns = assignment(pairs, maximize=True).columns
            worth = pairs.gather(-1, columns[..., None]).squeeze(-1).sum(-1)
            heads = assignment(worth, maximize=True).columns
            total += float(worth.gather(-1, heads[:, None]).sum())
        return total

    def by_scipy() -> float:
        total = 0.0
        for layer in layers:
            cut = layer.numpy().reshape(many, size, many, size)
            worth = np.empty((many, many))
            for one, two in itertools.product(range(many), repeat=2):
                pairs = cut[one, :, two]
                worth[one, two] = pairs[linear_sum_assignment(pairs, maximize=True)].sum()
            total += worth[linear_sum_assignment(worth, maximize=True)].sum()
        return total

    providers = {"nlm": by_nlm, "nlm.ops alone": by_assignments, "scipy": by_scipy}
    ends = {name: call() for name, call in providers.items()}
    if not all(math.isclose(end, ends["scipy"], rel_tol=1e-9) for end in ends.values()):
        raise SystemExit(f"{HEADS}: the sums are not the same, got {ends}")
    rows = []
    for name, seconds in time_in_turns(providers, SECONDS).items():
        row = {"workload": HEADS, "provider": name, "threads": torch.get_num_threads()}
        rows.append({**row, "seconds": seconds, "objective": ends[name]})
        print(f"{HEADS:<38} {name:<17} {1e3 * seconds:8.1f} ms", flush=True)
    return rows


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Notes when nlm was as good as the peer was in the end."""
    lasts = [row["objective"] for row in rows if row["provider"].startswith("rebasin")]
    for row in rows if lasts else ():
        there = [s for s, value in row["trace"] if value >= lasts[0] * (1 - 1e-6)]
        if not row["provider"].startswith("rebasin"):
            row["seconds_to_equal"] = there[0] if there else None


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
