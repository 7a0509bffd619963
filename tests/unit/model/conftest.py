"""Small configurations of many architectures."""

from collections.abc import Callable
from typing import Any

import pytest

ENCODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
DECODER = {
    **{key: value for key, value in ENCODER.items() if "dropout" not in key},
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 6},
    "qwen2": {**DECODER, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen2_moe": {
        **DECODER,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "qwen3": {**DECODER, "head_dim": 8},
    "gemma2": {**DECODER, "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**DECODER, "head_dim": 8, "sliding_window": 6},
    "phi3": DECODER,
    "olmo2": DECODER,
    "granite": DECODER,
    "gpt_oss": {
        **DECODER,
        "head_dim": 8,
        "sliding_window": 6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mixtral": {**DECODER, "num_local_experts": 4},
    "stablelm": DECODER,
    "phimoe": {**DECODER, "sliding_window": 6, "num_local_experts": 4},
    "llama4_text": {
        **DECODER,
        "head_dim": 8,
        "attention_chunk_size": 6,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
    },
    "mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "falcon_h1": {
        **DECODER,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
    },
    "gptj": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "bart": {
        "vocab_size": 97,
        "d_model": 32,
        "decoder_layers": 2,
        "encoder_layers": 2,
        "decoder_attention_heads": 4,
        "encoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_ffn_dim": 48,
        "max_position_embeddings": 64,
    },
    "t5": {"vocab_size": 97, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48},
    "bert": ENCODER,
    "roberta": {**ENCODER, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "modernbert": {
        **{key: value for key, value in ENCODER.items() if "dropout" not in key},
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "distilbert": {
        "vocab_size": 97,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "mpnet": {**ENCODER, "pad_token_id": 1},
    "fnet": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
}


@pytest.fixture
def small_config() -> Callable[..., Any]:
    """small_config(kind, **changes) -> configuration of a model of two layers."""
    from transformers import AutoConfig

    def make(kind: str, **changes: Any) -> Any:
        return AutoConfig.for_model(kind, **{**SETTINGS[kind], **changes})

    return make
