"""Configurations and inputs of further tiny models of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
    "pad_token_id": 0,
}
IMAGE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
}
PAIR: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Model:
    """A class of transformers and its configuration.

    Attributes:
        kind: Name of the class.
        config: Name of the class of its configuration.
        options: Arguments of the configuration.
        inputs: Key of the inputs below.
        target: The explained entry of the output, without the sample.
        output: Name of the explained output.
    """

    kind: str
    config: str
    options: dict[str, Any]
    inputs: str
    target: Any
    output: str = "logits"


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, 50, (1, length), generator=torch.Generator().manual_seed(1))


INPUTS: dict[str, Any] = {
    "ids": {"input_ids": ids(7)},
    "eight ids": {"input_ids": ids(8)},
    "ids of both": {"input_ids": ids(7), "decoder_input_ids": ids(4)},
    "image": draw(1, 3, 32, 32),
    "large image": draw(1, 3, 64, 64),
    "wave": draw(1, 80),
    "spectrogram": draw(1, 16, 16),
    "series": {"past_values": draw(1, 16, 2)},
}

FURTHER: dict[str, Model] = {
    "Qwen2": Model("Qwen2ForCausalLM", "Qwen2Config", {**TEXT, "num_key_value_heads": 2}, "ids", (6, 4)),
    "Qwen3": Model("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "num_key_value_heads": 2, "head_dim": 8}, "ids", (6, 4)),
    "Qwen3-MoE": Model(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **TEXT,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        "ids",
        (6, 4),
    ),
    "Gemma 2": Model(
        "Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "num_key_value_heads": 2, "head_dim": 8}, "ids", (6, 4)
    ),
    "Gemma 3": Model(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "num_key_value_heads": 2, "head_dim": 8}, "ids", (6, 4)
    ),
    "Phi-3": Model("Phi3ForCausalLM", "Phi3Config", {**TEXT, "num_key_value_heads": 2}, "ids", (6, 4)),
    "Falcon": Model(
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "ids",
        (6, 4),
    ),
    "OPT": Model(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 32,
            "pad_token_id": 1,
        },
        "ids",
        (6, 4),
    ),
    "GPT-NeoX": Model("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, "ids", (6, 4)),
    "GPT-J": Model(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 32},
        "ids",
        (6, 4),
    ),
    "Electra": Model("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 16}, "ids", 0),
    "ALBERT": Model("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 16}, "ids", 0),
    "DeBERTa-v2": Model(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "ids",
        0,
    ),
    "DeBERTa": Model(
        "DebertaForSequenceClassification",
        "DebertaConfig",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "ids",
        0,
    ),
    "BART": Model("BartForConditionalGeneration", "BartConfig", PAIR, "ids of both", (3, 4)),
    "mBART": Model("MBartForConditionalGeneration", "MBartConfig", PAIR, "ids of both", (3, 4)),
    "Pegasus": Model("PegasusForConditionalGeneration", "PegasusConfig", PAIR, "ids of both", (3, 4)),
    "ConvBERT": Model(
        "ConvBertForSequenceClassification",
        "ConvBertConfig",
        {**TEXT, "embedding_size": 16, "num_groups": 1, "head_ratio": 2, "conv_kernel_size": 3},
        "ids",
        0,
    ),
    "XLNet": Model(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "num_labels": 3},
        "ids",
        0,
    ),
    "Reformer": Model(
        "ReformerForSequenceClassification",
        "ReformerConfig",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "attention_head_size": 8,
            "num_attention_heads": 4,
            "feed_forward_size": 48,
            "attn_layers": ["local", "lsh"],
            "axial_pos_embds": False,
            "num_labels": 3,
            "max_position_embeddings": 32,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
            "is_decoder": False,
            "chunk_size_feed_forward": 0,
        },
        "eight ids",
        0,
    ),
    "Longformer": Model(
        "LongformerForSequenceClassification",
        "LongformerConfig",
        {**TEXT, "attention_window": [4, 4], "max_position_embeddings": 64},
        "ids",
        0,
    ),
    "BigBird": Model(
        "BigBirdForSequenceClassification", "BigBirdConfig", {**TEXT, "attention_type": "original_full"}, "ids", 0
    ),
    "Funnel": Model(
        "FunnelForSequenceClassification",
        "FunnelConfig",
        {
            "vocab_size": 50,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "num_labels": 3,
        },
        "eight ids",
        0,
    ),
    "Nystromformer": Model(
        "NystromformerForSequenceClassification",
        "NystromformerConfig",
        {**TEXT, "num_landmarks": 2, "segment_means_seq_len": 8, "max_position_embeddings": 32},
        "eight ids",
        0,
    ),
    "ModernBERT": Model("ModernBertForSequenceClassification", "ModernBertConfig", TEXT, "ids", 0),
    "MPNet": Model("MPNetForSequenceClassification", "MPNetConfig", TEXT, "ids", 0),
    "FNet": Model("FNetForSequenceClassification", "FNetConfig", TEXT, "ids", 0),
    "RWKV": Model(
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "attention_hidden_size": 32,
            "intermediate_size": 48,
        },
        "ids",
        (6, 4),
    ),
    "Mamba-2": Model(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 4,
            "expand": 2,
        },
        "ids",
        (6, 4),
    ),
    "Falcon-Mamba": Model(
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "ids",
        (6, 4),
    ),
    "RecurrentGemma": Model(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "num_labels": 3,
            "pad_token_id": 0,
            "num_key_value_heads": 2,
            "lru_width": 32,
            "attention_window_size": 4,
        },
        "ids",
        (6, 4),
    ),
    "DeepSeek-V3": Model(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
        "ids",
        (6, 4),
    ),
    "Llama 4": Model(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "ids",
        (6, 4),
    ),
    "DeiT": Model("DeiTForImageClassification", "DeiTConfig", IMAGE, "image", 0),
    "BEiT": Model("BeitForImageClassification", "BeitConfig", {**IMAGE, "out_indices": [1]}, "image", 0),
    "DINOv2": Model("Dinov2ForImageClassification", "Dinov2Config", IMAGE, "image", 0),
    "ViT-MAE": Model(
        "ViTMAEModel",
        "ViTMAEConfig",
        {
            **IMAGE,
            "mask_ratio": 0.0,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        "image",
        (0, 1),
        "last_hidden_state",
    ),
    "SAM encoder": Model(
        "SamVisionModel",
        "SamVisionConfig",
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "output_channels": 8,
            "window_size": 2,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
        },
        "image",
        (1, 1, 1),
        "last_hidden_state",
    ),
    "MobileViT": Model(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "image_size": 32,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
            "num_attention_heads": 4,
            "num_labels": 3,
        },
        "image",
        0,
    ),
    "SegFormer": Model(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 16, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
            "num_labels": 3,
        },
        "image",
        (1, 2, 2),
    ),
    "ConvNeXtV2": Model(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 3},
        "image",
        0,
    ),
    "LeViT": Model(
        "LevitForImageClassification",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "num_labels": 3,
        },
        "large image",
        0,
    ),
    "PVT": Model(
        "PvtForImageClassification",
        "PvtConfig",
        {
            "image_size": 32,
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 16, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "num_labels": 3,
        },
        "image",
        0,
    ),
    "PoolFormer": Model(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_labels": 3},
        "large image",
        0,
    ),
    "Wav2Vec2": Model(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {
            **TEXT,
            "conv_dim": [8, 8],
            "conv_kernel": [4, 4],
            "conv_stride": [2, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 16,
        },
        "wave",
        0,
    ),
    "HuBERT": Model(
        "HubertForSequenceClassification",
        "HubertConfig",
        {
            **TEXT,
            "conv_dim": [8, 8],
            "conv_kernel": [4, 4],
            "conv_stride": [2, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 16,
        },
        "wave",
        0,
    ),
    "AST": Model(
        "ASTForAudioClassification",
        "ASTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "patch_size": 4,
            "frequency_stride": 4,
            "time_stride": 4,
            "max_length": 16,
            "num_mel_bins": 16,
            "num_labels": 3,
        },
        "spectrogram",
        0,
    ),
    "PatchTST": Model(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        {
            "num_input_channels": 2,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "num_hidden_layers": 2,
            "d_model": 16,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "prediction_length": 4,
        },
        "series",
        (1, 1),
        "prediction_outputs",
    ),
}

UNSUPPORTED = {"Reformer": "_ReversibleFunction"}
"""Models with an operation for which no kernel exists, and its name."""
