"""The atoms around protein chains as tensors: ligands, cofactors, ions.

A residue reads the atoms that are nearest to where its CB stands on an ideal backbone.
"""

from collections.abc import Sequence

import torch
from protein_chains import Batch, Chain, distances_between, named_atoms, side_by_side
from torch import Tensor
from torch.nn import functional

NEIGHBOURS = 32  # of a residue, K
NEAREST = 25  # atoms that a residue reads, M, at most
REACHED = "NACOB"  # the atoms of a residue whose distances to each of these are read
NOBLE = torch.tensor([0, 2, 10, 18, 36, 54])  # atomic numbers that periods end with
ATOMS, GROUPS, PERIODS = 120, 19, 8
KINDS = ATOMS + GROUPS + PERIODS  # an atom is one of each
NEAR = 8.0  # angstroms; so far is beside a ligand


def beside_ligands(chains: Sequence[Chain], seed: int, count: int = NEIGHBOURS) -> Batch:
    """Chains as one graph as :func:`side_by_side` makes it, and the atoms around them.

    Returns
    -------
    dict
        Also ``reach`` float32 [1, N, M, 5], the distances of the M atoms that a residue reads from
        its own, CB last, ``angles`` float32 [1, N, M, 4], where they stand in its frame, ``kinds``
        int64 [1, N, M, 3], element, group and period, counted as one, and ``apart`` float32
        [1, N, M, M], distances between these atoms. M may be 0.

    Raises
    ------
    ValueError
        A chain has fewer residues than there are neighbours, or residues of the chains read
        different numbers of atoms.
    """
    parts = [_around(chain) for chain in chains]
    known = sorted({part["reach"].shape[1] for part in parts})
    if len(known) > 1:
        raise ValueError(f"proteins: residues side by side read equally many atoms, got {known}")
    atoms = {name: torch.cat([part[name] for part in parts])[None] for name in parts[0]}
    return side_by_side(chains, seed, count) | atoms


def beside(batch: Batch) -> Tensor:
    """Bool [1, N], whether the ideal CB of a residue is near an atom."""
    return (batch["reach"][..., -1] < NEAR).any(-1)


def nearest_atoms(chain: Chain) -> Tensor:
    """Which atoms each residue reads, [N, M]."""
    apart = distances_between(named_atoms(chain)["B"][:, None], chain.around)
    return apart.topk(min(NEAREST, len(chain.around)), largest=False).indices


def _around(chain: Chain) -> Batch:
    named, nearest = named_atoms(chain), nearest_atoms(chain)
    places = chain.around[nearest]  # [N, M, 3]
    return {
        "reach": torch.stack(
            [distances_between(named[one][:, None], places) for one in REACHED], -1
        ),
        "angles": _angles(named, places),
        "kinds": kinds(chain.elements)[nearest],
        "apart": distances_between(places[:, :, None], places[:, None]),
    }


def _angles(named: dict[str, Tensor], places: Tensor) -> Tensor:
    """Cosine and sine around the third axis of a residue's frame, and of the height above it."""
    first = functional.normalize(named["N"] - named["A"], dim=-1)
    second = named["C"] - named["A"]
    second = functional.normalize(second - first * (first * second).sum(-1, keepdim=True), dim=-1)
    frame = torch.stack([first, second, torch.linalg.cross(first, second)], -1)
    x, y, z = ((places - named["A"][:, None]) @ frame).unbind(-1)  # [N, M]
    flat = (x.square() + y.square() + 1e-8).sqrt()
    away = (x.square() + y.square() + z.square()).sqrt() + 1e-8
    return torch.stack([x / flat, y / flat, flat / away, z / away], -1)


def kinds(elements: Tensor) -> Tensor:
    """Atomic number, group of 18 and period, each behind those before, [atoms, 3]."""
    period = torch.bucketize(elements, NOBLE)
    place, length = elements - NOBLE[period - 1], NOBLE[period] - NOBLE[period - 1]
    group = torch.where(place <= 2 - (length == 2).long(), place, place + 18 - length)
    return torch.stack([elements, ATOMS + group, ATOMS + GROUPS + period], -1)
