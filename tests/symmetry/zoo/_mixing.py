"""Attention of other kinds, and other layers that mix positions, written here."""

import torch
import torch.nn.functional as F
from symmetry.zoo._ideas import numbers, once
from torch import Tensor, nn


class SetAttention(nn.Module):
    """Set transformer: inducing points and pooling by attention, with nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 3)
        self.points, self.seed = nn.Parameter(torch.randn(5, 16)), nn.Parameter(torch.randn(1, 16))
        self.down, self.up, self.pool = (
            nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        points = self.points.expand(len(x), -1, -1)
        points = points + self.down(points, x, x)[0]
        x = x + self.up(x, points, points)[0]
        return self.leave(self.pool(self.seed.expand(len(x), -1, -1), x, x)[0][:, 0])


class OddAttention(nn.Module):
    """nn.MultiheadAttention with other key and value widths, extra biases and weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.memory = nn.Linear(6, 16), nn.Linear(6, 10)
        self.attention = nn.MultiheadAttention(
            16, 4, kdim=10, vdim=10, add_bias_kv=True, add_zero_attn=True, batch_first=True
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, memory = self.query(x), self.memory(x)
        y, weight = self.attention(query, memory, memory)
        return self.head(y), weight


class Linear(nn.Module):
    """Attention without a softmax over the positions: features, running sums, decay (RetNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 3)
        self.query, self.key, self.value = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (each(x).unflatten(-1, (4, 4)) for each in (self.query, self.key, self.value))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bthi,bthj->bthij", k, v).cumsum(1)
        y = torch.einsum("bthi,bthij->bthj", q, state)
        y = y / torch.einsum("bthi,bthi->bth", q, k.cumsum(1))[..., None]
        return self.leave(x + self.norm(y.flatten(0, 1).flatten(1)).unflatten(0, x.shape[:2]))


class StateSpace(nn.Module):
    """S4D: a diagonal state space as a long convolution by FFT, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.decay, self.mix = nn.Parameter(torch.rand(8, 4)), nn.Parameter(torch.randn(8, 4))
        self.gate, self.skip = nn.Linear(8, 16), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).transpose(1, 2)
        length = x.shape[-1]
        time = torch.arange(length, device=x.device)
        kernel = (self.mix[..., None] * torch.exp(-self.decay[..., None] * time)).sum(1)
        spectrum = torch.fft.rfft(kernel, n=2 * length) * torch.fft.rfft(x, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + self.skip[:, None] * x
        return self.leave(F.glu(self.gate(F.gelu(y).transpose(1, 2)), -1))


class LongMemory(nn.Module):
    """Linformer and external attention: keys shortened by a projection, a learnt memory."""

    def __init__(self, length: int = 5) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.qkv, self.shorten = nn.Linear(8, 24), nn.Parameter(torch.randn(length, 3))
        self.keys, self.values = nn.Linear(8, 7, bias=False), nn.Linear(7, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = (torch.einsum("btd,ts->bsd", each, self.shorten) for each in (k, v))
        x = x + (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
        weight = self.keys(x).softmax(1)
        return self.leave(x + self.values(weight / weight.sum(-1, keepdim=True)))


class Rotary(nn.Module):
    """Rotary positions by complex numbers, as Llama's first code writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 3)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def turn(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        angles = torch.outer(torch.arange(x.shape[1]), 1.0 / 10 ** torch.arange(2.0)).to(x)
        return torch.view_as_real(
            pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        ).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (each(x).unflatten(-1, (4, 4)) for each in (self.query, self.key, self.value))
        q, k, v = (each.transpose(1, 2) for each in (self.turn(q), self.turn(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.leave(x + y.transpose(1, 2).flatten(2))


ZOO = {
    "set_transformer": once(SetAttention, numbers(2, 7, 6)),
    "odd_attention": once(OddAttention, numbers(2, 5, 6)),
    "linear_attention": once(Linear, numbers(2, 5, 6)),
    "s4d": once(StateSpace, numbers(2, 5, 6)),
    "linformer": once(LongMemory, numbers(2, 5, 6)),
    "complex_rotary": once(Rotary, numbers(2, 5, 6)),
}
