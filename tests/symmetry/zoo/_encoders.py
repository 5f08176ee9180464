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
        text,
        vocab_size=50,
        d_model=24,
        n_layer=2,
        n_head=4,
        d_inner=40,
    ),
    "camembert": transformer("CamembertForMaskedLM", masked_text, **ENCODER, pad_token_id=1),
    "mpnet": transformer("MPNetForMaskedLM", masked_text, **ENCODER),
    "deberta_v1": transformer(
        "DebertaForMaskedLM",
        masked_text,
        **ENCODER,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        pad_token_id=0,
    ),
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
    "big_bird": transformer(
        "BigBirdForMaskedLM", masked_text, **ENCODER, attention_type="original_full"
    ),
    "longformer": transformer(
        "LongformerForMaskedLM", masked_text, **ENCODER, attention_window=4, pad_token_id=1
    ),
    "funnel": transformer(
        "FunnelForMaskedLM",
        masked_text,
        vocab_size=50,
        d_model=24,
        n_head=4,
        d_head=6,
        d_inner=40,
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    "nystromformer": transformer(
        "NystromformerForMaskedLM", masked_text, **ENCODER, num_landmarks=7, segment_means_seq_len=7
    ),
    "fnet": transformer("FNetForMaskedLM", text, **ENCODER),
    "ibert": transformer("IBertForMaskedLM", masked_text, **ENCODER, pad_token_id=1),
    "roformer": transformer("RoFormerForMaskedLM", masked_text, **ENCODER, embedding_size=24),
    "rembert": transformer(
        "RemBertForMaskedLM",
        masked_text,
        **ENCODER,
        input_embedding_size=12,
        output_embedding_size=16,
    ),
    "megatron_bert": transformer("MegatronBertForMaskedLM", masked_text, **ENCODER),
    "roberta_prelayernorm": transformer(
        "RobertaPreLayerNormForMaskedLM", masked_text, **ENCODER, pad_token_id=1
    ),
    "xlm": transformer(
        "XLMForSequenceClassification",
        text,
        vocab_size=50,
        emb_dim=24,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=32,
    ),
    "layoutlm": transformer(
        "LayoutLMForMaskedLM",
        lambda: {**masked_text(), "bbox": torch.randint(0, 20, (2, 7, 4)).sort(-1).values},
        **ENCODER,
        max_2d_position_embeddings=24,
    ),
    "esm": transformer(
        "EsmForMaskedLM",
        masked_text,
        **ENCODER,
        pad_token_id=1,
        mask_token_id=2,
        position_embedding_type="rotary",
    ),
    "data2vec_text": transformer("Data2VecTextForMaskedLM", masked_text, **ENCODER, pad_token_id=1),
    "mra": transformer("MraForMaskedLM", masked_text, **ENCODER),
    "canine": transformer(
        "CanineForSequenceClassification",
        lambda: {"input_ids": torch.randint(3, 50, (2, 32))},
        **{**ENCODER, "max_position_embeddings": 64},
        num_hash_buckets=32,
        local_transformer_stride=8,
        downsampling_rate=4,
    ),
    "xmod": transformer(
        "XmodForMaskedLM",
        masked_text,
        **ENCODER,
        pad_token_id=1,
        languages=["en"],
        default_language="en",
    ),
    "luke": transformer(
        "LukeForMaskedLM",
        masked_text,
        **ENCODER,
        pad_token_id=1,
        entity_vocab_size=10,
        entity_emb_size=8,
    ),
    "splinter": transformer("SplinterForQuestionAnswering", masked_text, **ENCODER),
    "lilt": transformer(
        "LiltForSequenceClassification",
        lambda: {**masked_text(), "bbox": torch.randint(0, 20, (2, 7, 4)).sort(-1).values},
        **ENCODER,
        pad_token_id=1,
        channel_shrink_ratio=2,
        max_2d_position_embeddings=24,
    ),
}
