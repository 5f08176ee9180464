"""Small transformers with weights that matter: gains and biases are not 1 and 0."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer with separate projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)

    def forward(self, x: Tensor) -> Tensor:
        n = self.n1(x)
        q, k, v = (
            part(n).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.n2(x))))


class GPT(nn.Module):
    """A byte GPT: learned positions, pre-norm LayerNorm, a head of its own or the embedding."""

    def __init__(self, width: int = 24, heads: int = 3, depth: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, width)
        self.positions = nn.Parameter(0.3 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 40, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def tokens(batch: int = 4, length: int = 12) -> Tensor:
    return torch.randint(3, 40, (batch, length))


def gpt() -> tuple[nn.Module, Tensor]:
    return GPT(), tokens()


def tied_gpt() -> tuple[nn.Module, Tensor]:
    return GPT(tied=True), tokens()


def gpt2() -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_embd=24, n_layer=2, n_head=3, n_positions=16, bos_token_id=0,
        eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokens()


def llama() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=40, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokens()


def vit() -> tuple[nn.Module, Tensor]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config), torch.randn(4, 3, 16, 16)


def bert() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=48, max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config), tokens()


PRE_NORM = {"gpt": gpt, "tied gpt": tied_gpt, "gpt2": gpt2, "llama": llama, "vit": vit}


def made(build) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode whose vectors and weights have the size of trained ones."""
    torch.manual_seed(0)
    network, inputs = build()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return network.eval(), inputs


def logits(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        outputs = network(inputs)
    return getattr(outputs, "logits", outputs)
