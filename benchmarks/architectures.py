"""Tiny configurations of the architectures that `models.py` tries, and random models of them.

A window, a chunk or a threshold has 32 tokens: more than the 19 of the engine's own check at its
start, less than the texts that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from engine.model.outline import auto_class

VOCAB_SIZE = 512
_SCALE = 3.0  # of weights, so that the likeliest token leads by far
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS: dict[str, Any] = {"head_dim": 16}
_ALL_HEADS: dict[str, Any] = {"num_key_value_heads": 4}
_WINDOW: dict[str, Any] = {"sliding_window": 32}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    **_ALL_HEADS,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_INDEXER: dict[str, Any] = {"index_topk": 32, "index_n_heads": 2, "index_head_dim": 16}
# Image parts of the usual kinds; they are loaded, and not used.
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 64,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A configuration of a model, as a row of the table.

    Attributes:
        name: what people call the model.
        kind: the configuration's class in transformers, without `Config`.
        options: what differs from the small configuration that all have.
        vision: the configuration of its image part; None for models of text.
        text: model type of the text part, where transformers has to be told.
        scale: of weights.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] | None = None
    text: str | None = None
    scale: float = _SCALE

    @property
    def config(self) -> Any:
        """The configuration."""
        kind = getattr(transformers, f"{self.kind}Config")
        options = {**_SMALL, **self.options}
        if self.vision is None:
            return kind(**options)
        if self.text is not None:
            options["model_type"] = self.text
        return kind(text_config=options, vision_config=dict(self.vision))

    def build(self) -> PreTrainedModel:
        """A random model, the same at every call."""
        torch.manual_seed(0)
        config = self.config
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
        model.eval()
        for parameter in model.parameters():
            parameter.data.mul_(self.scale)
        model.generation_config.eos_token_id = None
        return model


_ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_ROPE_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}
_ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
_ROPE_SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
_GLM_V: dict[str, Any] = {
    **_HEADS,
    "rope_parameters": {
        **_ROPE_SECTIONS,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    },
}
_LLAMA4: dict[str, Any] = {
    **_HEADS,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 32,
    "floor_scale": 24,
    "attn_scale": 0.5,
    "no_rope_layers": [1, 1, 1, 0],
}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("Llama 2, 3", "Llama"),
    Architecture("Llama 3.1", "Llama", {"rope_parameters": _ROPE_LLAMA3}),
    Architecture("Llama 4", "Llama4Text", _LLAMA4),
    Architecture("Llama 4 with images", "Llama4", _LLAMA4, {**_VISION, "vision_output_dim": 32}),
    Architecture("Qwen 2, 2.5", "Qwen2"),
    Architecture(
        "Qwen 2 with windows from a layer on",
        "Qwen2",
        {**_WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    ),
    Architecture("Qwen 2 MoE", "Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    Architecture("Qwen 3", "Qwen3", _HEADS),
    Architecture("Qwen 3 MoE", "Qwen3Moe", {**_HEADS, **_EXPERTS}),
    Architecture("Qwen 3 Next", "Qwen3Next", {**_HEADS, **_EXPERTS, **_LINEAR}),
    Architecture("Qwen 3.5", "Qwen3_5Text", {**_HEADS, **_LINEAR}),
    Architecture("Qwen 3.5 MoE", "Qwen3_5MoeText", {**_HEADS, **_EXPERTS, **_LINEAR}),
    Architecture("Qwen 2 VL", "Qwen2VL", {"rope_parameters": _ROPE_SECTIONS}, _QWEN_VISION),
    Architecture("Qwen 2.5 VL", "Qwen2_5_VL", {"rope_parameters": _ROPE_SECTIONS}, _QWEN_VISION),
    Architecture("Qwen 3 VL", "Qwen3VL", _HEADS, _QWEN_VISION),
    Architecture("Qwen 3 VL MoE", "Qwen3VLMoe", {**_HEADS, **_EXPERTS}, _QWEN_VISION),
    Architecture("Gemma", "Gemma", _HEADS),
    Architecture("Gemma 2", "Gemma2", {**_HEADS, **_WINDOW}),
    Architecture("Gemma 3", "Gemma3Text", {**_HEADS, **_WINDOW, "layer_types": _ALTERNATING}),
    Architecture(
        "Gemma 3 with images", "Gemma3", {**_HEADS, **_WINDOW, "layer_types": _ALTERNATING}, _VISION
    ),
    Architecture(
        "Gemma 3n",
        "Gemma3nText",
        {
            **_HEADS,
            **_WINDOW,
            "layer_types": _ALTERNATING,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "activation_sparsity_pattern": [0.0] * 4,
            "laurel_rank": 8,
        },
    ),
    Architecture(
        "Gemma 4",
        "Gemma4Text",
        {
            **_HEADS,
            **_WINDOW,
            "layer_types": _ALTERNATING,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
    ),
    Architecture(
        "Gemma 4 with images",
        "Gemma4",
        {
            **_HEADS,
            **_WINDOW,
            "layer_types": _ALTERNATING,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        {**_VISION, **_HEADS, "num_key_value_heads": 2},
    ),
    Architecture("Mistral", "Mistral", {"sliding_window": None}),
    Architecture("Mistral with a window", "Mistral", _WINDOW),
    Architecture("Ministral", "Ministral", {**_HEADS, **_WINDOW, "layer_types": _ALTERNATING}),
    Architecture(
        "Ministral 3",
        "Ministral3",
        {
            **_HEADS,
            "rope_parameters": {**_ROPE_YARN, "llama_4_scaling_beta": 0.5, "mscale": 1.0},
        },
    ),
    Architecture("Mixtral", "Mixtral", _EXPERTS),
    Architecture(
        "Mistral Small 3.1 with images",
        "Mistral3",
        {**_HEADS, "sliding_window": None},
        {**_VISION, "model_type": "pixtral", "head_dim": 16},
        "mistral",
    ),
    Architecture(
        "Ministral 3 with images",
        "Mistral3",
        {
            **_HEADS,
            "rope_parameters": {**_ROPE_YARN, "llama_4_scaling_beta": 0.5, "mscale": 1.0},
        },
        {**_VISION, "model_type": "pixtral", "head_dim": 16},
        "ministral3",
    ),
    Architecture("Mistral 4", "Mistral4", {**_LATENT, **_ROUTED}),
    Architecture("Phi 1, 2", "Phi", _ALL_HEADS),
    Architecture("Phi 3, 4", "Phi3", {"sliding_window": None}),
    Architecture(
        "Phi 3, 4 with longrope", "Phi3", {"sliding_window": None, "rope_parameters": _ROPE_LONG}
    ),
    Architecture("Phi 3.5 MoE", "Phimoe", {**_EXPERTS, "sliding_window": None}),
    Architecture(
        "gpt-oss",
        "GptOss",
        {
            **_HEADS,
            **_WINDOW,
            **_EXPERTS,
            "layer_types": _ALTERNATING,
            "rope_parameters": _ROPE_YARN,
        },
    ),
    Architecture("DeepSeek V2", "DeepseekV2", {**_LATENT, **_ROUTED}),
    Architecture("DeepSeek V3, R1", "DeepseekV3", {**_LATENT, **_ROUTED}),
    Architecture("DeepSeek V3.2", "DeepseekV32", {**_LATENT, **_ROUTED, **_INDEXER}),
    Architecture("DeepSeek V4", "DeepseekV4", {**_HEADS, **_ROUTED, **_INDEXER}),
    Architecture("GLM", "Glm", _HEADS),
    Architecture("GLM 4", "Glm4", _HEADS),
    Architecture("GLM 4.5, 4.6", "Glm4Moe", {**_HEADS, **_ROUTED}),
    Architecture("GLM 4.7 Flash", "Glm4MoeLite", {**_LATENT, **_ROUTED}),
    Architecture("GLM 5", "GlmMoeDsa", {**_LATENT, **_ROUTED, **_INDEXER}),
    Architecture("GLM 4.1V", "Glm4v", _GLM_V, _QWEN_VISION),
    Architecture("GLM 4.5V", "Glm4vMoe", {**_GLM_V, **_ROUTED}, _QWEN_VISION),
    Architecture("Granite 3", "Granite"),
    Architecture("Granite 3 MoE", "GraniteMoe", _EXPERTS),
    Architecture(
        "Granite MoE with shared experts",
        "GraniteMoeShared",
        {**_EXPERTS, "shared_intermediate_size": 32},
    ),
    Architecture(
        "Granite 4 without Mamba layers",
        "GraniteMoeHybrid",
        {
            "layer_types": ["attention"] * 4,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
        },
    ),
    Architecture(
        "Granite 4 hybrid",
        "GraniteMoeHybrid",
        {
            **_MAMBA,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
        },
    ),
    Architecture("OLMo", "Olmo"),
    Architecture("OLMo 2", "Olmo2"),
    Architecture("OLMo 3", "Olmo3", {**_WINDOW, "layer_types": _ALTERNATING}),
    Architecture("OLMoE", "Olmoe", _EXPERTS),
    Architecture("FlexOlmo", "FlexOlmo", _EXPERTS),
    Architecture("OLMo hybrid", "OlmoHybrid", _LINEAR),
    Architecture("SmolLM 3", "SmolLM3", {"no_rope_layers": [1, 1, 1, 0]}),
    Architecture("MiniMax Text 01", "MiniMax", {**_HEADS, **_EXPERTS, "block_size": 16}),
    Architecture("MiniMax M2", "MiniMaxM2", {**_HEADS, **_EXPERTS}),
    Architecture("ERNIE 4.5", "Ernie4_5", _HEADS),
    Architecture(
        "ERNIE 4.5 MoE",
        "Ernie4_5_Moe",
        {**_HEADS, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    ),
    Architecture("Seed-OSS", "SeedOss", _HEADS),
    Architecture(
        "EXAONE 4", "Exaone4", {**_WINDOW, "layer_types": _ALTERNATING, "sliding_window_pattern": 2}
    ),
    Architecture(
        "EXAONE MoE",
        "ExaoneMoe",
        {
            **_EXPERTS,
            **_WINDOW,
            "layer_types": _ALTERNATING,
            "n_group": 1,
            "topk_group": 1,
            "num_shared_experts": 1,
        },
    ),
    Architecture("Command R", "Cohere"),
    Architecture("Command A", "Cohere2", {**_HEADS, **_WINDOW, "layer_types": _ALTERNATING}),
    Architecture("StarCoder 2", "Starcoder2", _WINDOW),
    Architecture("HunYuan dense", "HunYuanDenseV1", _HEADS),
    Architecture("HunYuan MoE", "HunYuanMoEV1", {**_HEADS, "num_experts": 4, "moe_topk": 2}),
    Architecture("HY V3", "HYV3", {**_HEADS, **_EXPERTS, **_ROUTED}),
    Architecture("Apertus", "Apertus"),
    Architecture(
        "MiMo V2 Flash",
        "MiMoV2Flash",
        {
            **_WINDOW,
            **_ROUTED,
            "layer_types": _ALTERNATING,
            "head_dim": 24,
            "v_head_dim": 16,
            "swa_head_dim": 24,
            "swa_v_head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
        },
    ),
    Architecture("dots.llm1", "Dots1", {**_HEADS, **_ROUTED}),
    Architecture("Solar Open", "SolarOpen", {**_HEADS, **_ROUTED}),
    Architecture("InternLM 3", "InternLM3", _HEADS),
    Architecture("Arcee", "Arcee"),
    Architecture("Helium", "Helium", _HEADS),
    Architecture("nanochat", "NanoChat"),
    Architecture("BitNet", "BitNet"),
    Architecture("Trinity (AFMoE)", "Afmoe", {**_HEADS, **_EXPERTS, **_WINDOW}),
    Architecture("CWM", "Cwm", {**_HEADS, **_WINDOW, "layer_types": _ALTERNATING}),
    Architecture("Nemotron 3, Minitron", "Nemotron", _HEADS),
    Architecture(
        "Nemotron H",
        "NemotronH",
        {
            **_ROUTED,
            "layers_block_type": ["mamba", "attention", "mamba", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
        },
    ),
    Architecture("StableLM", "StableLm"),
    Architecture("VaultGemma", "VaultGemma", {**_HEADS, **_WINDOW}),
    Architecture("MiniCPM 3", "MiniCPM3", _LATENT),
    Architecture("Youtu", "Youtu", {**_LATENT}),
    Architecture("Jais 2", "Jais2"),
    Architecture("HyperCLOVA X", "HyperCLOVAX"),
    Architecture("Falcon H1", "FalconH1", {**_MAMBA, "mamba_d_ssm": 128}),
    Architecture("Falcon 7B", "Falcon", {"num_kv_heads": 1}),
    Architecture(
        "Falcon 40B, 180B, 2", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    Architecture(
        "Falcon RW",
        "Falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    Architecture("BLOOM", "Bloom", {"n_layer": 2, "n_head": 4}),
    Architecture("MPT", "Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4}),
    Architecture("GPT-J", "GPTJ", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    Architecture("GPT-2", "GPT2", {"n_embd": 64, "n_layer": 4, "n_head": 4}),
    Architecture("GPT-NeoX, Pythia", "GPTNeoX"),
    Architecture("GPT-BigCode", "GPTBigCode", {"n_embd": 64, "n_layer": 4, "n_head": 4}),
    Architecture("OPT", "OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    Architecture("Mamba", "Mamba", {"state_size": 8}),
    Architecture("Mamba 2", "Mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16}),
    Architecture("Jamba", "Jamba", {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1}),
    Architecture("LFM 2", "Lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    Architecture(
        "LFM 2 MoE", "Lfm2Moe", {**_EXPERTS, "layer_types": ["conv", "full_attention"] * 2}
    ),
    Architecture("LFM 2 VL", "Lfm2Vl", {"layer_types": ["conv", "full_attention"] * 2}, _VISION),
    Architecture("RecurrentGemma", "RecurrentGemma", {"lru_width": 64}),
    Architecture(
        "Kimi Linear",
        "KimiLinear",
        {**_LATENT, **_ROUTED, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    Architecture("RWKV", "Rwkv", {"context_length": 64}),
    Architecture("DiffLlama", "DiffLlama"),
    Architecture("JetMoE", "JetMoe", {**_EXPERTS, "kv_channels": 16}),
    Architecture("Persimmon", "Persimmon", _ALL_HEADS),
    Architecture(
        "GPT-Neo",
        "GPTNeo",
        {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 32},
    ),
    Architecture("CodeGen", "CodeGen", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    Architecture("XGLM", "XGLM", {"d_model": 64, "ffn_dim": 96, "num_layers": 2}),
    Architecture("BioGPT", "BioGpt"),
    Architecture("Doge", "Doge"),
    Architecture(
        "Kimi K2.5 with images",
        "Kimi_K25",
        {**_LATENT, **_ROUTED},
        {**_VISION, "pos_emb_height": 4, "pos_emb_width": 4},
        "deepseek_v3",
    ),
    Architecture("InternVL 3", "InternVL", {}, _VISION, "qwen2"),
    Architecture("LLaVA", "Llava", {}, {**_VISION, "model_type": "clip_vision_model"}, "llama"),
    Architecture(
        "LLaVA-NeXT", "LlavaNext", {}, {**_VISION, "model_type": "clip_vision_model"}, "llama"
    ),
    Architecture(
        "LLaVA-OneVision",
        "LlavaOnevision",
        {},
        {**_VISION, "model_type": "siglip_vision_model"},
        "qwen2",
    ),
    Architecture("Idefics 2", "Idefics2", {}, _VISION, "mistral"),
    Architecture("Idefics 3", "Idefics3", {}, _VISION, "llama"),
    Architecture("SmolVLM", "SmolVLM", {}, _VISION, "llama"),
    Architecture("PaliGemma", "PaliGemma", _HEADS, _VISION, "gemma"),
    Architecture("Command A Vision", "Cohere2Vision", _HEADS, _VISION, "cohere2"),
    Architecture("Aya Vision", "AyaVision", _HEADS, _VISION, "cohere2"),
)
