"""Small networks of many ideas: graphs, recommendation, text, flows."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from symmetry.zoo._set_up import SetUp, tokens
from torch import Tensor, nn

WIDTH = 12


def linears(*sizes: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1])


class TextCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, WIDTH, padding_idx=0)
        self.filters = nn.ModuleList(nn.Conv1d(WIDTH, 6, k) for k in (2, 3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x).transpose(1, 2)
        pooled = [F.max_pool1d(y := F.relu(f(x)), y.shape[-1]).squeeze(-1) for f in self.filters]
        return self.head(torch.cat(pooled, 1))


class Bag(nn.Module):
    """fastText: the mean of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(50, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x))


class Clicks(nn.Module):
    """DLRM: products between the embeddings of several features, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, WIDTH) for _ in range(3))
        self.bottom, self.top = linears(4, 10, WIDTH), linears(WIDTH + 6, 8, 1)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        features = [x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))]
        stacked = torch.stack(features, 1)
        products = stacked @ stacked.transpose(1, 2)
        rows, columns = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([x, products[:, rows, columns]], 1))


class FactorMachine(nn.Module):
    """DeepFM: first and second order terms beside an MLP on the same embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.factors, self.first = nn.Embedding(50, 6), nn.Embedding(50, 1)
        self.deep = linears(4 * 6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        v = self.factors(x)
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(-1, keepdim=True)
        return self.first(x).sum(1) + pairs + self.deep(v.flatten(1))


class Collaborative(nn.Module):
    """Neural collaborative filtering."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(50, 8), nn.Embedding(50, 8)
        self.users_deep, self.items_deep = nn.Embedding(50, 6), nn.Embedding(50, 6)
        self.deep, self.head = linears(12, 10, 7), nn.Linear(8 + 7, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = self.users(user) * self.items(item)
        deep = self.deep(torch.cat([self.users_deep(user), self.items_deep(item)], -1))
        return torch.sigmoid(self.head(torch.cat([product, deep], -1)))


class EdgeGraph(nn.Module):
    """Messages along a list of edges, gathered with index_add and with attention by scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.message = nn.Linear(6, WIDTH), linears(2 * WIDTH, 10, WIDTH)
        self.update, self.score = nn.GRUCell(WIDTH, WIDTH), nn.Linear(2 * WIDTH, 2)
        self.value, self.head = nn.Linear(WIDTH, 2 * 5), nn.Linear(10, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x, (source, target) = self.enter(x), edges.unbind(0)
        messages = self.message(torch.cat([x[source], x[target]], -1))
        x = self.update(torch.zeros_like(x).index_add(0, target, messages), x)
        weight = self.score(torch.cat([x[source], x[target]], -1)).exp()
        total = torch.zeros(len(x), 2).to(x).index_add(0, target, weight)[target]
        value = self.value(x).view(-1, 2, 5)[source] * (weight / (total + 1e-9))[..., None]
        gathered = torch.zeros(len(x), 2, 5).to(x).index_add(0, target, value)
        return self.head(gathered.flatten(1))


class Scattered(nn.Module):
    """GIN with scatter_add and a pooling by graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linears(6, 10, WIDTH), linears(WIDTH, 10, WIDTH)
        self.epsilon, self.norm = nn.Parameter(torch.zeros(1)), nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.first(x)
        index = edges[1][:, None].expand(-1, x.shape[1])
        neighbours = torch.zeros_like(x).scatter_add(0, index, x[edges[0]])
        x = self.norm(self.second((1 + self.epsilon) * x + neighbours))
        return self.head(torch.relu(x).mean(0, keepdim=True))


class Equivariant(nn.Module):
    """EGNN: distances in the messages, coordinates moved along differences."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.edge = nn.Linear(4, 8), linears(17, 10, 9, act=nn.SiLU)
        self.move, self.node = linears(9, 7, 1, act=nn.SiLU), linears(17, 10, 8, act=nn.SiLU)

    def forward(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        x, difference = self.enter(x), place[:, :, None] - place[:, None]
        distance = difference.square().sum(-1, keepdim=True)
        count = x.shape[1]
        pairs = x[:, :, None].expand(-1, -1, count, -1), x[:, None].expand(-1, count, -1, -1)
        message = self.edge(torch.cat([*pairs, distance], -1))
        place = place + (difference * self.move(message)).mean(2)
        x = x + self.node(torch.cat([x, message.sum(2)], -1))
        return x.sum(-1), place


class Duelling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.value = linears(6, WIDTH, 10), linears(10, 8, 1)
        self.advantage = linears(10, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.trunk(x))
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(-1, keepdim=True)


class Sines(nn.Module):
    """SIREN with FiLM: the frequencies and phases come from a mapping network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.mapping, self.head = linears(5, 10, 4 * WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        style = self.mapping(code).view(-1, 2, 2, WIDTH)
        for i, layer in enumerate(self.layers):
            x = torch.sin(30 * style[:, i, 0] * layer(x) + style[:, i, 1])
        return self.head(x)


class Hyper(nn.Module):
    """The weights of a layer are the outputs of another network."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(6, 8), nn.Linear(7, 3)
        self.weights, self.biases = linears(4, 9, 8 * 7), linears(4, 9, 7)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        weight, bias = self.weights(task).view(-1, 7, 8), self.biases(task)
        hidden = torch.einsum("bi,boi->bo", torch.relu(self.enter(x)), weight) + bias
        return self.head(torch.relu(hidden))


class Splines(nn.Module):
    """KAN: sums of radial functions of every input, with learnt coefficients [out, in, basis]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH, 6, 5))
        self.second = nn.Parameter(torch.randn(3, WIDTH, 5))
        self.register_buffer("grid", torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.first, self.second):
            basis = torch.exp(-((torch.tanh(x)[..., None] - self.grid) ** 2))
            x = torch.einsum("bik,oik->bo", basis, weight)
        return x


class Coupling(nn.Module):
    """RealNVP: one half is scaled and shifted by a network of the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(linears(3, 10, 6, act=nn.Tanh) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for network in self.networks:
            keep, move = x.chunk(2, -1)
            scale, shift = network(keep).chunk(2, -1)
            x = torch.cat([move * torch.exp(torch.tanh(scale)) + shift, keep], -1)
            total = total + torch.tanh(scale).sum(-1)
        return x, total


class Masked(nn.Module):
    """MADE: a constant mask on the weights keeps the order of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 9), nn.Linear(9, 4)
        degrees = torch.arange(9) % 3
        self.register_buffer("enter", (degrees[:, None] >= torch.arange(4)).float())
        self.register_buffer("leave", (torch.arange(4)[:, None] > degrees).float())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.first.weight * self.enter, self.first.bias))
        return F.linear(x, self.second.weight * self.leave, self.second.bias)


class Codebook(nn.Module):
    """VQ-VAE: the nearest of several codes, straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = linears(6, 10, 8), linears(8, 10, 6)
        self.codes = nn.Embedding(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        z, codes = self.enter(x), self.codes.weight
        distance = z.square().sum(-1, keepdim=True) - 2 * z @ codes.t() + codes.square().sum(-1)
        nearest = self.codes(distance.argmin(-1))
        return self.leave(z + (nearest - z).detach())


class Siamese(nn.Module):
    """One network for two inputs, compared by a cosine, a distance and their difference."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = linears(6, 10, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.trunk(x), self.trunk(y)
        cosine, distance = F.cosine_similarity(x, y), F.pairwise_distance(x, y)
        return torch.stack([cosine, distance, self.head((x - y).abs()).squeeze(-1)], -1)


class Mixture(nn.Module):
    """A mixture density network, with a log-sum-exp over the components as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = linears(6, WIDTH, act=nn.Tanh)
        self.weight, self.mean, self.scale = (nn.Linear(WIDTH, 5) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(self.trunk(x))
        error = (y[:, None] - self.mean(x)) * torch.exp(-self.scale(x))
        return (self.weight(x).log_softmax(-1) - 0.5 * error**2 - self.scale(x)).logsumexp(-1)


class Shared(nn.Module):
    """The same layer several times, as in a deep equilibrium or a neural ODE; tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.step = nn.Embedding(50, WIDTH), linears(WIDTH, 20, WIDTH, act=nn.Tanh)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for _ in range(3):
            x = x + 0.1 * self.step(self.norm(x))
        return F.linear(x, self.words.weight)


class Table(nn.Module):
    """TabTransformer: one embedding for each column, attention between columns, then all flat."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleList(nn.Embedding(50, 8) for _ in range(4))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu"),
            1,
            enable_nested_tensor=False,
        )
        self.numbers, self.head = nn.LayerNorm(3), linears(4 * 8 + 3, 10, 2, act=nn.SELU)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        columns = torch.stack([each(x[:, i]) for i, each in enumerate(self.columns)], 1)
        encoded = self.encoder(columns).flatten(1)
        return self.head(torch.cat([encoded, self.numbers(numbers)], 1))


class Sparse(nn.Module):
    """A sparse mixture of experts: the best two of four, their gates normalised, one-hot masks."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.leave = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.up, self.down = (
            nn.Parameter(torch.randn(4, 8, 10)),
            nn.Parameter(torch.randn(4, 10, 8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        weight, chosen = self.gate(x).softmax(-1).topk(2, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        mask = (F.one_hot(chosen, 4).to(x) * weight[..., None]).sum(-2)
        hidden = F.gelu(torch.einsum("btd,edf->tbef", x, self.up))
        return self.leave(x + torch.einsum("tbef,efd,bte->btd", hidden, self.down, mask))


class LowRank(nn.Module):
    """LoRA adapters, a factorised head and a bottleneck adapter around frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = linears(6, 14, WIDTH), nn.Linear(WIDTH, 3)
        self.down, self.up = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.zeros(WIDTH, 4))
        self.adapter = linears(WIDTH, 5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + 2.0 * (x @ self.down.t()) @ self.up.t()
        return self.head(y + self.adapter(y))


def once(network: type[nn.Module], *inputs: Callable[[], Tensor]) -> Callable[[], SetUp]:
    return lambda: (network(), tuple(each() for each in inputs), {})


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def codes(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(50, shape)


def edges() -> Tensor:
    return torch.randint(7, (2, 12))


ZOO = {
    "textcnn": once(TextCnn, tokens),
    "fasttext": once(Bag, tokens),
    "dlrm": once(Clicks, numbers(3, 4), codes(3, 3)),
    "deepfm": once(FactorMachine, codes(3, 4)),
    "collaborative": once(Collaborative, codes(3), codes(3)),
    "edge_graph": once(EdgeGraph, numbers(7, 6), edges),
    "gin": once(Scattered, numbers(7, 6), edges),
    "egnn": once(Equivariant, numbers(2, 5, 4), numbers(2, 5, 3)),
    "duelling": once(Duelling, numbers(4, 6)),
    "siren_film": once(Sines, numbers(4, 2), numbers(4, 5)),
    "hypernetwork": once(Hyper, numbers(3, 6), numbers(3, 4)),
    "kan": once(Splines, numbers(4, 6)),
    "realnvp": once(Coupling, numbers(4, 6)),
    "made": once(Masked, numbers(5, 4)),
    "vqvae": once(Codebook, numbers(5, 6)),
    "siamese": once(Siamese, numbers(4, 6), numbers(4, 6)),
    "mixture_density": once(Mixture, numbers(4, 6), numbers(4)),
    "shared_layers": once(Shared, tokens),
    "tab_transformer": once(Table, codes(3, 4), numbers(3, 3)),
    "sparse_moe": once(Sparse, numbers(2, 5, 6)),
    "lora": once(LowRank, numbers(4, 6)),
}
