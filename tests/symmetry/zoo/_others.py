"""Models of transformers for series, decisions, proteins and documents."""

from typing import Any

import torch
from symmetry.zoo._set_up import (
    ENCODER,
    tokens,
    transformer,
)


def waveform() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400)}


def spectrogram(bands: int = 8, frames: int = 32) -> dict[str, Any]:
    return {"input_features": torch.randn(2, frames, bands)}


def series(length: int = 16, channels: int = 3) -> dict[str, Any]:
    return {"past_values": torch.randn(2, length, channels)}


ZOO = {
    "decision_transformer": transformer(
        "DecisionTransformerModel",
        lambda: {
            "states": torch.randn(2, 4, 5),
            "actions": torch.randn(2, 4, 3),
            "rewards": torch.randn(2, 4, 1),
            "returns_to_go": torch.randn(2, 4, 1),
            "timesteps": torch.arange(4).repeat(2, 1),
            "attention_mask": torch.ones(2, 4),
        },
        state_dim=5,
        act_dim=3,
        hidden_size=24,
        max_ep_len=16,
        n_layer=2,
        n_head=4,
        n_positions=32,
    ),
    "patchtst": transformer(
        "PatchTSTForPrediction",
        series,
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=24,
        prediction_length=4,
        do_mask_input=False,
    ),
    "patchtsmixer": transformer(
        "PatchTSMixerForPrediction",
        series,
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_layers=2,
        prediction_length=4,
        mode="mix_channel",
        gated_attn=True,
    ),
    "perceiver_text": transformer(
        "PerceiverForMaskedLM",
        lambda: {"inputs": tokens()},
        vocab_size=50,
        d_model=24,
        num_latents=6,
        d_latents=32,
        num_self_attends_per_block=1,
        num_blocks=1,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        max_position_embeddings=7,
    ),
    "tapas": transformer(
        "TapasForSequenceClassification",
        lambda: {
            "input_ids": tokens(),
            "token_type_ids": torch.zeros(2, 7, 7, dtype=torch.long),
            "attention_mask": torch.ones(2, 7, dtype=torch.long),
        },
        **ENCODER,
        type_vocab_sizes=[3, 8, 8, 2, 8, 10, 10],
    ),
    "mgp_str": transformer(
        "MgpstrForSceneTextRecognition",
        lambda: {"pixel_values": torch.randn(2, 3, 16, 32)},
        image_size=[16, 32],
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2.0,
        max_token_length=5,
        num_character_labels=10,
        num_bpe_labels=12,
        num_wordpiece_labels=11,
    ),
}
