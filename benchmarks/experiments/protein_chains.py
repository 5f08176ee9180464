"""Protein chains as tensors: backbones from PDB files, neighbours, distances, decoding orders.

Several chains stand side by side as one graph without edges between them: there is no padding, and
all of them go through a network at once.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LETTERS = "ACDEFGHIKLMNPQRSTVWY"  # as the networks number them; 20 stands for all others
NAMES = ("ALA CYS ASP GLU PHE GLY HIS ILE LYS LEU MET ASN PRO GLN ARG SER THR VAL TRP TYR").split()
BACKBONE = ("N", "CA", "C", "O")
NEIGHBOURS = 48
PAIRS = (  # of atoms, in the order in which the networks read their distances; A and B: CA and CB
    "AA NN CC OO BB AN AC AO AB NC NO NB BC BO OC NA CA OA BA CN ON BN CB OB CO"
).split()

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Chain:
    """The residues of a chain whose backbone is complete.

    Attributes
    ----------
    atoms : float32 [residues, 4, 3], the places of N, CA, C and O in angstroms.
    numbers : int64 [residues], increasing along the chain, with gaps where residues are missing.
    letters : int64 [residues], the place of each residue in LETTERS, or 20.
    """

    name: str
    atoms: Tensor
    numbers: Tensor
    letters: Tensor

    def __len__(self) -> int:
        return len(self.letters)

    def start(self, count: int) -> "Chain":
        """The first residues alone."""
        return Chain(self.name, self.atoms[:count], self.numbers[:count], self.letters[:count])


def read_chain(path: Path) -> Chain:
    """The chain of a gzipped PDB file of a single one; of atoms given twice the first counts.

    Raises
    ------
    ValueError
        There is no residue with a complete backbone.
    """
    names: dict[str, str] = {}
    found: dict[str, dict[str, list[float]]] = {}
    with gzip.open(path, "rt") as lines:
        for line in lines:
            if line.startswith("ATOM"):
                number = line[22:27]  # with the code of an insertion
                names.setdefault(number, line[17:20])
                place = [float(line[start : start + 8]) for start in (30, 38, 46)]
                found.setdefault(number, {}).setdefault(line[12:16].strip(), place)
    whole = {number: atoms for number, atoms in found.items() if set(BACKBONE) <= set(atoms)}
    if not whole:
        raise ValueError(f"proteins: a chain has complete residues, got none in {str(path)!r}")
    numbers = torch.tensor([int(number[:4]) for number in whole])
    inserted = (numbers.diff(prepend=numbers[:1] - 1) == 0).cumsum(0)
    letters = [
        NAMES.index(names[number]) if names[number] in NAMES else len(NAMES) for number in whole
    ]
    atoms = torch.tensor([[atoms[name] for name in BACKBONE] for atoms in whole.values()])
    return Chain(path.name.partition(".")[0], atoms, numbers + inserted, torch.tensor(letters))


def side_by_side(chains: Sequence[Chain], seed: int, count: int = NEIGHBOURS) -> Batch:
    """Chains as one graph, each with a random decoding order of its own.

    Parameters
    ----------
    count : neighbours of a residue, K.

    Returns
    -------
    dict
        For N residues with K neighbours each, themselves among them: ``distances``
        float32 [1, N, K, 25], ``offsets`` int64 [1, N, K] (along the chain), ``neighbours``
        int64 [1, N, K], ``residues`` int64 [1, N] and ``earlier`` bool [1, N, K]: whether the
        neighbour is decoded before the residue.

    Raises
    ------
    ValueError
        A chain has fewer residues than there are neighbours.
    """
    generator = torch.Generator().manual_seed(seed)
    parts, start = [], 0
    for chain in chains:
        if len(chain) < count:
            raise ValueError(
                f"proteins: a chain has at least {count} residues, got {len(chain)} of {chain.name}"
            )
        part = _graph(chain, generator, count)
        part["neighbours"] += start
        start += len(chain)
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts])[None] for name in parts[0]}


def _graph(chain: Chain, generator: torch.Generator, count: int) -> Batch:
    order = torch.randperm(len(chain), generator=generator)
    nitrogen, alpha, carbon, oxygen = chain.atoms.unbind(1)
    to_alpha, to_carbon = alpha - nitrogen, carbon - alpha
    across = torch.linalg.cross(to_alpha, to_carbon)
    # Where CB stands on an ideal backbone.
    beta = alpha + 0.56802827 * to_alpha - 0.54067466 * to_carbon - 0.58273431 * across
    named = {"N": nitrogen, "A": alpha, "C": carbon, "O": oxygen, "B": beta}
    apart = _distances(alpha, alpha[:, None])
    neighbours = apart.topk(count, largest=False).indices  # [N, K]
    distances = [_distances(named[one][:, None], named[two][neighbours]) for one, two in PAIRS]
    return {
        "distances": torch.stack(distances, -1),
        "offsets": chain.numbers[:, None] - chain.numbers[neighbours],
        "neighbours": neighbours,
        "residues": chain.letters,
        "earlier": order[neighbours] < order[:, None],
    }


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return ((x - y).square().sum(-1) + 1e-6).sqrt()
