"""Convolutional networks, detectors and models of vision with language, of transformers."""

from typing import Any

import torch
from symmetry.zoo._set_up import (
    ENCODER,
    SDPA,
    VISION,
    images,
    masked_text,
    picture,
    transformer,
)

CLIP_TEXT = {**ENCODER, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12],
    "depths": [1, 1],
    "out_features": ["stage2"],
}


def text_and_picture() -> dict[str, Any]:
    return {**masked_text(), **picture()}


def large_picture() -> dict[str, Any]:
    return {"pixel_values": images(64)}


ZOO = {
    "convnext": transformer(
        "ConvNextForImageClassification",
        picture,
        num_stages=3,
        hidden_sizes=[8, 12, 16],
        depths=[1, 2, 1],
        image_size=32,
        patch_size=2,
    ),
    "convnextv2": transformer(
        "ConvNextV2ForImageClassification",
        picture,
        num_stages=2,
        hidden_sizes=[8, 12],
        depths=[1, 2],
        image_size=32,
        patch_size=2,
    ),
    "resnet_hf": transformer(
        "ResNetForImageClassification",
        picture,
        embedding_size=8,
        hidden_sizes=[16, 24],
        depths=[1, 2],
        layer_type="bottleneck",
    ),
    "resnet_basic": transformer(
        "ResNetForImageClassification",
        picture,
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 2],
        layer_type="basic",
    ),
    "regnet": transformer(
        "RegNetForImageClassification",
        picture,
        embedding_size=8,
        hidden_sizes=[16, 24],
        depths=[1, 2],
        groups_width=4,
        layer_type="y",
    ),
    "bit": transformer(
        "BitForImageClassification",
        picture,
        embedding_size=8,
        hidden_sizes=[16, 24],
        depths=[1, 1],
        num_groups=4,
    ),
    "mobilenetv2": transformer(
        "MobileNetV2ForImageClassification", picture, depth_multiplier=0.35, image_size=32
    ),
    "efficientnet_hf": transformer(
        "EfficientNetForImageClassification",
        picture,
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 32],
        kernel_sizes=[3, 3, 5],
        strides=[1, 2, 2],
        num_block_repeats=[1, 1, 1],
        expand_ratios=[1, 2, 2],
        depthwise_padding=[],
    ),
    "poolformer": transformer(
        "PoolFormerForImageClassification",
        picture,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        num_encoder_blocks=2,
        mlp_ratio=2.0,
    ),
    "focalnet": transformer(
        "FocalNetForImageClassification",
        picture,
        image_size=32,
        patch_size=4,
        embed_dim=12,
        hidden_sizes=[12, 24],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        use_conv_embed=False,
        mlp_ratio=2.0,
    ),
    "upernet": transformer(
        "UperNetForSemanticSegmentation",
        large_picture,
        backbone_config={
            "model_type": "convnext",
            "num_stages": 4,
            "hidden_sizes": [8, 8, 12, 12],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=12,
        auxiliary_channels=8,
        num_labels=5,
    ),
    "hgnet_v2": transformer(
        "HGNetV2ForImageClassification",
        picture,
        embedding_size=16,
        stem_channels=[3, 8, 16],
        hidden_sizes=[24, 32],
        depths=[1, 1],
        stage_in_channels=[16, 24],
        stage_mid_channels=[8, 12],
        stage_out_channels=[24, 32],
        stage_num_blocks=[1, 1],
        stage_numb_of_layers=[2, 2],
        stage_downsample=[False, True],
        stage_light_block=[False, True],
        stage_kernel_size=[3, 5],
    ),
    "clip": transformer(
        "CLIPModel",
        text_and_picture,
        text_config=CLIP_TEXT,
        vision_config=VISION,
        projection_dim=20,
        **SDPA,
    ),
    "siglip": transformer(
        "SiglipModel",
        text_and_picture,
        text_config=CLIP_TEXT,
        vision_config=VISION,
    ),
    "clipseg": transformer(
        "CLIPSegForImageSegmentation",
        text_and_picture,
        text_config=CLIP_TEXT,
        vision_config={**VISION, "num_hidden_layers": 2},
        projection_dim=20,
        reduce_dim=16,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=20,
        extract_layers=[0, 1],
        conditional_layer=0,
    ),
    "visual_bert": transformer(
        "VisualBertForQuestionAnswering",
        lambda: {
            **masked_text(),
            "visual_embeds": torch.randn(2, 3, 16),
            "visual_attention_mask": torch.ones(2, 3),
        },
        **ENCODER,
        visual_embedding_dim=16,
        num_labels=5,
    ),
    "detr": transformer(
        "DetrForObjectDetection",
        large_picture,
        backbone_config=RESNET,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_queries=5,
        num_labels=4,
    ),
}
