"""The causal language models of the installed transformers, small and random.

Every width that a configuration has is cut down by its name. Where a model may scale or cap its
logits, or pad its vocabulary, it does; its head is large enough for a cap to bend its logits, and
has a bias that is not 0 if it has one.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# The types that cannot be made here, and what they need.
NEEDS = {
    "dots3_note": "parts whose sizes are cut together; dots3_note_text is its language model",
    "gemma3n": "timm",
    "gemma4_assistant": "keys and values of the model that it drafts for",
    "gemma4_unified_assistant": "keys and values of the model that it drafts for",
}
VOCABULARY = 112
AT_MOST = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size ngram_vocab_size_base "
    "encoder_hash_byte_group_vocab",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
    "model_max_length context_length",
    48: "intermediate_size moe_intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim dff "
    "dim_ff shared_expert_intermediate_size ffn_hidden_size d_inner n_inner expert_ffn_hidden_size "
    "shared_intermediate_size dense_intermediate_size feed_forward_size intermediate_size_mlp "
    "moe_shared_expert_intermediate_size mlp_dim shared_experts_intermediate_size",
    32: "hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim embedding_dim "
    "attention_hidden_size hidden_size_global lru_width input_embedding_size dim_model_base "
    "output_embedding_size pronunciation_embed_dim shape_embed_dim out_hidden_size",
    16: "qk_head_dim",
    8: "head_dim dim_head d_head attention_head_size linear_key_head_dim linear_value_head_dim "
    "kv_channels swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim "
    "linear_head_dim rotary_dim kv_lora_rank q_lora_rank hidden_size_per_layer_input",
    4: "num_attention_heads n_head num_heads n_heads decoder_attention_heads num_key_value_heads "
    "encoder_attention_heads attention_heads mamba_n_heads num_kv_heads swa_num_attention_heads "
    "swa_num_key_value_heads index_n_heads linear_num_key_heads linear_num_value_heads "
    "num_decoder_attention_heads num_encoder_attention_heads mamba_num_heads linear_num_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth "
    "num_decoder_layers num_encoder_layers num_blocks num_experts_per_tok num_experts_per_token "
    "moe_k moe_topk",
    1: "n_group n_groups topk_group num_expert_group num_kv_shared_layers prompt_length",
}
SIZES = {name: size for size, names in AT_MOST.items() for name in names.split()}
# What becomes of the logits.
MAPS = {
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
    "logit_scale": 0.3,
    "logits_scaling": 0.7,
    "lm_head_multiplier": 0.3,
    "unpadded_vocab_size": VOCABULARY - 12,
}
# Arguments without which a type makes no model, or a large one.
BESIDES: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},  # the other draws from numpy
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 1,
        "intermediate_size": [48] * 6,
    },
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "mimo_v2_flash": {"num_hidden_layers": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attn_layers": ["local", "local"],  # hashes and dropout take seeds from the clock
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 9, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64},
}


def tiny_model(model_type: str, seed: int = 0, **arguments: Any) -> Any:
    """A model of one of `MODEL_TYPES`, in eval mode."""
    torch.manual_seed(seed)
    kind: Any = CONFIG_MAPPING[model_type]
    if model_type.startswith("musicgen"):  # the model is of a part of the configuration
        kind = CONFIG_MAPPING[f"{model_type}_decoder"]
    given = {**BESIDES.get(model_type, {}), **arguments}
    parts = {name: part for name, part in given.items() if isinstance(part, dict)}
    config = kind(**{**small(kind(**parts)), **given})
    model = of_config(model_type, config).eval()
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        with torch.no_grad():
            head.weight *= 0.3 / head.weight.std()
            if head.bias is not None:
                head.bias.normal_()
    return model


def of_config(model_type: str, config: PretrainedConfig) -> Any:
    if not model_type.startswith("musicgen"):
        return AutoModelForCausalLM.from_config(config)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(importlib.import_module("transformers"), name)(config)


def small(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments that make a small configuration of the same class."""
    arguments: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = vars(config).get(name)
        if isinstance(part, PretrainedConfig):
            arguments[name] = small(part)
        elif name in MAPS:
            arguments[name] = MAPS[name]
        elif name in SIZES and isinstance(value, int) and value > SIZES[name]:
            arguments[name] = SIZES[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            arguments[name] = value % VOCABULARY
    return arguments
