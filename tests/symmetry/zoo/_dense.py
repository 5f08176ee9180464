"""Networks of linear layers, attention and mixtures of experts, written here."""

import torch
import torch.nn.functional as F
from symmetry.zoo._set_up import SetUp, images
from torch import Tensor, nn


def sequence(length: int = 5, features: int = 6) -> Tensor:
    return torch.randn(2, length, features)


def mlp() -> SetUp:
    layers = nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 5)
    return nn.Sequential(*layers), (torch.randn(4, 9),), {}


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.attention(x, x, x, need_weights=False)[0])


def mha() -> SetUp:
    return SelfAttention(), (sequence(),), {}


def enclayer() -> SetUp:
    first = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)
    second = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.Sequential(nn.Linear(6, 16), first, second, nn.Linear(16, 3)), (sequence(),), {}


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 3)
        self.transformer = nn.Transformer(16, 4, 1, 1, 24, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.leave(self.transformer(self.enter(x), self.enter(y)))


def declayer() -> SetUp:
    return Translator(), (sequence(), sequence(4)), {}


class FusedAttention(nn.Module):
    """Attention as timm writes it: one linear layer, a view and an unbind."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return x + self.scale * self.leave(y)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.Sequential(FusedAttention(), FusedAttention())
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def timmvit() -> SetUp:
    return Patches(), (images(16),), {}


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16))
        self.channels = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(x.mean(1))


def mixer() -> SetUp:
    return Mixer(), (images(16),), {}


class Perceiver(nn.Module):
    """Latent vectors that attend to the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, 16))
        self.enter, self.leave = nn.Linear(6, 12), nn.Linear(16, 2)
        self.query, self.out = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.key, self.value = nn.Linear(12, 16, bias=False), nn.Linear(12, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.enter(x), self.latents.expand(x.shape[0], -1, -1)
        shape = (x.shape[0], -1, 4, 4)
        q = self.query(latents).view(shape).transpose(1, 2)
        k, v = (each(x).view(shape).transpose(1, 2) for each in (self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.leave((latents + self.out(y)).mean(1))


def perceiver() -> SetUp:
    return Perceiver(), (sequence(),), {}


class ModuleExperts(nn.Module):
    """Every expert is a module of its own; the gate reads the input and weighs all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.leave = nn.Linear(6, 12), nn.Linear(6, 3), nn.Linear(12, 5)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)) for _ in range(3)
        )
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        weight, x = self.gate(x).softmax(-1), self.enter(x)
        mixed = sum(weight[..., i : i + 1] * each(x) for i, each in enumerate(self.experts))
        return self.leave(self.norm(mixed))


def modulelist_moe() -> SetUp:
    return ModuleExperts(), (sequence(),), {}


class StackedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.leave = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 5)
        self.up, self.down = (nn.Parameter(torch.randn(4, 12, 10)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        hidden = torch.einsum("btd,edf->btef", x, self.up).relu()
        return self.leave(
            torch.einsum("btef,edf,bte->btd", hidden, self.down, self.gate(x).softmax(-1))
        )


def einsum_moe() -> SetUp:
    return StackedExperts(), (sequence(),), {}


class StackedProjections(nn.Module):
    """Query, key and value in one parameter ``[3, width, heads * inner]``."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 3)
        self.qkv = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btc,scd->sbtd", self.enter(x), self.qkv).unbind(0)
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in (q, k, v))
        return self.leave(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def stacked_qkv3d() -> SetUp:
    return StackedProjections(), (sequence(),), {}


class Tied(nn.Module):
    """An autoencoder whose decoder is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 7))
        self.bias, self.scale = nn.Parameter(torch.randn(10)), nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight, self.bias).relu() * self.scale) @ self.weight


def tied_autoenc() -> SetUp:
    return Tied(), (torch.randn(4, 7),), {}


class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 3 * 8), nn.Linear(8, 5)
        self.blocks = nn.Linear(8, 8 * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).unflatten(-1, (3, 8)).amax(-2)
        return self.leave(self.blocks(x).unflatten(-1, (8, 2)).max(-1).values)


def maxout() -> SetUp:
    return Maxout(), (torch.randn(4, 6),), {}


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 9)
        self.pair, self.low = nn.Bilinear(8, 9, 10), nn.Linear(6, 10)
        self.leave = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.pair(self.left(x), self.right(x)) * torch.tanh(self.low(x)))


def bilinear() -> SetUp:
    return Bilinear(), (torch.randn(4, 6),), {}


class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 5)
        self.gates = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.gates:
            value, gate = layer(x).chunk(2, dim=-1)
            gate = torch.sigmoid(gate)
            x = gate * value.relu() + (1 - gate) * x
        return self.leave(x)


def highway() -> SetUp:
    return Highway(), (torch.randn(4, 6),), {}


class Radiance(nn.Module):
    """NeRF: Fourier features, a skip by concatenation, density and colour."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(18, 16), nn.Linear(16 + 18, 12)
        self.density, self.feature = nn.Linear(12, 1), nn.Linear(12, 10)
        self.view, self.colour = nn.Linear(10 + 3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, direction: Tensor) -> Tensor:
        waves = (x[..., None] * 2.0 ** torch.arange(3, device=x.device)).flatten(-2)
        waves = torch.cat([waves.sin(), waves.cos()], -1)
        x = torch.cat([F.relu(self.first(waves)), waves], -1)
        x = F.relu(self.second(x))
        colour = F.relu(self.view(torch.cat([self.feature(x), direction], -1)))
        return torch.cat([F.softplus(self.density(x)), self.colour(colour).sigmoid()], -1)


def nerf() -> SetUp:
    return Radiance(), (torch.randn(4, 3), torch.randn(4, 3)), {}


class GraphConvolutions(nn.Module):
    """Graph convolution and graph attention over a dense adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.leave = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.source, self.target = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1).clamp(min=1).rsqrt()
        x = F.relu((degree[:, None] * adjacency * degree[None]) @ self.first(x))
        score = F.leaky_relu((x @ self.source)[:, None] + (x @ self.target)[None])
        weight = score.masked_fill(adjacency == 0, -1e9).softmax(-1)
        return self.leave(F.elu(weight @ self.second(x)))


def graph_convolutions() -> SetUp:
    adjacency = (torch.rand(7, 7) > 0.5).float()
    return GraphConvolutions(), (torch.randn(7, 6), adjacency), {}


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 10, 1))
        self.rotation, self.points = nn.Linear(10, 9), nn.Conv1d(3, 12, 1)
        self.norm, self.segment = nn.BatchNorm1d(12), nn.Conv1d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        rotation = self.rotation(self.transform(x).amax(-1)).view(-1, 3, 3)
        x = F.relu(self.norm(self.points(rotation @ x)))
        pooled = x.max(-1, keepdim=True).values.expand_as(x)
        return self.segment(torch.cat([x, pooled], 1))


def pointnet() -> SetUp:
    return PointNet(), (torch.randn(2, 3, 11),), {}


ZOO = {
    set_up.__name__: set_up
    for set_up in (
        *(mlp, mha, enclayer, declayer, timmvit, mixer, perceiver, modulelist_moe, einsum_moe),
        *(stacked_qkv3d, tied_autoenc, maxout, bilinear, highway, nerf, graph_convolutions),
        *(pointnet,),
    )
}
