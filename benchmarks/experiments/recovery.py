"""Planted permutations under noise: which share of the units comes back, beside peers.

    python benchmarks/experiments/recovery.py

Trained networks, each against a copy of itself in a random order with noise on every tensor, of so
many of the tensor's standard deviations. The noise has seeds that no network was made with: for the
seed of the network PyTorch draws the numbers of its first weights again. Peers: ``rebasin`` 0.0.47
with its own loop on its own wrappers; Git Re-Basin's loop written out with PyTorch and SciPy, all
parameters that a unit stands on; and one pass from the input to the output by each layer's incoming
weights, which is what is often called greedy matching. None of them knows of heads: of the
transformer they match the feed-forward layers, with all else in order, and nlm does so too; "all
groups" is nlm's alone. Of activation matching there is no other peer: correlations and SciPy are
the method itself.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import _above  # noqa: F401  (before _bench)
import torch
from _bench import facts
from bench_weight_matching import Rebasin
from scipy.optimize import linear_sum_assignment
from small_training import LETTERS, SETTINGS, task_of, trained
from torch import Tensor, nn

import nlm
from nlm.demo import cache
from nlm.demo.glyphs import Glyphs
from nlm.demo.tasks import Split
from nlm.demo.training import Recipe, fit
from nlm.demo.world import load_glyphs
from nlm.symmetry import PermutationSpec
from nlm.symmetry.permutation import Permutation

State = Mapping[str, Tensor]
Method = Callable[[nn.Module, nn.Module, PermutationSpec, list[Tensor], int], Permutation]

RESULTS = Path(__file__).parent / "results"
NOISES = (0.0, 0.3, 1.0, 2.0, 3.0, 4.0, 5.0)
IMAGES, CALIBRATION = 12_800, 512
WIDTH = 128
_APART = 1000  # seeds of noise from those of networks
RECIPE = Recipe(6, 2e-3, 0.5)


def mlp(classes: int) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(256, WIDTH), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, classes))


def cnn(classes: int) -> nn.Module:
    widths = (1, 32, 64, WIDTH)
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, width, 3, stride=2 - (before == 64), padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, classes))


def network(build: Callable[[int], nn.Module], glyphs: Glyphs) -> nn.Module:
    """Trained here, or read from the cache."""
    torch.manual_seed(0)
    model = build(len(glyphs.alphabets[LETTERS]))
    generator = torch.Generator().manual_seed(0)

    def train() -> State:
        data = Split(*glyphs.draw(LETTERS, IMAGES, generator))
        fit(model, data, RECIPE, generator)
        return model.state_dict()

    name = f"recovery-{build.__name__}"
    key = cache.key(
        network=str(model), images=IMAGES, recipe=str(RECIPE), of=cache.digest(glyphs.tensors())
    )
    model.load_state_dict(cache.remember(name, key, train))
    return model.eval()


def by_nlm(method: str, **options: bool | None) -> Method:
    def found(
        a: nn.Module, b: nn.Module, spec: PermutationSpec, data: list[Tensor], seed: int
    ) -> Permutation:
        return nlm.align(a, b, spec, method, data=data, seed=seed, **options).permutation

    return found


def by_rebasin(
    a: nn.Module, b: nn.Module, spec: PermutationSpec, data: list[Tensor], seed: int
) -> Permutation:
    peer = Rebasin(a.state_dict(), b.state_dict(), spec, as_traced=False)
    peer.run(most=60.0)
    return {name: group.perm_indices for name, group in peer.groups.items()}


def by_scipy(sweeps: int, incoming: bool) -> Method:
    """Git Re-Basin's loop, or one pass by the weights that units read with."""

    def found(
        a: nn.Module, b: nn.Module, spec: PermutationSpec, data: list[Tensor], seed: int
    ) -> Permutation:
        first, second, permutation = a.state_dict(), b.state_dict(), spec.identity()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(sweeps):
            before, names = dict(permutation), list(spec.free)
            if not incoming:
                names = [names[at] for at in torch.randperm(len(names), generator=generator)]
            for name in names:
                others = {key: index for key, index in permutation.items() if key != name}
                moved = spec.apply(others, second)
                similarity = sum(
                    first[entry].movedim(dim, 0).flatten(1)
                    @ moved[entry].movedim(dim, 0).flatten(1).T
                    if first[entry].dim() > 1
                    else torch.outer(first[entry], moved[entry])
                    for entry, dim in spec.carriers(name)
                    if dim == 0 or not incoming
                )
                columns = linear_sum_assignment(similarity.numpy(), maximize=True)[1]
                permutation[name] = torch.from_numpy(columns)
            if all(torch.equal(before[name], permutation[name]) for name in names):
                break
        return permutation

    return found


METHODS: dict[str, Method] = {
    "nlm weights": by_nlm("weights"),
    "nlm weights, layerwise": by_nlm("weights", layerwise=True),
    "nlm weights, one descent": by_nlm("weights", layerwise=False),
    "nlm frank-wolfe": by_nlm("frank-wolfe"),
    "nlm frank-wolfe, layerwise": by_nlm("frank-wolfe", layerwise=True),
    "nlm activations": by_nlm("activations"),
    "nlm dual": by_nlm("dual"),
    "rebasin": by_rebasin,
    "Git Re-Basin with SciPy": by_scipy(sweeps=100, incoming=False),
    "greedy, SciPy": by_scipy(sweeps=1, incoming=True),
}


def copies(model: nn.Module, spec: PermutationSpec, noise: float, seed: int) -> Any:
    """A noisy copy in another order, and that order."""
    generator = torch.Generator().manual_seed(_APART + seed)
    state = {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    return spec.apply(spec.random(seed), state), spec.random(seed)


def objective(spec: PermutationSpec, a: nn.Module, b: nn.Module, found: Permutation) -> float:
    """What weight matching maximises: the inner product of all parameters with free groups."""
    first, moved = a.state_dict(), spec.apply(found, b.state_dict())
    names = {name for group in spec.free for name, _ in spec.carriers(group)}
    return float(sum((first[name].double() * moved[name].double()).sum() for name in names))


def share(spec: PermutationSpec, planted: Permutation, found: Permutation) -> float:
    """The share of units that are back in their place."""
    whole, still = spec.compose(planted, found), spec.identity()
    right = sum(int((whole[name] == still[name]).sum()) for name in spec.free)
    return right / sum(still[name].numel() for name in spec.free)


def measure(
    title: str,
    model: nn.Module,
    other: nn.Module,
    spec: PermutationSpec,
    data: list[Tensor],
    seeds: list[int],
) -> list[dict[str, Any]]:
    rows = []
    for noise in NOISES:
        found: dict[str, list[float]] = {}
        products: dict[str, list[float]] = {}
        for seed in seeds:
            state, planted = copies(model, spec, noise, seed)
            other.load_state_dict(state)
            for name, method in METHODS.items():
                if name.startswith("nlm") or not title.endswith("all groups"):
                    permutation = method(model, other, spec, data, seed)
                    found.setdefault(name, []).append(share(spec, planted, permutation))
                    product = objective(spec, model, other, permutation)
                    products.setdefault(name, []).append(product)
        rows += [
            {
                "network": title, "noise": noise, "method": name, "shares": shares,
                "objectives": products[name],
            }
            for name, shares in found.items()
        ]  # fmt: skip
        each = "  ".join(f"{name} {mean(shares):.3f}" for name, shares in found.items())
        print(f"{title}, noise {noise}: {each}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, default=RESULTS / "recovery.json")
    options = parser.parse_args()
    glyphs = load_glyphs()
    images, _ = glyphs.draw(LETTERS, CALIBRATION, torch.Generator().manual_seed(7))
    vit_task = task_of("vit", SETTINGS["vit"])
    rows = []
    for title, build in (("MLP", mlp), ("CNN", cnn), ("ViT", None)):
        if build is None:
            model, other = trained("vit", 0, SETTINGS["vit"]), vit_task.build().eval()
        else:
            model, other = network(build, glyphs), build(len(glyphs.alphabets[LETTERS])).eval()
        spec = nlm.trace(model, images[:8])
        chosen = {title: spec}
        if build is None:
            hidden = [name for name, group in spec.free.items() if group.size == 256]
            chosen = {"ViT, feed-forward": spec.restrict(hidden), "ViT, all groups": spec}
        for name, groups in chosen.items():
            rows += measure(name, model, other, groups, [images], options.seeds)
    options.json.write_text(json.dumps({**facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
