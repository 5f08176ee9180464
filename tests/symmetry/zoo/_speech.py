"""Models of transformers for speech and sound."""

from typing import Any

import torch
from symmetry.zoo._set_up import (
    SDPA,
    SEQUENCE_TO_SEQUENCE,
    tokens,
    transformer,
    without,
)

SPEECH = {
    "vocab_size": 20,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}


def waveform() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400)}


def spectrogram(bands: int = 8, frames: int = 32) -> dict[str, Any]:
    return {"input_features": torch.randn(2, frames, bands)}


def series(length: int = 16, channels: int = 3) -> dict[str, Any]:
    return {"past_values": torch.randn(2, length, channels)}


ZOO = {
    "whisper": transformer(
        "WhisperForConditionalGeneration",
        lambda: {
            "input_features": torch.randn(2, 8, 32),
            "decoder_input_ids": tokens(length=5),
            "use_cache": False,
        },
        **without(SEQUENCE_TO_SEQUENCE, "max_position_embeddings"),
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "wav2vec2": transformer("Wav2Vec2ForCTC", waveform, **SPEECH, **SDPA),
    "wavlm": transformer("WavLMForCTC", waveform, **SPEECH),
    "sew": transformer("SEWForCTC", waveform, **SPEECH, squeeze_factor=2),
    "wav2vec2_conformer": transformer(
        "Wav2Vec2ConformerForCTC",
        waveform,
        **SPEECH,
        position_embeddings_type="relative",
        conv_depthwise_kernel_size=5,
        max_source_positions=64,
    ),
    "wav2vec2_bert": transformer(
        "Wav2Vec2BertForCTC",
        lambda: spectrogram(16),
        vocab_size=20,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        feature_projection_input_dim=16,
        conv_depthwise_kernel_size=5,
        layerdrop=0.0,
    ),
    "moonshine": transformer(
        "MoonshineForConditionalGeneration",
        lambda: {
            "input_values": torch.randn(2, 1600),
            "decoder_input_ids": tokens(length=5),
            "use_cache": False,
        },
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        encoder_num_key_value_heads=2,
        decoder_num_key_value_heads=2,
        max_position_embeddings=32,
    ),
    "speecht5_asr": transformer(
        "SpeechT5ForSpeechToText",
        lambda: {**waveform(), "decoder_input_ids": tokens(length=5), "use_cache": False},
        vocab_size=50,
        hidden_size=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    ),
    "ast": transformer(
        "ASTForAudioClassification",
        lambda: {"input_values": torch.randn(2, 32, 16)},
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=32,
        num_mel_bins=16,
        **SDPA,
    ),
    "speecht5_hifigan": transformer(
        "SpeechT5HifiGan",
        lambda: {"spectrogram": torch.randn(2, 6, 8)},
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    ),
    "bark": transformer(
        "BarkCausalModel",
        lambda: {"input_ids": tokens(), "use_cache": False},
        input_vocab_size=50,
        output_vocab_size=50,
        num_layers=2,
        num_heads=4,
        hidden_size=24,
        block_size=16,
    ),
    "parakeet": transformer(
        "ParakeetForCTC",
        lambda: spectrogram(16, 32),
        vocab_size=20,
        encoder_config={
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
            "conv_kernel_size": 5,
            "max_position_embeddings": 64,
        },
    ),
}
