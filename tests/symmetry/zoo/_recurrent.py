"""Recurrent networks and networks over time, written here."""

import torch
import torch.nn.functional as F
from symmetry.zoo._set_up import SetUp, tokens
from torch import Tensor, nn


def sequence(length: int = 5, features: int = 6) -> Tensor:
    return torch.randn(2, length, features)


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


def lstm() -> SetUp:
    return Recurrent(nn.LSTM(6, 8, 2, batch_first=True), 8), (sequence(),), {}


def bilstm() -> SetUp:
    cell = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
    return Recurrent(cell, 16), (sequence(),), {}


def bigru() -> SetUp:
    cell = nn.GRU(6, 8, 2, batch_first=True, bidirectional=True)
    return Recurrent(cell, 16), (sequence(),), {}


def elman() -> SetUp:
    return Recurrent(nn.RNN(6, 8, 2, nonlinearity="relu"), 8), (sequence(),), {}


def projected_lstm() -> SetUp:
    return Recurrent(nn.LSTM(6, 8, 2, batch_first=True, proj_size=5), 5), (sequence(),), {}


class Cells(nn.Module):
    """A recurrent network unrolled by hand, and the layers that PyTorch offers for it."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm, self.rnn = nn.GRUCell(6, 8), nn.LSTMCell(8, 10), nn.RNNCell(10, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = x.new_zeros(2, 8), x.new_zeros(2, 10), x.new_zeros(2, 7)
        memory = second
        for step in x.unbind(1):
            first = self.gru(step, first)
            second, memory = self.lstm(first, (second, memory))
            third = self.rnn(second, third)
        return self.head(third)


def cells() -> SetUp:
    return Cells(), (sequence(3),), {}


class SequenceToSequence(nn.Module):
    """Recurrent encoder and decoder with additive attention (Bahdanau, Cho and Bengio)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 10)
        self.encoder = nn.GRU(10, 8, batch_first=True, bidirectional=True)
        self.bridge, self.decoder = nn.Linear(8, 12), nn.GRU(10, 12, batch_first=True)
        self.keys, self.queries, self.score = nn.Linear(16, 9), nn.Linear(12, 9), nn.Linear(9, 1)
        self.head = nn.Linear(16 + 12, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, last = self.encoder(self.words(source))
        state, _ = self.decoder(self.words(target), torch.tanh(self.bridge(last[1]))[None])
        energy = torch.tanh(self.queries(state)[:, :, None] + self.keys(memory)[:, None])
        weight = self.score(energy).squeeze(-1).softmax(-1)
        return self.head(torch.cat([weight @ memory, state], -1))


def gru_attention() -> SetUp:
    return SequenceToSequence(), (tokens(), tokens(length=4)), {}


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, 8, 1)
        self.gates = nn.ModuleList(nn.Conv1d(8, 2 * 6, 2, dilation=2**i) for i in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(6, 8, 1) for _ in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(6, 10, 1) for _ in range(3))
        self.head = nn.Conv1d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.enter(x), 0
        for i, gate in enumerate(self.gates):
            filtered, gated = gate(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            inner = torch.tanh(filtered) * torch.sigmoid(gated)
            x, total = x + self.residuals[i](inner), total + self.skips[i](inner)
        return self.head(F.relu(total))


def wavenet() -> SetUp:
    return WaveNet(), (torch.randn(2, 1, 12),), {}


class Temporal(nn.Module):
    """A temporal convolution network: padding that is cut off again, weight norm."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.first = norm(nn.Conv1d(4, 8, 3, padding=4, dilation=2))
        self.second = norm(nn.Conv1d(8, 8, 3, padding=4, dilation=2))
        self.shortcut, self.head = nn.Conv1d(4, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x)[..., :-4].contiguous())
        y = F.relu(self.second(y)[..., :-4].contiguous())
        return self.head(F.relu(y + self.shortcut(x))[..., -1])


def temporal() -> SetUp:
    return Temporal(), (torch.randn(2, 4, 10),), {}


ZOO = {
    set_up.__name__: set_up
    for set_up in (
        *(lstm, bilstm, bigru, elman, projected_lstm, cells, gru_attention, wavenet, temporal),
    )
}
