"""Small transformers of other seeds and batches: the barriers between them, by alignment.

    OMP_NUM_THREADS=1 python benchmarks/experiments/transformer_barriers.py gpt bert vit

trains three networks of each kind (``small_training.py``): a pre-norm GPT and a post-norm masked
model on text, and a pre-norm ViT on images; the last two are fine-tuned too, from one head for all.
Prints the barrier of the loss between each two under each alignment, and writes one JSON a kind
beside this file. ``python benchmarks/barriers.py`` makes docs/barriers.md of them. The trained
networks are kept in nlm's cache; ``--quick`` does everything with next to no training, and
``--weights`` the alignments by weights alone, into a JSON of their own beside that of a whole run.
"""

import argparse
import copy
import itertools
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit
from small_training import (
    SETTINGS,
    Settings,
    Task,
    fine_tuned,
    loss,
    quick,
    task_of,
    trained,
    tuning_of,
)
from small_transformers import Transformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import nlm
from nlm.align import activation_matching, orthogonal_matching, weight_matching, without_heads
from nlm.correct import Selection
from nlm.evaluate import loss_barrier
from nlm.gauge import Gauge, find

State = Mapping[str, Tensor]

RESULTS = Path(__file__).parent / "results"
# The alignments whose means are corrected: where nothing rotates, and where it does.
CORRECTED = (("raw", "heads", "stream permuted"), ("folded", "heads", "heads rotated"))
BY_WEIGHTS: dict[str, dict[str, Any]] = {
    "by weights": {"layerwise": False},
    "by weights, layerwise": {"layerwise": True},
    "by weights, Frank-Wolfe": {"frank_wolfe": True, "layerwise": True},
}


@dataclass(frozen=True)
class Comparison:
    """What two networks are aligned by and compared on."""

    spec: nlm.PermutationSpec
    gauge: Gauge | None
    calibration: list[Tensor]
    evaluation: list[tuple[Tensor, Tensor]]
    points: int
    one_by_one: Tensor | None  # windows of text, for a masked model

    def folded(self, network: Transformer) -> Transformer:
        network = copy.deepcopy(network)
        if self.gauge is not None:
            network.load_state_dict(self.gauge.fold(network.state_dict()))
        return network

    def scrambled(self, network: Transformer, seed: int) -> Transformer:
        """The same function: units and heads in another order, what rotates rotated at random."""
        state = self.spec.apply(self.spec.random(seed), network.state_dict())
        if self.gauge is not None:
            state = self.gauge.apply(self.gauge.random(seed), state)
        other = copy.deepcopy(network)
        other.load_state_dict(state)
        return other

    def permuted(
        self, a: Transformer, b: Transformer, groups: Iterable[str], **variant: str
    ) -> State:
        found = activation_matching(a, b, self.spec.restrict(groups), self.calibration, **variant)
        return self.spec.apply(found.permutation, b.state_dict())

    def heads_ignored(self, a: Transformer, b: Transformer, groups: Iterable[str]) -> State:
        """Units leave their heads: what comes back computes something else."""
        flat = without_heads(self.spec.restrict(groups))
        found = activation_matching(a, b, flat, self.calibration)
        return flat.apply(found.permutation, b.state_dict())

    def rotated(self, a: Transformer, b: Transformer, gauge: Gauge) -> State:
        return orthogonal_matching(a, b, gauge, self.calibration).apply(b.state_dict())

    def alignments(self, a: Transformer, b: Transformer) -> dict[str, State]:
        """Alignment -> state dict of B, from little to all that may be done; both are folded."""
        spec = self.spec
        inside = [group for group in spec.free if spec.groups[group].parents]
        heads = dict.fromkeys(head for group in inside for head in spec.groups[group].parents)
        [stream] = [group for group in spec.free if ("norm.weight", 0) in spec.carriers(group)]
        rest = [group for group in spec.free if group != stream]
        found = {
            "feed-forward": self.permuted(a, b, set(rest) - {*heads, *inside}),
            "heads in order": self.permuted(a, b, rest, heads="monotonic"),
            "heads ignored": self.heads_ignored(a, b, rest),
            "heads": self.permuted(a, b, rest),
            "stream permuted, first": self.permuted(a, b, spec.free, residual="first"),
            "stream permuted, all": self.permuted(a, b, spec.free, residual="all"),
            "stream permuted": self.permuted(a, b, spec.free, residual="last"),
        }
        found |= self.by_weights(a, b)
        if self.gauge is not None:
            found["stream rotated"] = self.rotated(a, b, replace(self.gauge, inner=()))
            found["heads rotated"] = self.rotated(a, b, self.gauge)
        return found

    def by_weights(self, a: Transformer, b: Transformer) -> dict[str, State]:
        found = {}
        for name, options in BY_WEIGHTS.items():
            matched = weight_matching(a.state_dict(), b.state_dict(), self.spec, **options)
            found[name] = self.spec.apply(matched.permutation, b.state_dict())
        return found

    def rows(self, a: Transformer, lines: Mapping[str, tuple[State, State]]) -> dict[str, Any]:
        """The losses on lines between the weights of two networks."""
        rows = {}
        for name, (one, two) in lines.items():
            curve = loss_barrier(a, one, two, self.evaluation, points=self.points, loss=loss)
            rows[name] = {"barrier": curve.barrier, "losses": curve.losses}
            if self.one_by_one is not None:
                middle = {entry: torch.lerp(one[entry], two[entry], 0.5) for entry in one}
                rows[name]["pseudo_perplexity"] = self.pseudo_perplexity(a, middle)
        return rows

    def pair_by_weights(self, a: Transformer, b: Transformer) -> dict[str, Any]:
        """The same, of the networks as they are and under the alignments by weights alone."""
        there, other = self.folded(a), self.folded(b)
        lines = {"raw": (a.state_dict(), b.state_dict())}
        moved = self.by_weights(there, other)
        lines |= {name: (there.state_dict(), state) for name, state in moved.items()}
        return {"rows": self.rows(a, lines)}

    def pair(self, a: Transformer, b: Transformer) -> dict[str, Any]:
        """The losses on the line between two networks, under each alignment."""
        there, other = self.folded(a), self.folded(b)
        first = there.state_dict()
        copied = self.scrambled(there, 2)
        if self.gauge is None:
            back = self.permuted(there, copied, self.spec.free, residual="last")
        else:
            back = self.rotated(there, copied, self.gauge)
        lines: dict[str, tuple[State, State]] = {"raw": (a.state_dict(), b.state_dict())}
        if self.gauge is not None:
            lines["folded"] = first, other.state_dict()
        lines["scrambled"] = first, self.scrambled(other, 1).state_dict()
        lines |= {name: (first, moved) for name, moved in self.alignments(there, other).items()}
        lines["a copy that was scrambled"] = first, back
        found: dict[str, Any] = {"rows": self.rows(a, lines), "corrected": {}}
        for name in CORRECTED[self.gauge is not None]:
            ends = copy.deepcopy(a), copy.deepcopy(a)
            for end, state in zip(ends, lines[name], strict=True):
                end.load_state_dict(state)
            found["corrected"][name] = self.corrected(*ends)
        if self.one_by_one is not None:
            own = [self.pseudo_perplexity(each, each.state_dict()) for each in (a, b)]
            found["pseudo_perplexity"] = own
        return found

    def corrected(self, a: Transformer, b: Transformer) -> dict[str, float]:
        """The loss of the mean of two networks, and of that when it is corrected or refitted.

        "select": refitted, with the best of the units and heads of both networks and their means.
        """
        mean = copy.deepcopy(a)
        ends = {"a": a.state_dict(), "b": b.state_dict()}
        mean.load_state_dict(nlm.merge(ends, method="linear"))
        members = {"a": a, "b": b}
        data = dict.fromkeys(members, self.calibration)
        refit = partial(nlm.refit, mean, members, self.calibration, outputs=True, max_samples=None)
        models = {
            "mean": mean,
            "repair": nlm.Repair.fit(mean, members, data, max_samples=None),
            "refit": refit(),
            "select": refit(select=Selection(self.spec)),
        }
        return {name: self.held_out(model) for name, model in models.items()}

    def held_out(self, model: nn.Module) -> float:
        """The loss of a model on the held-out data."""
        with torch.no_grad():
            losses = [(len(x), float(loss(model(x), y))) for x, y in self.evaluation]
        return sum(n * each for n, each in losses) / sum(n for n, _ in losses)

    def pseudo_perplexity(self, network: Transformer, state: State) -> float:
        """exp of the mean surprise at each character, masked alone (Salazar et al. 2020)."""
        assert self.one_by_one is not None
        mask = len(state["embedding.weight"]) - 1
        surprise = []
        for window in self.one_by_one:
            hidden = window.repeat(len(window), 1).fill_diagonal_(mask)
            with torch.no_grad():
                logits = functional_call(network, dict(state), (hidden,))
            surprise.append(functional.cross_entropy(logits.diagonal().T, window).item())
        return math.exp(sum(surprise) / len(surprise))


def compare(
    kind: str,
    settings: Settings,
    networks: Mapping[int, Transformer],
    task: Task,
    weights_alone: bool,
) -> dict[str, Any]:
    """The barriers between each two networks of one task."""
    generator = torch.Generator().manual_seed(7)
    calibration, _ = task.draw(settings.calibration, generator, False)
    inputs, targets = task.draw(settings.evaluation, generator, True)
    masked = kind == "bert" and targets.shape == inputs.shape
    whole = torch.where(targets < 0, inputs, targets)[: settings.one_by_one] if masked else None
    first, example = next(iter(networks.values())), calibration[:4]
    spec = nlm.trace(first, example)
    gauge, refused = None, ""
    try:
        gauge = find(first, example, spec)
    except nlm.SymmetryError as error:
        refused = str(error)
    comparison = Comparison(
        spec, gauge, list(calibration.split(100)),
        list(zip(inputs.split(100), targets.split(100), strict=True)), settings.points, whole,
    )  # fmt: skip
    pairs = []
    for one, two in itertools.combinations(networks, 2):
        measure = comparison.pair_by_weights if weights_alone else comparison.pair
        pairs.append({"seeds": [one, two], **measure(networks[one], networks[two])})
        for name, row in pairs[-1]["rows"].items():
            middle = row["losses"][settings.points // 2]
            text = f"{name:26} {row['barrier']:+.4f}  halfway {middle:.4f}"
            print(f"{kind} {one} {two}  {text}", flush=True)
    return {
        "pairs": pairs,
        "refused": refused,
        "proof_error": None if gauge is None else gauge.error,
    }


def run(
    kind: str, settings: Settings, seeds: Sequence[int], weights_alone: bool = False
) -> dict[str, Any]:
    """The barriers between all pairs of the networks of some seeds, and of those fine-tuned."""
    found: dict[str, Any] = {"kind": kind, "settings": asdict(settings)}
    networks = {seed: trained(kind, seed, settings) for seed in seeds}
    found |= compare(kind, settings, networks, task_of(kind, settings), weights_alone)
    if settings.tuning is not None:
        networks = {seed: fine_tuned(kind, seed, settings) for seed in seeds}
        found["fine_tuned"] = compare(
            kind, settings, networks, tuning_of(kind, settings), weights_alone
        )
    found["machine"] = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    found["versions"] = {"nlm": nlm.__version__, "torch": torch.__version__}
    return {**found, "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=list(SETTINGS), metavar="gpt|bert|vit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--results", type=Path, help="the folder of the JSON files")
    parser.add_argument("--quick", action="store_true", help="written to --results alone")
    parser.add_argument("--weights", action="store_true", help="alignments by weights alone")
    chosen = parser.parse_args()
    folder = chosen.results or (None if chosen.quick else RESULTS)
    for kind in chosen.kinds:
        settings = quick(SETTINGS[kind]) if chosen.quick else SETTINGS[kind]
        settings = replace(settings, steps=chosen.steps or settings.steps)
        found = run(kind, settings, chosen.seeds, chosen.weights)
        if folder is not None:
            path = folder / f"transformer_barriers_{kind}{'_weights' * chosen.weights}.json"
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
