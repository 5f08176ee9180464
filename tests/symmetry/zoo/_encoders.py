"""Text encoders of transformers."""

import torch
from symmetry.zoo._set_up import (
    EAGER,
    ENCODER,
    SDPA,
    masked_text,
    text,
    transformer,
)

ZOO = {
    "bert": transformer("BertForMaskedLM", masked_text, **ENCODER, **SDPA),
    "bert_eager": transformer("BertForMaskedLM", masked_text, **ENCODER, **EAGER),
    "bert_cls": transformer("BertForSequenceClassification", masked_text, **ENCODER, **SDPA),
    "roberta": transformer("RobertaForMaskedLM", masked_text, **ENCODER, pad_token_id=1, **SDPA),
    "distilbert": transformer(
        "DistilBertForSequenceClassification",
        masked_text,
        vocab_size=50,
        dim=24,
        n_layers=2,
        n_heads=4,
        hidden_dim=40,
        max_position_embeddings=32,
        **SDPA,
    ),
    "albert": transformer("AlbertForMaskedLM", masked_text, embedding_size=12, **ENCODER, **SDPA),
    "deberta": transformer(
        "DebertaV2ForSequenceClassification",
        masked_text,
        **ENCODER,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        pad_token_id=0,
    ),
    "modernbert": transformer(
        "ModernBertForMaskedLM",
        masked_text,
        **ENCODER,
        pad_token_id=0,
        local_attention=4,
        global_attn_every_n_layers=2,
        **SDPA,
    ),
    "electra": transformer(
        "ElectraForSequenceClassification", masked_text, **ENCODER, embedding_size=12, **SDPA
    ),
    "xlnet": transformer(
        "XLNetLMHeadModel",
        lambda: {**text(), "token_type_ids": torch.randint(2, (2, 7))},
        vocab_size=50,
        d_model=24,
        n_layer=2,
        n_head=4,
        d_inner=40,
    ),
    "mpnet": transformer("MPNetForMaskedLM", masked_text, **ENCODER),
    "squeezebert": transformer(
        "SqueezeBertForSequenceClassification", masked_text, **ENCODER, embedding_size=24
    ),
    "convbert": transformer(
        "ConvBertForSequenceClassification", masked_text, **ENCODER, embedding_size=24
    ),
    "mobilebert": transformer(
        "MobileBertForSequenceClassification",
        masked_text,
        **ENCODER,
        embedding_size=12,
        intra_bottleneck_size=16,
    ),
    "fnet": transformer("FNetForMaskedLM", text, **ENCODER),
    "roformer": transformer("RoFormerForMaskedLM", masked_text, **ENCODER, embedding_size=24),
    "layoutlm": transformer(
        "LayoutLMForMaskedLM",
        lambda: {**masked_text(), "bbox": torch.randint(0, 20, (2, 7, 4)).sort(-1).values},
        **ENCODER,
        max_2d_position_embeddings=24,
    ),
}
