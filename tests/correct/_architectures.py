"""Small networks of the kinds that are corrected, and a batch for each."""

import copy

import torch
from gauge import _transformers as transformers
from torch import Tensor, nn
from torch.nn import functional as F

Made = tuple[nn.Module, Tensor]


class Block(nn.Module):
    """A residual block whose additions and activations are functions."""

    def __init__(self, inputs: int, outputs: int, norms: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norms else nn.Identity
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norms)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=not norms)
        self.bn2 = norm(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += identity
        return F.relu(out, inplace=True)


def resnet(norms: bool = True) -> Made:
    body = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), Block(6, 6, norms), Block(6, 8, norms),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return body, torch.randn(12, 3, 10, 10)


class PreNorm(nn.Module):
    """torchvision's encoder block: its attention is one of PyTorch's."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.ln_1(tokens)
        x, _ = self.attention(x, x, x, need_weights=False)
        x = self.dropout(x) + tokens
        return x + self.mlp(self.ln_2(x))


def vision_transformer() -> Made:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 12, 4, 4)
            self.position = nn.Parameter(torch.randn(1, 4, 12))
            self.layers = nn.Sequential(PreNorm(), PreNorm())
            self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
            return self.head(self.norm(self.layers(tokens))[:, 0])

    return Network(), torch.randn(12, 3, 8, 8)


def encoder(batch_first: bool = True) -> Made:
    layer = nn.TransformerEncoderLayer(12, 2, 24, activation="gelu", batch_first=batch_first)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
    return nn.Sequential(body, nn.Linear(12, 4)), torch.randn(12, 5, 12)


def tokens(build) -> Made:
    model, _ = build()
    return model, torch.randint(3, 40, (12, 8))


NETWORKS = {
    "resnet": resnet,
    "resnet without norms": lambda: resnet(False),
    "vision transformer": vision_transformer,
    "encoder": encoder,
    "bert": lambda: tokens(transformers.bert),
    "gpt2": lambda: tokens(transformers.gpt2),
    "vit": lambda: (transformers.vit()[0], torch.randn(12, 3, 16, 16)),
}


def pair(build) -> tuple[nn.Module, nn.Module, Tensor]:
    """A merged model, its expert, and data."""
    torch.manual_seed(0)
    model, x = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * max(parameter[0].numel(), 4) ** -0.5)
            if parameter.dim() == 1:
                parameter.add_(1)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.mul_(1.3).add_(0.3 * torch.randn_like(parameter) * parameter.std())
    return model.eval(), expert.eval(), x


def called(model: nn.Module, x: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        outputs = model(x, **kwargs)
    return getattr(outputs, "logits", outputs)
