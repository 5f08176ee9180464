"""Networks of convolutions, written here."""

import torch
import torch.nn.functional as F
from symmetry.zoo._set_up import SetUp, images
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, **options)


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **options):
    return nn.Sequential(
        conv(inputs, outputs, kernel, stride, bias=False, **options), nn.BatchNorm2d(outputs)
    )


def classifier(trunk: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


class Residual(nn.Module):
    """The sum of a branch and a shortcut, behind an activation."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, act=F.relu) -> None:
        super().__init__()
        self.branch, self.shortcut, self.act = branch, shortcut or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))


def basic_block(inputs: int, outputs: int, stride: int = 1) -> Residual:
    changed = inputs != outputs or stride > 1
    return Residual(
        nn.Sequential(
            conv_norm(inputs, outputs, 3, stride), nn.ReLU(), conv_norm(outputs, outputs)
        ),
        conv_norm(inputs, outputs, 1, stride) if changed else None,
    )


def bottleneck(inputs: int, inner: int, outputs: int, groups: int = 1) -> Residual:
    return Residual(
        nn.Sequential(
            conv_norm(inputs, inner, 1),
            nn.ReLU(),
            conv_norm(inner, inner, groups=groups),
            nn.ReLU(),
            conv_norm(inner, outputs, 1),
        ),
        conv_norm(inputs, outputs, 1),
    )


def vgg() -> SetUp:
    network = nn.Sequential(
        *(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv(8, 12), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        *(nn.Linear(12 * 16, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5)),
    )
    return network, (images(16),), {}


def resnet() -> SetUp:
    blocks = basic_block(8, 8), basic_block(8, 16, 2), basic_block(16, 16)
    stem = conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()
    return classifier(nn.Sequential(*stem, *blocks), 16), (images(16),), {}


def resnext() -> SetUp:
    trunk = nn.Sequential(conv_norm(3, 8), bottleneck(8, 12, 16, 3), bottleneck(16, 12, 16, 3))
    return classifier(trunk, 16), (images(8),), {}


def wide_resnet() -> SetUp:
    """Activations before the convolutions, as Zagoruyko and Komodakis have it."""

    def block(inputs: int, outputs: int) -> Residual:
        return Residual(
            nn.Sequential(
                *(nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, outputs)),
                *(nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(), conv(outputs, outputs)),
            ),
            conv(inputs, outputs, 1) if inputs != outputs else None,
            nn.Identity(),
        )

    trunk = nn.Sequential(conv(3, 8), block(8, 16), block(16, 16), nn.BatchNorm2d(16), nn.ReLU())
    return classifier(trunk, 16), (images(8),), {}


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(
                *(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 6, 1)),
                *(nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4)),
            )
            for i in range(3)
        )
        self.transition, self.last = nn.Conv2d(20, 10, 1), conv(10, 4)
        self.norm, self.head = nn.BatchNorm2d(14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        x = F.avg_pool2d(self.transition(x), 2)
        x = torch.cat([x, self.last(x)], 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


def densenet() -> SetUp:
    return DenseNet(), (images(16),), {}


class Separable(nn.Module):
    """Depthwise and grouped convolutions, a misaligned GroupNorm, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.point = conv(3, 8), conv(8, 8, groups=8), conv(8, 12, 1)
        self.grouped, self.norm = conv(12, 24, groups=4), nn.GroupNorm(3, 24)
        self.squeeze, self.excite = nn.Linear(24, 6), nn.Linear(6, 24)
        self.multiplier, self.head = nn.Conv2d(24, 48, 3, groups=24), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.point(F.relu6(self.depth(self.stem(x)))))
        x = F.silu(self.norm(self.grouped(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.head(self.multiplier(x * gate[:, :, None, None]).flatten(2).mean(-1))


def dwsep() -> SetUp:
    return Separable(), (images(12),), {}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep, self.up = (
            conv(3, 8),
            conv(8, 16, 3, 2),
            nn.ConvTranspose2d(16, 8, 2, 2),
        )
        self.join, self.norm = conv(16, 8), nn.InstanceNorm2d(8, affine=True)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.wide(x))
        up = self.up(F.relu(self.deep(wide)))
        return self.head(F.relu(self.norm(self.join(torch.cat([up, wide], 1)))))


def unet() -> SetUp:
    return UNet(), (images(16),), {}


class Shuffle(nn.Module):
    """Two grouped convolutions with a channel shuffle between them."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.stem, self.first = conv(3, 8), conv(8, 8, 1, groups=groups)
        self.norm, self.second = nn.BatchNorm2d(8), conv(8, 8, groups=groups)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(self.stem(x))))
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        x = x.transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def shuffle() -> SetUp:
    return Shuffle(), (images(8),), {}


class ShuffleUnit(nn.Module):
    """ShuffleNet V2: the channels are split, one half passes, the halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *(conv_norm(half, half, 1), nn.ReLU(), conv_norm(half, half, groups=half)),
            *(conv_norm(half, half, 1), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return F.channel_shuffle(torch.cat([left, self.branch(right)], 1), 2)


def shufflenet_v2() -> SetUp:
    trunk = nn.Sequential(conv_norm(3, 12), nn.ReLU(), ShuffleUnit(12), conv(12, 16, 1), nn.ReLU())
    return classifier(trunk, 16), (images(8),), {}


class Branches(nn.Module):
    """Branches side by side, concatenated: Inception, Fire."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def squeezenet() -> SetUp:
    def fire(inputs: int, squeeze: int, expand: int) -> nn.Sequential:
        wide = Branches(conv(squeeze, expand, 1), conv(squeeze, expand))
        return nn.Sequential(conv(inputs, squeeze, 1), nn.ReLU(), wide, nn.ReLU())

    trunk = nn.Sequential(conv(3, 8), nn.ReLU(), fire(8, 4, 6), nn.MaxPool2d(2), fire(12, 4, 8))
    head = nn.Sequential(trunk, conv(16, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return head, (images(16),), {}


def inception() -> SetUp:
    def block(inputs: int) -> Branches:
        return Branches(
            conv(inputs, 4, 1),
            nn.Sequential(conv(inputs, 6, 1), nn.ReLU(), conv(6, 8)),
            nn.Sequential(conv(inputs, 5, 1), nn.ReLU(), conv(5, 4, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, 4, 1)),
        )

    stem = conv(3, 8), nn.ReLU()
    return classifier(nn.Sequential(*stem, block(8), nn.ReLU(), block(20)), 20), (images(8),), {}


class Excite(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(gate)


def efficientnet() -> SetUp:
    def inverted(channels: int, inner: int) -> Residual:
        return Residual(
            nn.Sequential(
                *(conv_norm(channels, inner, 1), nn.SiLU()),
                *(conv_norm(inner, inner, 3, groups=inner), nn.SiLU(), Excite(inner, 4)),
                conv_norm(inner, channels, 1),
            ),
            act=nn.Identity(),
        )

    trunk = nn.Sequential(conv_norm(3, 8), nn.SiLU(), inverted(8, 16), inverted(8, 16))
    return classifier(nn.Sequential(trunk, conv_norm(8, 20, 1), nn.SiLU()), 20), (images(8),), {}


def mobilenet_v3() -> SetUp:
    inner = nn.Sequential(
        *(conv_norm(8, 16, 1), nn.Hardswish(), conv_norm(16, 16, 5, groups=16), nn.Hardswish()),
        *(Excite(16, 4), nn.Hardsigmoid(), conv_norm(16, 8, 1)),
    )
    trunk = nn.Sequential(conv_norm(3, 8), nn.Hardswish(), Residual(inner, act=nn.Hardtanh()))
    return classifier(trunk, 8), (images(8),), {}


def conv_mixer() -> SetUp:
    def layer() -> nn.Sequential:
        depth = nn.Sequential(conv(12, 12, 5, groups=12), nn.GELU(), nn.BatchNorm2d(12))
        return nn.Sequential(
            Residual(depth, act=nn.Identity()), conv(12, 12, 1), nn.GELU(), nn.BatchNorm2d(12)
        )

    stem = nn.Conv2d(3, 12, 4, 4), nn.GELU(), nn.BatchNorm2d(12)
    return classifier(nn.Sequential(*stem, layer(), layer()), 12), (images(16),), {}


def super_resolution() -> SetUp:
    body = Residual(nn.Sequential(conv(8, 8), nn.PReLU(8), conv(8, 8)), act=nn.Identity())
    up = conv(8, 6 * 4), nn.PixelShuffle(2), nn.PReLU(), conv(6, 3)
    return nn.Sequential(conv(3, 8), nn.PReLU(), body, *up), (images(8),), {}


def space_to_depth() -> SetUp:
    trunk = nn.Sequential(conv(3, 6), nn.ReLU(), nn.PixelUnshuffle(2), conv(24, 12), nn.ReLU())
    return classifier(trunk, 12), (images(8),), {}


class Diffusion(nn.Module):
    """A U-Net with GroupNorm, a time embedding added to the channels and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.enter, self.shift = conv(3, 8), nn.Linear(16, 8)
        self.norms = nn.ModuleList(nn.GroupNorm(4, c) for c in (8, 16, 24))
        self.down, self.qkv, self.out = (
            conv(8, 16, 3, 2),
            nn.Conv1d(16, 48, 1),
            nn.Conv1d(16, 16, 1),
        )
        self.up, self.head = conv(24, 24), conv(24, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(-torch.arange(4, device=x.device, dtype=x.dtype))
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        skip = self.enter(x) + self.shift(F.silu(embedded))[:, :, None, None]
        x = self.down(F.silu(self.norms[0](skip)))
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(self.norms[1](x).flatten(2)).chunk(3, dim=1)
        q, k, v = (part.reshape(batch, 2, channels // 2, -1) for part in (q, k, v))
        weight = torch.einsum("bhct,bhcs->bhts", q, k).softmax(-1)
        attended = torch.einsum("bhts,bhcs->bhct", weight, v).reshape(batch, channels, -1)
        x = x + self.out(attended).view(batch, channels, height, width)
        x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1)
        return self.head(F.silu(self.norms[2](self.up(x))))


def diffusion_unet() -> SetUp:
    return Diffusion(), (images(8), torch.rand(2)), {}


class Autoencoder(nn.Module):
    """A variational autoencoder; the noise is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 8, 3, 2), nn.ReLU(), conv(8, 12, 3, 2), nn.ReLU())
        self.statistics, self.expand = nn.Linear(12 * 16, 2 * 6), nn.Linear(6, 12 * 16)
        self.decoder = nn.Sequential(
            *(nn.ConvTranspose2d(12, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.statistics(self.encoder(x).flatten(1)).chunk(2, dim=-1)
        code = mean + torch.exp(0.5 * log_variance) * 0.5
        return self.decoder(self.expand(code).unflatten(-1, (12, 4, 4)))


def autoencoder() -> SetUp:
    return Autoencoder(), (images(16),), {}


def conv3d() -> SetUp:
    trunk = nn.Sequential(
        *(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ELU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(6, 8, (1, 3, 3)), nn.LeakyReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()),
    )
    return nn.Sequential(trunk, nn.Linear(8, 5)), (torch.randn(2, 2, 4, 8, 8),), {}


def feature_pyramid() -> SetUp:
    return Pyramid(), (images(16),), {}


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(conv(i, o, 3, 2), nn.ReLU()) for i, o in ((3, 6), (6, 8), (8, 10))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, 7, 1) for c in (6, 8, 10))
        self.boxes = nn.Sequential(conv(7, 9), nn.ReLU(), conv(9, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        for lower, upper in ((1, 2), (0, 1)):
            size = levels[lower].shape[-2:]
            levels[lower] = levels[lower] + F.interpolate(levels[upper], size, mode="bilinear")
        return [self.boxes(level) for level in levels]


ZOO = {
    set_up.__name__: set_up
    for set_up in (
        *(vgg, resnet, resnext, wide_resnet, densenet, dwsep, unet, shuffle, shufflenet_v2),
        *(squeezenet, inception, efficientnet, mobilenet_v3, conv_mixer, super_resolution),
        *(space_to_depth, diffusion_unet, autoencoder, conv3d, feature_pyramid),
    )
}
