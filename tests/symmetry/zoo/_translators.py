"""Mixtures of experts, and encoders with decoders, of transformers."""

from symmetry.zoo._set_up import (
    EAGER,
    GROUPED_QUERIES,
    SDPA,
    SEQUENCE_TO_SEQUENCE,
    prompt,
    text_pair,
    transformer,
)

EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}


ZOO = {
    "mixtral": transformer(
        "MixtralForCausalLM", prompt, **GROUPED_QUERIES, num_local_experts=4, num_experts_per_tok=2
    ),
    "mixtral_bmm": transformer(
        "MixtralForCausalLM", prompt, **GROUPED_QUERIES, num_local_experts=4, **EXPERTS
    ),
    "qwen2moe_bmm": transformer(
        "Qwen2MoeForCausalLM",
        prompt,
        **GROUPED_QUERIES,
        num_experts=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=16,
        **EXPERTS,
    ),
    "olmoe_bmm": transformer(
        "OlmoeForCausalLM", prompt, **GROUPED_QUERIES, num_experts=4, **EXPERTS
    ),
    "deepseekv3": transformer(
        "DeepseekV3ForCausalLM",
        prompt,
        **{**GROUPED_QUERIES, "num_key_value_heads": 4},
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=12,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=12,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=6,
        **EXPERTS,
    ),
    "qwen3moe": transformer(
        "Qwen3MoeForCausalLM",
        prompt,
        **GROUPED_QUERIES,
        head_dim=8,
        num_experts=4,
        moe_intermediate_size=12,
        **EXPERTS,
    ),
    "gpt_oss": transformer(
        "GptOssForCausalLM",
        prompt,
        **{**GROUPED_QUERIES, **EAGER},
        head_dim=8,
        num_local_experts=4,
        sliding_window=4,
        **EXPERTS,
    ),
    "jamba": transformer(
        "JambaForCausalLM",
        prompt,
        **GROUPED_QUERIES,
        use_mamba_kernels=False,
        num_experts=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        **EXPERTS,
    ),
    "t5": transformer("T5ForConditionalGeneration", text_pair, **T5, **SDPA),
    "bart": transformer("BartForConditionalGeneration", text_pair, **SEQUENCE_TO_SEQUENCE),
    "m2m100": transformer("M2M100ForConditionalGeneration", text_pair, **SEQUENCE_TO_SEQUENCE),
}
