"""Small transformers with weights that matter: gains and biases are not 1 and 0."""

import small_transformers as small
import torch
from torch import Tensor, nn

SIZE = small.Size(width=24, depth=2, heads=3, hidden=48)


def tokens(batch: int = 4, length: int = 12) -> Tensor:
    return torch.randint(3, 40, (batch, length))


def gpt() -> tuple[nn.Module, Tensor]:
    return small.gpt(40, 16, SIZE), tokens()


def tied_gpt() -> tuple[nn.Module, Tensor]:
    network = small.gpt(40, 16, SIZE)
    network.head = nn.Linear(24, 40, bias=False)
    network.head.weight = network.embedding.weight
    return network, tokens()


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


def beit() -> tuple[nn.Module, Tensor]:
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        image_size=16, patch_size=4, num_labels=5, layer_scale_init_value=0.5,
    )  # fmt: skip
    return BeitForImageClassification(config), torch.randn(4, 3, 16, 16)


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, use_cache=False
    )
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(length=5)}
    return T5ForConditionalGeneration(config), inputs


def bert() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=48, max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config), tokens()


PRE_NORM = {"gpt": gpt, "tied gpt": tied_gpt, "gpt2": gpt2, "llama": llama, "vit": vit}


def made(build) -> tuple[nn.Module, Tensor | dict[str, Tensor]]:
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


def logits(network: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = network(**inputs) if isinstance(inputs, dict) else network(inputs)
    return getattr(outputs, "logits", outputs)
