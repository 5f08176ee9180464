"""Blocks of many vision networks, each between two convolutions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from symmetry.zoo._convolutional import Residual, classifier, conv, conv_norm
from symmetry.zoo._set_up import SetUp, images
from torch import Tensor, nn

CHANNELS = 12


class ChannelAndSpace(nn.Module):
    """CBAM: attention over channels, then over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.channel = nn.Sequential(nn.Linear(CHANNELS, 4), nn.ReLU(), nn.Linear(4, CHANNELS))
        self.space = conv(2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.channel(x.mean((2, 3))) + self.channel(x.amax((2, 3)))
        x = x * torch.sigmoid(gate)[..., None, None]
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.space(pooled))


class NeighbourGate(nn.Module):
    """ECA: a convolution over the channels, which keeps them in order."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mix(x.mean((2, 3))[:, None])[:, 0]
        return x * torch.sigmoid(gate)[..., None, None]


class Selective(nn.Module):
    """SKNet: two kernels weighed against each other in every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = conv_norm(CHANNELS, CHANNELS), conv_norm(CHANNELS, CHANNELS, 5)
        self.squeeze, self.select = nn.Linear(CHANNELS, 6), nn.Linear(6, 2 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.small(x), self.large(x)], 1)
        weight = self.select(F.relu(self.squeeze(both.sum(1).mean((2, 3)))))
        return (both * weight.view(-1, 2, CHANNELS, 1, 1).softmax(1)).sum(1)


class Pyramids(nn.Module):
    """DeepLab: convolutions of several dilations and the image's mean, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(CHANNELS, 6, 3, padding=d, dilation=d) for d in (1, 2, 3)
        )
        self.whole, self.project = conv(CHANNELS, 6, 1), conv_norm(24, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.whole(F.adaptive_avg_pool2d(x, 1))
        whole = F.interpolate(whole, x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(branch(x) for branch in self.branches), whole], 1))


class Ghost(nn.Module):
    """GhostNet: half of the channels are cheap images of the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.cheap = conv_norm(CHANNELS, 6, 1), conv_norm(6, 6, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        main = F.relu(self.main(x))
        return torch.cat([main, F.relu(self.cheap(main))], 1)[:, :CHANNELS]


class Scales(nn.Module):
    """Res2Net: every part of the channels is convolved after the one before was added."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = conv_norm(CHANNELS, 12, 1), conv_norm(12, CHANNELS, 1)
        self.parts = nn.ModuleList(conv_norm(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = F.relu(self.enter(x)).split(4, 1)
        done = [first]
        for layer, part in zip(self.parts, rest, strict=True):
            done.append(F.relu(layer(part + done[-1])))
        return self.leave(torch.cat(done, 1)) + x


class Reparameterised(nn.Module):
    """RepVGG while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = conv_norm(CHANNELS, CHANNELS), conv_norm(CHANNELS, CHANNELS, 1)
        self.identity = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.large(x) + self.small(x) + self.identity(x))


class NonLocal(nn.Module):
    """Attention between positions, with a gain of zero at the start (SAGAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.phi, self.value = (conv(CHANNELS, c, 1) for c in (4, 4, 8))
        self.out, self.gain = conv(8, CHANNELS, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, value = (each(x).flatten(2) for each in (self.theta, self.phi, self.value))
        weight = torch.bmm(theta.transpose(1, 2), phi).softmax(-1)
        y = torch.bmm(value, weight.transpose(1, 2)).unflatten(-1, x.shape[-2:])
        return x + self.gain * self.out(y)


class CrossCovariance(nn.Module):
    """XCiT: attention between the channels of a head, with a temperature for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.temperature = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(len(x), -1, 3, 3, CHANNELS // 3).permute(2, 0, 3, 4, 1)
        q, k = F.normalize(qkv[0], dim=-1), F.normalize(qkv[1], dim=-1)
        weight = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        y = (weight @ qkv[2]).permute(0, 3, 1, 2).flatten(2)
        return x + self.out(y).transpose(1, 2).view_as(x)


class TalkingHeads(nn.Module):
    """CaiT: linear layers between the heads, before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.before, self.after = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(len(x), -1, 3, 3, CHANNELS // 3).permute(2, 0, 3, 1, 4)
        score = self.before((qkv[0] @ qkv[1].transpose(-2, -1)).permute(0, 2, 3, 1))
        weight = self.after(score.softmax(-2)).permute(0, 3, 1, 2)
        y = (weight @ qkv[2]).transpose(1, 2).flatten(2)
        return x + self.out(y).transpose(1, 2).view_as(x)


class SpatialGate(nn.Module):
    """gMLP: half of the units are gated by the other half, mixed over the positions."""

    def __init__(self, positions: int = 64) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, 20), nn.Linear(10, CHANNELS)
        self.norm, self.mix = nn.LayerNorm(10), nn.Linear(positions, positions)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = F.gelu(self.enter(x.flatten(2).transpose(1, 2))).chunk(2, -1)
        gate = self.mix(self.norm(gate).transpose(1, 2)).transpose(1, 2)
        return x + self.leave(value * gate).transpose(1, 2).view_as(x)


class Affine(nn.Module):
    """ResMLP: an affine map in place of a norm, layer scale, mixing over the positions."""

    def __init__(self, positions: int = 64) -> None:
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(torch.randn(1, 1, CHANNELS)) for _ in range(2))
        self.mix, self.scale = nn.Linear(positions, positions), nn.Parameter(torch.zeros(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.mix((self.alpha * tokens + self.beta).transpose(1, 2)).transpose(1, 2)
        return (tokens + self.scale * mixed).transpose(1, 2).view_as(x)


class Modulated(nn.Module):
    """StyleGAN 2: the kernel is scaled by a style for every sample, and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Linear(CHANNELS, CHANNELS)
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        style = self.style(x.mean((2, 3))).view(batch, 1, CHANNELS, 1, 1)
        weight = self.weight[None] * (style + 1)
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-6)
        weight = weight.view(batch * CHANNELS, CHANNELS, 3, 3)
        y = F.conv2d(x.reshape(1, batch * CHANNELS, height, width), weight, padding=1, groups=batch)
        return y.view(batch, CHANNELS, height, width)


class Coordinates(nn.Module):
    """CoordConv: the coordinates of the pixels are further channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(CHANNELS + 2, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)
        columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        return self.conv(torch.cat([x, grid.expand(len(x), -1, -1, -1)], 1))


class Resolutions(nn.Module):
    """HRNet: two resolutions that are added to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.keep = conv_norm(CHANNELS, 8, 3, 2), conv_norm(CHANNELS, CHANNELS)
        self.up, self.low = conv_norm(8, CHANNELS, 1), conv_norm(8, 8)
        self.lower = conv_norm(CHANNELS, 8, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        high, low = F.relu(self.keep(x)), F.relu(self.down(x))
        low = F.relu(self.low(low) + self.lower(high))
        return F.relu(high + F.interpolate(self.up(low), scale_factor=2, mode="nearest"))


class Involution(nn.Module):
    """A kernel for every position, computed from it and shared by groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.span = conv(CHANNELS, 6, 1), conv(6, 3 * 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        weight = self.span(F.relu(self.reduce(x))).view(batch, 3, 1, 9, height, width)
        patches = F.unfold(x, 3, padding=1).view(batch, 3, CHANNELS // 3, 9, height, width)
        return (weight * patches).sum(3).view_as(x)


class Anchors(nn.Module):
    """YOLO: the outputs are a grid of anchors with box, score and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = conv(CHANNELS, 3 * 7, 1)
        self.register_buffer("sizes", torch.rand(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x).unflatten(1, (3, 7)).permute(0, 1, 3, 4, 2)
        centre, size, rest = y.split([2, 2, 3], -1)
        size = size.exp() * self.sizes[:, None, None]
        return torch.cat([centre.sigmoid(), size, rest.sigmoid()], -1)


class TwoStyles(nn.Module):
    """IBN: instance norm and batch norm for one half of the channels each; then AdaIN."""

    def __init__(self) -> None:
        super().__init__()
        self.instance, self.batch = nn.InstanceNorm2d(6, affine=True), nn.BatchNorm2d(6)
        self.style = nn.Linear(CHANNELS, 2 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split(6, 1)
        x = torch.cat([self.instance(first), self.batch(second)], 1)
        scale, shift = self.style(x.mean((2, 3)))[..., None, None].chunk(2, 1)
        variance, mean = torch.var_mean(x, (2, 3), keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt() * (1 + scale) + shift


class ChannelsLast(nn.Module):
    """Layer norm over the channels of [N, C, H, W], written out, and GRN with global statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(CHANNELS)),
            nn.Parameter(torch.zeros(CHANNELS)),
        )
        self.wide, self.narrow = nn.Linear(CHANNELS, 20), nn.Linear(20, CHANNELS)
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, 20))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        y = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        y = self.weight[:, None, None] * y + self.bias[:, None, None]
        y = F.gelu(self.wide(y.permute(0, 2, 3, 1)))
        energy = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        y = y + self.gamma * (y * (energy / (energy.mean(-1, keepdim=True) + 1e-6)))
        return x + self.narrow(y).permute(0, 3, 1, 2)


def between(block: Callable[[], nn.Module], last: bool = False) -> Callable[[], SetUp]:
    """A set-up with the block after a convolution, and before a classifier unless it comes last."""

    def set_up() -> SetUp:
        trunk = nn.Sequential(conv_norm(3, CHANNELS), nn.ReLU(), block())
        network = trunk if last else classifier(nn.Sequential(trunk, conv(CHANNELS, 9)), 9)
        return network, (images(8),), {}

    return set_up


def lenet() -> SetUp:
    network = nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 5), nn.Tanh()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 5)),
    )
    return network, (images(20),), {}


ZOO = {
    "cbam": between(ChannelAndSpace),
    "eca": between(NeighbourGate),
    "sknet": between(Selective),
    "deeplab": between(Pyramids),
    "ghostnet": between(Ghost),
    "res2net": between(Scales),
    "repvgg": between(Reparameterised),
    "non_local": between(NonLocal),
    "xcit": between(CrossCovariance),
    "talking_heads": between(TalkingHeads),
    "gmlp": between(SpatialGate),
    "resmlp": between(Affine),
    "stylegan": between(Modulated),
    "coordconv": between(Coordinates),
    "hrnet": between(Resolutions),
    "involution": between(Involution),
    "yolo": between(Anchors, last=True),
    "ibn_adain": between(TwoStyles),
    "channels_last": between(ChannelsLast),
    "spectral_norm": between(lambda: nn.utils.parametrizations.spectral_norm(conv(12, 12))),
    "softmax_channels": between(lambda: Residual(nn.Softmax2d())),
    "glu": between(lambda: nn.Sequential(conv(12, 24), nn.GLU(1))),
    "upsampling": between(lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.MaxPool2d(2))),
    "transposed_grouped": between(lambda: nn.ConvTranspose2d(12, 12, 2, 2, groups=3)),
    "transposed_depthwise": between(lambda: nn.ConvTranspose2d(12, 12, 2, 2, groups=12)),
    "local_response": between(lambda: nn.LocalResponseNorm(3)),
    "whole_layer_norm": between(lambda: nn.LayerNorm([12, 8, 8])),
    "flattened": between(
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768), nn.Linear(768, 9)), last=True
    ),
    "lenet": lenet,
}
