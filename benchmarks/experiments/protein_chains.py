"""Protein chains as tensors: backbones from PDB files, neighbours, distances, decoding orders.

Several chains stand side by side as one graph without edges between them: there is no padding, and
all of them go through a network at once.
"""

import bz2
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LETTERS = "ACDEFGHIKLMNPQRSTVWY"  # as the networks number them; 20 stands for all others
NAMES = ("ALA CYS ASP GLU PHE GLY HIS ILE LYS LEU MET ASN PRO GLN ARG SER THR VAL TRP TYR").split()
BACKBONE = ("N", "CA", "C", "O")
ELEMENTS = (  # by atomic number, hydrogen first
    "H HE LI BE B C N O F NE NA MG AL SI P S CL AR K CA SC TI V CR MN FE CO NI CU ZN GA GE AS SE "
    "BR KR RB SR Y ZR NB MO TC RU RH PD AG CD IN SN SB TE I XE"
).split()
HYDROGEN = ("H", "D")
WATER = ("HOH", "DOD")
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
    around : float32 [others, 3], the places of atoms that belong to no residue and no water,
        hydrogens left out.
    elements : int64 [others], their atomic numbers.
    """

    name: str
    atoms: Tensor
    numbers: Tensor
    letters: Tensor
    around: Tensor = field(default_factory=lambda: torch.zeros(0, 3))
    elements: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.letters)

    def start(self, count: int, others: int = 0) -> "Chain":
        """The first residues alone, and the first of the atoms around."""
        first = {name: getattr(self, name)[:count] for name in ("atoms", "numbers", "letters")}
        return replace(self, **first, around=self.around[:others], elements=self.elements[:others])


def read_chain(path: Path, letter: str = "") -> Chain:
    """The chain of a PDB file that has this letter; without, all chains count as one,
    in which each begins with its own numbers.

    Of atoms given twice the first counts. Files may be compressed by gzip or bzip2.

    Raises
    ------
    ValueError
        There is no residue with a complete backbone; an element behind xenon.
    """
    names: dict[str, str] = {}
    found: dict[str, dict[str, list[float]]] = {}
    elements: dict[tuple[str, str], str] = {}
    opened: Any = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    with opened(path, "rt") as lines:
        for line in lines:
            record, name, atom = line[:6], line[17:20], line[12:16].strip()
            if record not in ("ATOM  ", "HETATM") or name in WATER or letter not in line[21]:
                continue
            residue = record + line[21:27]  # its chain, its number, the code of an insertion
            names.setdefault(residue, name)
            place = [float(line[start : start + 8]) for start in (30, 38, 46)]
            found.setdefault(residue, {}).setdefault(atom, place)
            elements.setdefault((residue, atom), line[76:78].strip().upper())
    whole = {residue: atoms for residue, atoms in found.items() if set(BACKBONE) <= set(atoms)}
    if not whole:
        raise ValueError(f"proteins: a chain has complete residues, got none in {str(path)!r}")
    numbers = torch.tensor([int(residue[7:11]) for residue in whole])
    inserted = (numbers.diff(prepend=numbers[:1] - 1) == 0).cumsum(0)
    letters = [
        NAMES.index(names[residue]) if names[residue] in NAMES else len(NAMES) for residue in whole
    ]
    others = {
        (residue, atom): place
        for residue, atoms in found.items()
        if residue not in whole and residue.startswith("HETATM")
        for atom, place in atoms.items()
        if elements[residue, atom] not in HYDROGEN
    }
    return Chain(
        path.name.partition(".")[0],
        torch.tensor([[atoms[name] for name in BACKBONE] for atoms in whole.values()]),
        numbers + inserted,
        torch.tensor(letters),
        torch.tensor(list(others.values())).reshape(-1, 3),
        torch.tensor([_number(elements[key], path) for key in others], dtype=torch.int64),
    )


def _number(element: str, path: Path) -> int:
    if element not in ELEMENTS:
        raise ValueError(
            f"proteins: an element is one up to xenon, got {element!r} in {str(path)!r}"
        )
    return 1 + ELEMENTS.index(element)


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
    named = named_atoms(chain)
    apart = distances_between(named["A"], named["A"][:, None])
    neighbours = apart.topk(count, largest=False).indices  # [N, K]
    distances = [
        distances_between(named[one][:, None], named[two][neighbours]) for one, two in PAIRS
    ]
    return {
        "distances": torch.stack(distances, -1),
        "offsets": chain.numbers[:, None] - chain.numbers[neighbours],
        "neighbours": neighbours,
        "residues": chain.letters,
        "earlier": order[neighbours] < order[:, None],
    }


def named_atoms(chain: Chain) -> dict[str, Tensor]:
    """The places of N, A (CA), C, O and B (CB on an ideal backbone), [residues, 3] each."""
    nitrogen, alpha, carbon, oxygen = chain.atoms.unbind(1)
    to_alpha, to_carbon = alpha - nitrogen, carbon - alpha
    across = torch.linalg.cross(to_alpha, to_carbon)
    beta = alpha + 0.56802827 * to_alpha - 0.54067466 * to_carbon - 0.58273431 * across
    return {"N": nitrogen, "A": alpha, "C": carbon, "O": oxygen, "B": beta}


def distances_between(x: Tensor, y: Tensor) -> Tensor:
    """In angstroms, [..., 3] to [...]; never 0, as the networks were trained."""
    return ((x - y).square().sum(-1) + 1e-6).sqrt()
