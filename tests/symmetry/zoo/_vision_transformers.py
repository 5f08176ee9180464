"""Vision transformers of transformers."""

from typing import Any

import torch
from symmetry.zoo._set_up import (
    VISION,
    images,
    masked_text,
    picture,
    transformer,
)


def text_and_picture() -> dict[str, Any]:
    return {**masked_text(), **picture()}


def large_picture() -> dict[str, Any]:
    return {"pixel_values": images(64)}


ZOO = {
    "vit": transformer("ViTForImageClassification", picture, **VISION),
    "deit": transformer("DeiTForImageClassificationWithTeacher", picture, **VISION),
    "beit": transformer(
        "BeitForImageClassification",
        picture,
        **VISION,
        use_relative_position_bias=True,
        use_shared_relative_position_bias=False,
    ),
    "dinov2": transformer("Dinov2ForImageClassification", picture, **VISION),
    "dinov2_swiglu": transformer(
        "Dinov2ForImageClassification", picture, **VISION, use_swiglu_ffn=True
    ),
    "vit_mae": transformer(
        "ViTMAEForPreTraining",
        lambda: {**picture(), "noise": torch.rand(2, 16)},
        **VISION,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
    ),
    "yolos": transformer(
        "YolosForObjectDetection",
        picture,
        **{**VISION, "image_size": [32, 32]},
        num_detection_tokens=5,
    ),
    "swin": transformer(
        "SwinForImageClassification",
        picture,
        image_size=32,
        patch_size=2,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "swinv2": transformer(
        "Swinv2ForImageClassification",
        picture,
        image_size=32,
        patch_size=2,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "segformer": transformer(
        "SegformerForSemanticSegmentation",
        picture,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 24],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=20,
    ),
    "pvt_v2": transformer(
        "PvtV2ForImageClassification",
        picture,
        image_size=32,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 24],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
    "cvt": transformer(
        "CvtForImageClassification",
        picture,
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=[16, 24],
        num_heads=[2, 4],
        depth=[1, 2],
        mlp_ratio=[2.0, 2.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
    ),
    "levit": transformer(
        "LevitForImageClassification",
        large_picture,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
    ),
    "hiera": transformer(
        "HieraForImageClassification",
        picture,
        image_size=[32, 32],
        embed_dim=12,
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        depths=[1, 1],
        num_heads=[2, 4],
        num_query_pool=1,
        masked_unit_size=[4, 4],
        query_stride=[2, 2],
        mlp_ratio=2.0,
    ),
    "sam_vision": transformer(
        "SamVisionModel",
        picture,
        **{**VISION, "attn_implementation": "eager"},
        output_channels=16,
        window_size=2,
        global_attn_indexes=[1],
        num_pos_feats=8,
        mlp_dim=40,
    ),
    "vivit": transformer(
        "VivitForVideoClassification",
        lambda: {"pixel_values": torch.randn(2, 4, 3, 16, 16)},
        **{**VISION, "image_size": 16},
        num_frames=4,
        tubelet_size=[2, 8, 8],
    ),
}
