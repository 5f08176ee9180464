"""Language models of transformers that write on."""

from symmetry.zoo._set_up import (
    EAGER,
    ENCODER,
    GROUPED_QUERIES,
    SDPA,
    prompt,
    text,
    transformer,
)

GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}


ZOO = {
    "gpt2": transformer("GPT2LMHeadModel", prompt, **GPT2, **SDPA),
    "gptneox": transformer("GPTNeoXForCausalLM", prompt, **ENCODER, **SDPA),
    "opt": transformer(
        "OPTForCausalLM",
        prompt,
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        ffn_dim=40,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=24,
        **SDPA,
    ),
    "bloom": transformer(
        "BloomForCausalLM", prompt, vocab_size=50, hidden_size=24, n_layer=2, n_head=4
    ),
    "llama": transformer("LlamaForCausalLM", prompt, **GROUPED_QUERIES),
    "llama_eager": transformer("LlamaForCausalLM", prompt, **{**GROUPED_QUERIES, **EAGER}),
    "mistral": transformer("MistralForCausalLM", prompt, **GROUPED_QUERIES),
    "qwen2": transformer("Qwen2ForCausalLM", prompt, **GROUPED_QUERIES),
    "qwen3": transformer(
        "Qwen3ForCausalLM", prompt, **GROUPED_QUERIES, head_dim=8, tie_word_embeddings=True
    ),
    "gemma2": transformer("Gemma2ForCausalLM", prompt, **{**GROUPED_QUERIES, **EAGER}, head_dim=8),
    "phi3": transformer("Phi3ForCausalLM", prompt, **GROUPED_QUERIES, pad_token_id=0),
    "mamba": transformer(
        "MambaForCausalLM", prompt, vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4
    ),
    "mamba2": transformer(
        "Mamba2ForCausalLM",
        prompt,
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
    ),
    "gptj": transformer("GPTJForCausalLM", prompt, **GPT2, rotary_dim=4),
    "falcon": transformer(
        "FalconForCausalLM",
        prompt,
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "falcon_newarch": transformer(
        "FalconForCausalLM",
        prompt,
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "falcon_alibi": transformer(
        "FalconForCausalLM",
        prompt,
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        multi_query=False,
        bias=True,
    ),
    "gpt_neo": transformer(
        "GPTNeoForCausalLM",
        prompt,
        vocab_size=50,
        hidden_size=24,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=32,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "gpt_bigcode": transformer("GPTBigCodeForCausalLM", prompt, **GPT2, multi_query=True),
    "openai_gpt": transformer("OpenAIGPTLMHeadModel", text, **GPT2),
    "mpt": transformer(
        "MptForCausalLM", prompt, vocab_size=50, d_model=32, n_layers=2, n_heads=4, max_seq_len=32
    ),
    "stablelm": transformer(
        "StableLmForCausalLM", prompt, **GROUPED_QUERIES, use_qkv_bias=True, qk_layernorm=True
    ),
    "phi": transformer("PhiForCausalLM", prompt, **GROUPED_QUERIES, qk_layernorm=True),
    "gemma3": transformer(
        "Gemma3ForCausalLM", prompt, **GROUPED_QUERIES, head_dim=8, sliding_window=4
    ),
    "cohere": transformer("CohereForCausalLM", prompt, **GROUPED_QUERIES, use_qk_norm=True),
    "olmo": transformer("OlmoForCausalLM", prompt, **GROUPED_QUERIES),
    "olmo2": transformer("Olmo2ForCausalLM", prompt, **GROUPED_QUERIES),
    "starcoder2": transformer("Starcoder2ForCausalLM", prompt, **GROUPED_QUERIES),
    "glm": transformer("GlmForCausalLM", prompt, **GROUPED_QUERIES, head_dim=8, pad_token_id=0),
    "persimmon": transformer(
        "PersimmonForCausalLM", prompt, **{**ENCODER, "hidden_size": 32}, **SDPA
    ),
    "ctrl": transformer(
        "CTRLLMHeadModel", prompt, vocab_size=50, n_embd=24, n_layer=2, n_head=4, dff=40
    ),
    "diffllama": transformer("DiffLlamaForCausalLM", prompt, **GROUPED_QUERIES),
    "lfm2": transformer(
        "Lfm2ForCausalLM",
        prompt,
        **GROUPED_QUERIES,
        layer_types=["conv", "full_attention"],
        block_multiple_of=8,
    ),
}
